"""Whole runs of gan.train on a handful of small images."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_gan import COMMON, SIZES, TEXTS, rows, sample, write_shards

from common import checkpoint
from common.checkpoint import read_weights
from common.files import read_json
from gan import evaluation
from gan import train as gan_train
from gan.pipeline import TextToGan
from gan.plot import main as plot
from gan.task import GanTask

ROOT = Path(gan_train.__file__).parent.parent


def test_a_run_logs_all_that_its_page_speaks_of(run_dir):
    first, last = rows(run_dir)[0], rows(run_dir)[-1]
    names = {"gen_loss", "disc_loss", "logits_real", "logits_fake", "logits_mismatched", "augment_p", "lr"}
    assert names <= set(first) and last["step"] == 4
    found = rows(run_dir, "val")[-1]
    assert {"frechet_distance", "diversity", "logits_train", "logits_val", "logits_fake", "overfit"} <= set(
        found
    )
    with Image.open(run_dir / "samples" / "samples_00000004.png") as grid:
        assert grid.size == (2 * 34 - 2, 6 * 34 - 2)  # a row for each of the six validation captions
    assert (
        read_json(run_dir / "labels.json") == ["帽子", "杯子", "鞋子"]
        or len(read_json(run_dir / "labels.json")) == 3
    )


def test_a_discriminator_learns_real_from_generated(train):
    still = ("--optim.lr", "1e-9", "--discriminator.lr", "2e-3", "--discriminator.mismatch-weight", "0")
    found = rows(train("still", *still, steps=40))
    gaps = [row["logits_real"] - row["logits_fake"] for row in found]
    assert gaps[-1] > 0.2 > 4 * abs(gaps[0]) and found[-1]["disc_loss"] < found[0]["disc_loss"]


@pytest.mark.parametrize(
    "flags",
    [
        ("--discriminator.r1-weight", "1", "--discriminator.r1-every", "2"),
        (
            "--loss",
            "hinge",
            "--d-augment.mode",
            "fixed",
            "--d-augment.p",
            "0.5",
            "--loop.micro-batch-size",
            "2",
        ),
        ("--discriminator.features", "imagenet", "--discriminator.features-size", "64", "--labels", "off"),
        ("--ema-decay", "0", "--d-augment.mode", "off", "--discriminator.r1-weight", "0.1"),
        ("--generator.first-map", "constant", "--sameness-weight", "1"),
    ],
    ids=["r1", "non-saturating", "imagenet", "plain", "sameness"],
)
def test_every_variant_trains_and_generates(train, flags):
    run = train("variant", *flags, "--discriminator.mixed-channels", "8", steps=2)
    log = rows(run)
    assert ("r1" in log[0]) == any("r1-weight" in flag for flag in flags)
    assert ("difference" in log[0]) == ("--sameness-weight" in flags)
    assert log[0]["augment_p"] == (0.5 if "fixed" in flags else 0.0)
    pipeline = TextToGan.from_pretrained(run, "cpu")
    assert len(pipeline(TEXTS[0], 2)) == 2 and bool(pipeline.config.labels) != (
        "off" in flags and "--labels" in flags
    )


def test_images_of_a_caption_differ_more_with_the_term_against_sameness(train):
    still = (
        "--optim.lr",
        "1e-2",
        "--discriminator.lr",
        "1e-9",
        "--discriminator.mismatch-weight",
        "0",
        "--least-difference",
        "2",
    )
    without, with_it = (
        rows(train(f"weight{weight}", *still, "--sameness-weight", weight, steps=16))[-1]["difference"]
        for weight in ("1e-6", "10")
    )
    assert with_it > 1.2 * without


def test_a_run_from_before_there_was_a_choice_of_first_maps_goes_on(train, tmp_path):
    constant = ("--generator.first-map", "constant")
    run = train("older", *constant, steps=2)
    step = checkpoint.step_directories(run)[-1]
    config = read_json(step / "config.json")
    assert config["model"]["generator"].pop("first_map") == "constant"
    (step / "config.json").write_text(json.dumps(config))
    assert TextToGan.from_pretrained(step, "cpu").config.generator.first_map == "constant"
    assert rows(train("older", *constant, steps=4))[-1]["step"] == 4


def test_a_rankers_text_tower_stays_as_it_is(ranker_dir, tmp_path):
    sizes = ["--generator.img-size", "32", "--generator.channels", "8", "--generator.max-channels", "8"]
    argv = [*COMMON, *sizes, "--text.ranker", str(ranker_dir), "--loop.num-steps", "2"]
    data = write_shards(tmp_path / "data", [sample(i) for i in range(8)], [sample(i) for i in range(3)])
    gan_train.main(["--data", str(data), "--loop.run-dir", str(tmp_path / "run"), *argv])
    own, given = read_weights(tmp_path / "run" / "step_00000002"), read_weights(ranker_dir)
    for name, tensor in own.items():
        if name.startswith("text."):
            torch.testing.assert_close(tensor, given[f"clip.{name}"])


def test_missing_categories_are_counted_and_one_category_is_none(train, tmp_path, capsys):
    some = write_shards(
        tmp_path / "some",
        [sample(i, None if i < 3 else "") for i in range(12)],
        [sample(i) for i in range(3)],
    )
    run = train("some", data=some, steps=1)
    assert "3 of 12 samples looked at have no category" in capsys.readouterr().out
    assert len(read_json(run / "labels.json")) == 3
    one = write_shards(
        tmp_path / "one", [sample(i, "Shoes") for i in range(12)], [sample(i) for i in range(3)]
    )
    run = train("one", data=one, steps=1)
    assert "are of 'Shoes': the GAN reads captions alone" in capsys.readouterr().out
    assert read_json(run / "labels.json") == [] and TextToGan.from_pretrained(run, "cpu").config.labels == ()


def test_two_small_images_train_and_are_said(train, tmp_path, capsys):
    two = [sample(i, None, size=20) for i in (0, 4)]
    data = write_shards(tmp_path / "two", two, two)
    run = train("two", data=data, steps=2)
    assert "2 of 2 images looked at are smaller than 32" in capsys.readouterr().out
    assert len(TextToGan.from_pretrained(run, "cpu")(TEXTS[0], 2)) == 2


def test_nan_is_named_and_the_last_checkpoint_stands(train, monkeypatch, capsys, tmp_path):
    plain = GanTask.train_step

    def poisoned(self, batch, step):
        if step == 3:
            batch["image"][0, 0, 0, 0] = float("nan")
        return plain(self, batch, step)

    monkeypatch.setattr(GanTask, "train_step", poisoned)
    with pytest.raises(SystemExit) as stop:
        train("nan", "--loop.save-every", "2", steps=6)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "disc_loss" in error and "not finite at step 3" in error
    assert re.search(r"samples train\d{4}", error)
    kept = checkpoint.step_directories(tmp_path / "nan")
    assert [d.name for d in kept] == ["step_00000002"]
    assert all(t.isfinite().all() for t in read_weights(kept[0]).values())


def test_a_collapse_is_announced(train, monkeypatch, capsys):
    train("fine", "--collapse-below", "0", steps=1)
    assert "collapse:" not in capsys.readouterr().out
    monkeypatch.setattr(
        evaluation, "mean_pair_distance", lambda rows, center: 0.01 if len(rows) == 8 else 1.0
    )
    train("collapsed", steps=1)
    assert "step 1 | collapse: images of one caption differ by 1.0% of what real" in capsys.readouterr().out


def test_early_stopping_keeps_the_best_checkpoint(train, monkeypatch, capsys):
    values = iter([5.0, 3.0, 4.0, 6.0])
    monkeypatch.setattr(evaluation, "frechet_distance", lambda a, b: next(values))
    every = (
        "--loop.eval-every",
        "1",
        "--loop.save-every",
        "1",
        "--loop.keep-last",
        "1",
        "--loop.patience",
        "2",
    )
    run = train("early", *every, steps=10)
    assert "no better frechet_distance in 2 evaluations: stopping early" in capsys.readouterr().out
    assert (run / "best").resolve().name == "step_00000002" and (
        run / "latest"
    ).resolve().name == "step_00000004"
    assert len(checkpoint.step_directories(run)) == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--generator.img-size", "48"), "img_size must be 32"),
        (("--generator.img-sise", "64"), "--generator.img-sise"),
        (("--sample-texts", "qwz"), "knows nothing of the caption"),
        (("--loop.eval-every", "3", "--loop.save-every", "2"), "must be a multiple of save_every"),
        (("--text.ranker", "nowhere/at/all"), "text.ranker brings its own tower"),
        (("--optim.name", "muon"), "trains with optim.name adamw"),
        (("--loop.global-batch-size", "0"), "global_batch_size"),
        (("--sameness-weight", "1", "--loop.micro-batch-size", "1"), "must hold at least 2"),
        (("--least-difference", "0"), "least_difference must lie in (0, 2]"),
    ],
)
def test_bad_input_ends_in_one_sentence(train, capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        train("bad", *flags)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and len(error.strip().splitlines()) == 1


def test_another_model_in_the_run_directory_is_refused(train, capsys):
    train("again", steps=1)
    for flags in (("--generator.style-dim", "32"), ("--discriminator.condition-dim", "16")):
        with pytest.raises(SystemExit):
            train("again", *flags, steps=2)
        assert "choose another --loop.run-dir" in capsys.readouterr().err


def test_categories_alone_are_enough_and_nothing_is_too_little(train, tmp_path, capsys):
    def without_captions(i: int, category: str | None) -> dict[str, bytes]:
        return {name: data for name, data in sample(i, category).items() if name != "txt"}

    samples = [without_captions(i, "") for i in range(8)]
    run = train("categories", data=write_shards(tmp_path / "some", samples, samples[:3]), steps=1)
    assert len(TextToGan.from_pretrained(run, "cpu")("", 2, category="杯子")) == 2
    samples = [without_captions(i, None) for i in range(8)]
    with pytest.raises(SystemExit):
        train("nothing", data=write_shards(tmp_path / "none", samples, samples[:3]))
    assert "a conditional GAN has nothing to go by" in capsys.readouterr().err


def test_one_validation_image_is_too_few(train, tmp_path, capsys):
    data = write_shards(tmp_path / "data", [sample(i) for i in range(4)], [sample(0)])
    with pytest.raises(SystemExit):
        train("few", data=data)
    assert "a distance needs at least 2" in capsys.readouterr().err


def test_the_plot_shows_runs_side_by_side(run_dir, train, tmp_path, capsys):
    other = train("off", "--d-augment.mode", "off", steps=2)
    out = plot([str(run_dir), str(other), "--out", str(tmp_path / "both.png")])
    with Image.open(out) as image:
        assert image.width >= 1000
    with pytest.raises(SystemExit):
        plot([str(tmp_path), "--out", str(tmp_path / "none.png")])
    assert "is no run directory" in capsys.readouterr().err


RESUME = ["--loop.save-every", "2", "--loop.eval-every", "4", "--discriminator.r1-weight", "1"]
RESUME += ["--discriminator.r1-every", "3", "--d-augment.p", "0.3", "--text.tower.dropout", "0.1"]


def test_a_killed_run_goes_on_bit_for_bit(tmp_path, shards):
    flags = ["--data", str(shards), *SIZES, *COMMON, *RESUME, "--loop.num-steps", "8"]
    gan_train.main([*flags, "--loop.run-dir", str(tmp_path / "whole")])
    command = [sys.executable, "-c", SLOW_STEPS, *flags, "--loop.run-dir", str(tmp_path / "killed")]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    deadline = time.monotonic() + 300
    while not (tmp_path / "killed" / "step_00000004" / "config.json").is_file():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "step_00000008").exists()
    gan_train.main([*flags, "--loop.run-dir", str(tmp_path / "killed")])
    assert rows(tmp_path / "whole") == rows(tmp_path / "killed")
    assert rows(tmp_path / "whole", "val") == rows(tmp_path / "killed", "val")
    a, b = (read_weights(tmp_path / n / "step_00000008") for n in ("whole", "killed"))
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


SLOW_STEPS = """
import sys, time
import torch
torch.set_num_threads(1)
from gan import train
from gan.task import GanTask
plain = GanTask.train_step
def slow(self, batch, step):
    time.sleep(0.3 if step >= 4 else 0)
    return plain(self, batch, step)
GanTask.train_step = slow
train.main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("features", ["none", "imagenet"])
def test_two_processes_follow_one(tmp_path, shards, features):
    flags = ["--data", str(shards), *SIZES, *COMMON, "--loop.num-steps", "4", "--precision", "fp32"]
    flags += ["--loop.global-batch-size", "8", "--d-augment.p", "0.3", "--discriminator.mismatch-weight", "0"]
    flags += ["--discriminator.features", features, "--discriminator.features-size", "64"]
    flags += ["--discriminator.r1-weight", "1", "--discriminator.r1-every", "2"]
    gan_train.main([*flags, "--loop.run-dir", str(tmp_path / "one")])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "gan.train", *flags, "--loop.run-dir", str(tmp_path / "two")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    for name in ("logits_real", "logits_fake", "gen_loss"):
        one, two = ([row[name] for row in rows(tmp_path / run)] for run in ("one", "two"))
        assert two == pytest.approx(one, rel=2e-2, abs=2e-3), name
    one, two = (rows(tmp_path / run, "val")[-1] for run in ("one", "two"))
    assert two["frechet_distance"] == pytest.approx(one["frechet_distance"], rel=0.05)
