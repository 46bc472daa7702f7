"""Reconstructions beside originals: nothing lost counts as nothing lost, and what is lost is seen."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation.codecs import Codec
from evaluation.compare.parts import Networks
from evaluation.metrics.resampling import Resampling, mean_estimate
from evaluation.reconstructions import Options, _ratio, main, measure, named_right, reconstruct_all
from evaluation.reference import ReferenceImages
from vq.autoencoder import FastConfig
from vq.model import ImageTokenizer, TokenizerConfig

CPU = torch.device("cpu")


def codec(reconstruct) -> Codec:
    return Codec("test", "0" * 64, 40, 8, reconstruct, lambda side: "nothing")


def options(shards, cache, **changed) -> Options:
    return Options("test", str(shards), replicates=60, frechet_replicates=10, cache=cache, **changed)


@pytest.fixture(scope="module")
def networks(judge_dir) -> Networks:
    return Networks.load(str(judge_dir), device="cpu")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def measured(codec, shards, networks, cache):
    images = ReferenceImages.of_split(str(shards), "val", 40)
    found, _ = measure(codec, images, networks, options(shards, cache), CPU)
    return {metric.name: metric for metric in found}


def test_a_perfect_codec_loses_nothing(shards, networks, cache):
    found = measured(codec(lambda x: x), shards, networks, cache)
    for name in (
        "category right, judge",
        "category among 5, judge",
        "colour right, judge",
        "colour right, pixels",
    ):
        metric = found[name]
        assert metric.relative.value == metric.relative.low == metric.relative.high == 1, name
        assert (
            metric.originals == metric.reconstructions and metric.count == 24 and metric.originals.value > 0.8
        )
    assert found["PSNR, dB"].reconstructions.value == pytest.approx(106.02, abs=0.01)  # its floor of 1e-10
    assert found["frechet_distance[efficientnet_lite1]"].reconstructions.value == pytest.approx(0, abs=1e-6)
    assert found["cosine[efficientnet_lite1]"].reconstructions.value == pytest.approx(1)


def test_a_grey_codec_loses_everything(shards, networks, cache):
    found = measured(codec(lambda x: torch.zeros_like(x)), shards, networks, cache)
    category = found["category right, judge"]
    assert category.reconstructions.value < 0.6 and category.relative.high < 1
    assert category.relative.low <= category.relative.value
    assert found["colour right, judge"].reconstructions.value < 0.6
    assert found["frechet_distance[efficientnet_lite1]"].reconstructions.low > 1
    assert found["cosine[efficientnet_lite1]"].reconstructions.high < 0.95


def test_originals_and_reconstructions_keep_their_order_and_psnr(shards, cache):
    images = ReferenceImages.of_split(str(shards), "val", 40)
    pairs = reconstruct_all(codec(lambda x: -x), images, options(shards, cache, limit=5, batch_size=2), CPU)
    assert [fact.key for fact in pairs.facts] == [images.facts(i).key for i in range(5)]
    for original, shown, value in zip(pairs.originals, pairs.reconstructions, pairs.psnr, strict=True):
        a, b = (np.asarray(image, np.float64) for image in (original, shown))
        assert value == pytest.approx(10 * np.log10(255**2 / ((a - b) ** 2).mean()), rel=1e-4)
        assert np.abs(255 - a - b).max() <= 1


def test_shares_of_the_originals_are_paired():
    resampling = Resampling(list("abcdefgh"), 200)
    originals = mean_estimate(np.array([1, 1, 1, 1, 1, 1, 0, 0.0]), resampling, is_share=True)
    half = mean_estimate(np.array([1, 1, 1, 0, 0, 0, 0, 0.0]), resampling, is_share=True)
    assert _ratio(half, originals).value == 0.5
    assert _ratio(originals, originals).low == _ratio(originals, originals).high == 1
    nothing = mean_estimate(np.zeros(8), resampling, is_share=True)
    assert _ratio(half, nothing) is None


def test_hits_count_only_what_is_wanted():
    hits = named_right(["a", "", "b"], [["a", "x"], ["a"], ["a", "x"]])
    np.testing.assert_array_equal(hits, [1, np.nan, 0])


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    torch.manual_seed(0)
    fast = FastConfig(channels=(32, 32), encoder_blocks=(1, 1), decoder_blocks=(1, 1), attention=False)
    folder = tmp_path_factory.mktemp("tokenizer") / "step_00000001"
    ImageTokenizer(TokenizerConfig(image_size=32, fast=fast, codebook_size=16)).save_pretrained(folder)
    return folder


def test_the_command_writes_a_table_a_file_and_a_grid(
    shards, tokenizer_dir, judge_dir, tmp_path, cache, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "160")
    line = [
        str(tokenizer_dir),
        str(shards),
        "--judge",
        str(judge_dir),
        "--out",
        str(tmp_path),
        "--cache",
        str(cache),
    ]
    metrics = main(
        [*line, "--replicates", "30", "--frechet-replicates", "4", "--show", "12", "--device", "cpu"]
    )
    shown = capsys.readouterr().out
    assert "category right" in shown and "frechet_distance[efficientnet_lite1]" in shown
    assert "tokens of a codebook of 16" in shown and "real held-out" in shown
    written = json.loads((tmp_path / "metrics.json").read_text("utf-8"))
    assert [m["name"] for m in written["metrics"]] == [m.name for m in metrics] and written[
        "image_size"
    ] == 32
    grid = Image.open(tmp_path / "grid.png")
    assert grid.size == (12 * 34 - 2, 2 * 34 - 2)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--image-size", "33"], "must be a multiple of"),
        (["--split", "test"], "no test-*.tar"),
        (["--judge", "none"], "no checkpoint directory none"),
        (["--limit", "1"], "at least 2 are needed"),
        (["--replicates", "1"], "replicates must be at least 20"),
        (["--shwo", "3"], "Unrecognized"),
    ],
)
def test_bad_input_ends_with_code_2(shards, tokenizer_dir, judge_dir, tmp_path, cache, more, words, capsys):
    with pytest.raises(SystemExit) as caught:
        main([str(tokenizer_dir), str(shards), "--out", str(tmp_path / "o"), "--cache", str(cache),
              "--judge", str(judge_dir), *more])  # fmt: skip
    assert caught.value.code == 2 and words in capsys.readouterr().err
