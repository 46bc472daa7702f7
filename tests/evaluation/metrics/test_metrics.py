"""The whole measuring: metrics that follow what was done to the images, and each bad input."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from reference_shards import caption, write_out_dir
from tiny_goods import COLORS, KINDS, draw

from evaluation.__main__ import main
from evaluation.compare.parts import Part, rows_like
from evaluation.metrics import agreement
from evaluation.metrics.compute import (
    MeasureOptions,
    Metric,
    Networks,
    Reference,
    measure,
    measure_all,
    paired_difference,
    settings_of,
)
from evaluation.metrics.features import RankerTower
from evaluation.metrics.resampling import Resampling
from evaluation.metrics.statistics import Interval
from evaluation.sets import SampleSet
from rankers import load_ranker

QUICK = MeasureOptions(replicates=60, set_replicates=20)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def networks(judge_dir) -> Networks:
    return Networks.load(judge=str(judge_dir))


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> SampleSet:
    return SampleSet.from_out_dir(write_out_dir(tmp_path_factory.mktemp("good") / "out"), "good")


@pytest.fixture(scope="module")
def half_wrong(tmp_path_factory) -> SampleSet:
    """Six of the twelve titles show another kind and colour."""
    return SampleSet.from_out_dir(write_out_dir(tmp_path_factory.mktemp("wrong") / "out", wrong=6), "wrong")


@pytest.fixture(scope="module")
def metrics(good, half_wrong, shards, networks, cache) -> tuple[dict[str, Metric], dict[str, Metric]]:
    both = []
    for samples in (good, half_wrong):
        found = measure(samples, Reference.open(str(shards), samples), networks, QUICK, cache)
        both.append({metric.name: metric for metric in found})
    return both[0], both[1]


def test_every_metric_says_what_it_depends_on(metrics, good):
    for metric in metrics[0].values():
        assert metric.count >= 1 and metric.network in (
            "efficientnet_lite1",
            "judge",
            "pixels",
            "perceptual-hash",
        )
        assert metric.value.low <= metric.value.value <= metric.value.high
        assert json.loads(json.dumps(metric.to_json()))["name"] == metric.name
    assert settings_of(good) == {
        "set": "good", "pictures": 24, "prompts": 12, "seeds": [3], "guidance": [3.0], "rerank_width": 1,
        "reranker": None, "corrupt": 0,
    }  # fmt: skip
    assert not {"FID", "KID", "IS"} & set(metrics[0])


def test_images_of_another_kind_and_colour_are_seen(metrics):
    good, wrong = metrics
    for name in ("category_right[judge]", "color_right[judge]", "color_right[pixels]"):
        assert good[name].value.value > 0.8, name
        assert wrong[name].value.value < 0.65, name
        assert good[name].real > 0.8 and "a blind guess" in good[name].note
        difference = paired_difference(good[name], wrong[name])
        assert difference.low > 0 and set(good[name].by_prompt) == {
            caption(k, c) for k in KINDS for c in COLORS
        }


def test_a_better_set_is_nearer_to_the_real_one(shards, networks, cache, tmp_path, good):
    """Grey images are further away than drawn ones, by every distance, and cover less."""
    folder = tmp_path / "grey"
    shutil.copytree(good.samples[0].path.parent, folder)
    for i, path in enumerate(sorted(folder.glob("*.png"))):
        Image.new("RGB", (40, 40), (5 * i, 5 * i, 5 * i)).save(path)
    grey = SampleSet.from_out_dir(folder, "grey")
    both = []
    for samples in (good, grey):
        found = measure(samples, Reference.open(str(shards), samples), networks, QUICK, cache)
        both.append({metric.name: metric for metric in found})
    for name in ("frechet_distance[efficientnet_lite1]", "kernel_distance[efficientnet_lite1]"):
        assert both[1][name].value.value > 2 * both[0][name].value.value
        assert paired_difference(both[1][name], both[0][name]).low > 0
    precision, coverage = (
        [b[f"{name}[efficientnet_lite1]"].value.value for b in both] for name in ("precision", "coverage")
    )
    assert precision[1] <= precision[0] and coverage[1] < coverage[0]


def test_copies_of_training_images_are_counted_and_shown(shards, networks, cache, tmp_path, good):
    folder = tmp_path / "copies"
    shutil.copytree(good.samples[0].path.parent, folder)
    reference = Reference.open(str(shards), good)
    for i in range(6):
        reference.train.open(i).save(folder / f"{i:04d}.png")
    samples = SampleSet.from_out_dir(folder)
    found = {
        f.name: f for f in measure(samples, reference, networks, MeasureOptions(60, 20, near=0.2), cache)
    }
    pairs = found["memorised[perceptual-hash]"].pairs
    copied = {(p.sample, p.row) for p in pairs if p.is_copy and p.distance == 0}
    assert {(i, i) for i in range(6)} <= copied and found["memorised[perceptual-hash]"].value.value >= 0.25
    assert pairs[0].caption == reference.train.facts(pairs[0].row).caption
    assert found["memorised[efficientnet_lite1]"].value.value >= 0.25


def test_features_are_not_computed_twice(good, shards, networks, cache, metrics, monkeypatch):
    monkeypatch.setattr(type(networks.judge), "features", lambda self, images: pytest.fail("computed again"))
    measure(good, Reference.open(str(shards), good), networks, QUICK, cache)


def test_agreement_with_a_scorer_that_knows(tmp_path):
    """Images and texts as one-hot rows: every metric is 1 for matched and 0 for shifted pairs."""

    class Ranker:
        name, identity = "exact", "0" * 64

        def text_features(self, texts):
            import torch

            return torch.eye(12)[[int(text) for text in texts]]

        def image_features(self, images):
            import torch

            return torch.stack([torch.eye(12)[np.asarray(image)[0, 0, 0]] for image in images])

    images = [Image.new("RGB", (4, 4), (i, 0, 0)) for i in range(12)]
    scorer = RankerTower(Ranker())
    for shift, expected in ((0, 1.0), (1, 0.0)):
        from evaluation.metrics.features import ListedImages

        texts = [str((i + shift) % 12) for i in range(12)]
        part = Part(texts, ListedImages(images), Resampling(texts, 40), None)
        found = agreement.metrics(scorer, part, 5, 100, 0)
        assert found["clip_score"][0].interval.value == 100 * expected
        for name in ("r_precision_top5", "r_precision_1_of_12", "recall_at_1"):
            assert found[name][0].interval.value == expected, name
            assert found[name][0].count == 12
    alone = Part(["3"], ListedImages(images[3:4]), Resampling(["3"], 40), None)
    assert list(agreement.metrics(scorer, alone, 5, 100, 0)) == ["clip_score"]


def test_real_images_are_those_of_the_prompts_where_there_are():
    texts = ["a", "b", "", "a", "c"]
    assert rows_like(texts, ["a", "b"], 9, 0).tolist() == [0, 1, 3]
    assert rows_like(texts, ["x", "y", "a"], 2, 0).tolist() == sorted(rows_like(texts, ["x", "y", "a"], 2, 0))
    assert 2 not in rows_like(texts, ["x"], 9, 0)


def test_metrics_of_other_prompts_do_not_pair(metrics):
    name = "category_right[judge]"
    other = Metric(
        name, Interval(1, 1, 1), True, "x", 1, by_prompt={"z": 1.0}, replicates=metrics[0][name].replicates
    )
    for pair in ((metrics[0][name], other), (metrics[0][name], metrics[0]["color_right[pixels]"])):
        with pytest.raises(ValueError, match="no paired difference"):
            paired_difference(*pair)


def test_what_cannot_be_measured_is_said(shards, networks, cache, tmp_path):
    draw("杯子", "红色", 1).save(tmp_path / "one.png")
    one = SampleSet.from_out_dir(tmp_path, text="一个红色的马克杯")
    found, left_out = measure_all(
        one, Reference.open(str(shards), one, train_split=""), networks, QUICK, cache
    )
    assert {f.name for f in found} >= {"category_right[judge]", "color_right[judge]"}
    said = " ".join(left_out)
    for words in ("at least 2 images, not 1", "no text has two images", "no training images", "--clip"):
        assert words in said
    assert all(np.isfinite(f.value.value) for f in found)


# --- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture
def out(tmp_path) -> Path:
    return write_out_dir(tmp_path / "out")


def arguments(out: Path, shards: Path, cache: Path, *more: str) -> list[str]:
    quick = ["--measure.replicates", "40", "--measure.set-replicates", "10", "--cache", str(cache)]
    return [str(out), "--reference", str(shards), *quick, *more]


@pytest.mark.parametrize("width", ["80", "160"])
def test_the_command_writes_a_table_a_file_and_a_page(
    out, shards, cache, judge_dir, ranker_dir, capsys, monkeypatch, width
):
    monkeypatch.setenv("COLUMNS", width)
    main(arguments(out, shards, cache, "--judge", str(judge_dir), "--clip", str(ranker_dir)))
    shown = capsys.readouterr().out
    for words in (
        "frechet_distance[efficientnet_lite1]",
        "clip_score",
        "recall_at_10",
        "names the category of",
        "guidance",
    ):
        assert words in shown, words
    written = json.loads((out / "metrics.json").read_text("utf-8"))
    by_name = {metric["name"]: metric for metric in written["figures"]}
    assert (
        by_name["category_right[judge]"]["seeds"] == [3] and by_name["category_right[judge]"]["count"] == 24
    )
    assert written["networks"].keys() == {"efficientnet_lite1", "judge", "checkpoint"}
    page = (out / "report.html").read_text("utf-8")
    assert "Nearest training images" in page and "category_right" in page and caption("杯子", "红色") in page
    assert not re.search(r'(src|href)="(?!data:)', page)


def test_only_the_best_of_n_is_measured(out, shards, cache, judge_dir):
    main(arguments(out, shards, cache, "--judge", str(judge_dir), "--best-of", "2"))
    written = json.loads((out / "metrics.json").read_text("utf-8"))
    assert written["settings"]["pictures"] == 12 and written["settings"]["rerank_width"] == 2
    assert written["settings"]["reranker"] == "likelihood"


def test_the_encoder_that_reranked_is_refused(out, shards, cache, judge_dir, ranker_dir, capsys, tmp_path):
    import rerank

    rerank.main([str(out), "--ranker", str(ranker_dir)])
    copy = tmp_path / "another name"
    shutil.copytree(ranker_dir, copy)  # it is told by its weights
    with pytest.raises(SystemExit) as caught:
        main(arguments(out, shards, cache, "--judge", str(judge_dir), "--clip", str(copy)))
    error = capsys.readouterr().err
    assert caught.value.code == 2 and "ordered the images" in error and error.count("\n") == 1
    main(arguments(out, shards, cache, "--judge", str(judge_dir)))
    ranking = json.loads((out / "ranking.json").read_text("utf-8"))
    assert ranking["encoders"] == [load_ranker(ranker_dir).identity]
    del ranking["encoders"]
    (out / "ranking.json").write_text(json.dumps(ranking), "utf-8")
    with pytest.raises(SystemExit):
        main(arguments(out, shards, cache, "--clip", str(copy)))
    assert "does not say which weights ranked" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--judge", "none"], "no checkpoint directory none"),
        (["--judge", "RANKER"], "kind 'ranker', not 'judge'"),
        (["--clip", "none"], "no checkpoint directory none"),
        (["--inception", "none.pth"], "no Inception weights at none.pth"),
        (["--reference", "none", "--judge", "JUDGE"], "no data folder none"),
        (["--split", "test", "--judge", "JUDGE"], "no test-*.tar"),
        (["--best-of", "9", "--judge", "JUDGE"], "best of 9 needs 9 images"),
        (["--best-of", "2", "--scorer", "x", "--judge", "JUDGE"], "no score 'x'"),
        (["--measure.near", "0", "--judge", "JUDGE"], "near must lie between 0 and 1"),
        (["--measure.replicates", "1", "--judge", "JUDGE"], "replicates must be at least 20"),
        (["--best-of", "-1"], "best_of must be 0"),
        (["--juge", "x"], "Unrecognized"),
    ],
)
def test_bad_input_ends_with_code_2(out, shards, cache, judge_dir, ranker_dir, more, words, capsys):
    named = {"JUDGE": str(judge_dir), "RANKER": str(ranker_dir)}
    with pytest.raises(SystemExit) as caught:
        main(arguments(out, shards, cache, *(named.get(word, word) for word in more)))
    assert caught.value.code == 2 and words in capsys.readouterr().err
    assert not (out / "metrics.json").exists()


def test_no_images_one_image_and_corrupt_images(shards, cache, judge_dir, tmp_path, capsys):
    judge = ("--judge", str(judge_dir))
    (tmp_path / "empty").mkdir()
    for name, words in (("none", "no directory of images"), ("empty", "holds no images")):
        with pytest.raises(SystemExit) as caught:
            main(arguments(tmp_path / name, shards, cache, *judge))
        assert caught.value.code == 2 and words in capsys.readouterr().err
    out = write_out_dir(tmp_path / "out")
    (out / "0003.png").write_bytes(b"\x89PNG\r\n\x1a\ncut")
    main(arguments(out, shards, cache, *judge))
    assert "left out a corrupt image" in capsys.readouterr().out
    assert json.loads((out / "metrics.json").read_text("utf-8"))["settings"]["corrupt"] == 1


def test_mixed_sizes_and_modes_and_endless_titles(shards, cache, judge_dir, ranker_dir, tmp_path):
    images = [
        Image.new("L", (30, 90)),
        Image.new("RGBA", (64, 48), (255, 0, 0, 128)),
        draw("杯子", "红色", 2, 80),
    ]
    texts = ["一个" + "红色的" * 3333 + "马克杯", "一个蓝色的鞋子", "一个红色的马克杯"]
    for i, (image, text) in enumerate(zip(images, texts, strict=True)):
        image.save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(text, "utf-8")
    found = main(arguments(tmp_path, shards, cache, "--judge", str(judge_dir), "--clip", str(ranker_dir)))
    assert {f.name for f in found} >= {"category_right[judge]", "clip_score[checkpoint]"}
    assert all(np.isfinite(f.value.value) for f in found)
