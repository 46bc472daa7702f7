"""Whole runs of train_vqgan.py on 24 small images."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train_vqgan
from common import checkpoint
from common.checkpoint import read_weights
from data_tools.shards.index import ShardIndex
from train_vqgan import TokenizerTask
from vq.data import DecodeMasked, small_images
from vq.image_folder import ImageFolder
from vq.losses.adversary import Adversary
from vq.losses.foreground import border_mask, pixel_weights
from vq.model import ImageTokenizer

ROOT = Path(train_vqgan.__file__).parent
COMMON = [
    "--loop.global-batch-size",
    "4",
    "--loop.log-every",
    "1",
    "--val-images",
    "8",
    "--num-workers",
    "0",
]
COMMON += ["--device", "cpu", "--loop.tensorboard", "False", "--kmeans-step", "2", "--revive-every", "2"]


def rows(run: Path, kind: str = "train") -> list[dict]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


@pytest.fixture
def train(tmp_path, shards, small_flags):
    def run(name: str, *flags: str, steps: int = 4, data: bool = True) -> Path:
        directory = tmp_path / name
        source = ["--data", str(shards)] if data else []
        train_vqgan.main(
            [
                *source,
                "--loop.run-dir",
                str(directory),
                "--loop.num-steps",
                str(steps),
                *small_flags,
                *COMMON,
                *flags,
            ]
        )
        return directory

    return run


@pytest.mark.parametrize("quantizer", ["vq", "ema", "gumbel", "fsq"])
def test_every_quantizer_trains_and_lowers_the_loss(train, quantizer):
    flags = ["--model.fsq-levels", "4", "4"] if quantizer == "fsq" else []
    run = train(
        quantizer,
        "--model.quantizer",
        quantizer,
        *flags,
        "--optim.lr",
        "3e-3",
        "--optim.warmup-steps",
        "1",
        steps=30,
    )
    losses = [r["rec_loss"] for r in rows(run)]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:3])
    metrics = rows(run, "val")[-1]
    assert {"psnr", "usage", "perplexity", "dead_codes", "color_shift"} <= set(metrics)
    assert ImageTokenizer.from_pretrained(run).config.quantizer == quantizer


def test_a_further_code_starts_from_what_the_first_leaves_over(train):
    one = train("one", steps=2)
    flags = [
        "--init",
        str(one),
        "--model.code-depth",
        "2",
        "--model.level-dropout",
        "0.5",
        "--optim.lr",
        "1e-9",
    ]
    two = train("two", *flags, "--ema-decay", "0", "--loop.global-batch-size", "8", steps=1)
    before, after = ImageTokenizer.from_pretrained(one), ImageTokenizer.from_pretrained(two)
    images = torch.rand(8, 3, before.image_size, before.image_size) * 2 - 1
    torch.testing.assert_close(after.quantizer.entries(0), before.quantizer.entries(0), atol=1e-6, rtol=0)
    points = before.quantizer.normalize(before.encoder(images))
    errors = [
        (m.quantizer.lookup(m.encode(images).ids).permute(0, 2, 3, 1) - points).norm()
        for m in (before, after)
    ]
    assert errors[1] < 0.9 * errors[0]


def test_init_with_more_codes_is_refused(train, capsys):
    three = train("three", "--model.code-depth", "3", steps=1)
    with pytest.raises(SystemExit) as stop:
        train("two", "--init", str(three), "--model.code-depth", "2", steps=1)
    assert stop.value.code == 2 and "vq.levels" in capsys.readouterr().err


def test_accumulation_and_activation_checkpointing_give_the_plain_run(train):
    plain = [r["loss"] for r in rows(train("plain", steps=3))]
    for name, flags in {
        "accumulated": ["--loop.micro-batch-size", "2"],
        "checkpointed": ["--checkpoint-activations", "True"],
    }.items():
        other = [r["loss"] for r in rows(train(name, *flags, steps=3))]
        assert other == pytest.approx(plain, rel=2e-2), name
    exact = [r["loss"] for r in rows(train("same", "--precision", "fp32", "--kmeans-step", "0", steps=3))]
    split = train(
        "split", "--precision", "fp32", "--kmeans-step", "0", "--loop.micro-batch-size", "1", steps=3
    )
    assert [r["loss"] for r in rows(split)] == pytest.approx(exact, rel=1e-4)


def test_multiscale_draws_sizes_by_step(train, monkeypatch):
    seen = []
    plain = TokenizerTask._gradient

    def spy(self, reconstruction, *rest):
        seen.append(reconstruction.shape[-1])
        return plain(self, reconstruction, *rest)

    monkeypatch.setattr(TokenizerTask, "_gradient", spy)
    train("one", "--multiscale", "0.5", "1.0", "1.5", steps=8)
    first, seen[:] = list(seen), []
    train("two", "--multiscale", "0.5", "1.0", "1.5", steps=8)
    assert set(first) == {8, 16, 24} and first == seen


def test_a_plain_folder_of_odd_images_trains(train, tmp_path, make_sample, capsys):
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (40, 30, 3), np.uint8))
    for i in range(8):
        (folder / f"plain{i}.png").write_bytes(make_sample(i)["png"])
    image.convert("P").save(folder / "palette.png")
    image.convert("CMYK").save(folder / "cmyk.jpg")
    image.convert("RGBA").save(folder / "more" / "alpha.webp")
    Image.fromarray(rng.integers(0, 65535, (20, 20), np.uint16)).save(folder / "deep.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(folder / "turned.jpg", exif=exif)
    image.save(folder / "moving.gif", save_all=True, append_images=[image.transpose(0)])
    for i in range(3):
        image.resize((8, 8 + i)).save(folder / f"small{i}.png")
    (folder / "labels.json").write_text('{"a": 1}')
    (folder / "plain0.txt").write_text("一件红色的连衣裙")
    run = train("folder", "--image-folder", str(folder), "--loss.foreground-weight", "3", data=False)
    said = capsys.readouterr().out
    assert "1 files of" in said and "are no images and were left out" in said
    assert "smaller than 16 pixels" in said
    assert len(rows(run)) == 4

    everything = ImageFolder.open(folder, "train"), ImageFolder.open(folder, "val")
    assert {len(part) for part in everything} == {1, 16}
    assert not {s.key for s in everything[0].samples} & {s.key for s in everything[1].samples}
    captions = [
        part.read(i)["txt"].decode() for part in everything for i in range(len(part)) if "txt" in part.read(i)
    ]
    assert captions == ["一件红色的连衣裙"]


def test_a_decompression_bomb_and_a_broken_image_are_replaced_and_counted(
    train, tmp_path, make_sample, make_tar, capsys
):
    buffer = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(buffer, "PNG")
    samples = [make_sample(i) for i in range(8)]
    samples += [{"png": buffer.getvalue(), "txt": b"bomb"}, {"png": b"not an image", "txt": b"noise"}]
    make_tar(tmp_path / "train-00000.tar", samples)
    make_tar(tmp_path / "val-00000.tar", samples[:4])
    train("bomb", "--data", str(tmp_path), data=False)
    said = capsys.readouterr().out
    assert (
        "too_many_pixels" in said and "not_an_image" in said and "skipped a corrupt sample (2 so far)" in said
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "/nowhere"], "no data folder /nowhere"),
        (["--image-folder", "/nowhere"], "no image folder /nowhere"),
        (["--data", "a", "--image-folder", "b"], "either data (shards) or image_folder, not both"),
        (["--loop.micro-batch-size", "3"], "do not divide into micro-batches of 3"),
        (["--device", "cuda:7"], "no usable GPU"),
        (["--multiscale", "9"], "multiscale must lie in"),
        (["--model.fast.channels", "33", "33"], "channels must be multiples of 32"),
        (["--model.architecture", "resnet"], "resnet"),
    ],
)
def test_bad_input_ends_in_one_sentence(flags, message, shards, tmp_path, capsys):
    source = [] if {"--data", "--image-folder"} & set(flags) else ["--data", str(shards)]
    if "cuda:7" in flags and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(SystemExit) as stop:
        train_vqgan.main([*source, "--loop.run-dir", str(tmp_path / "run"), *COMMON, *flags])
    error = re.sub(r"[^\x20-\x7e]+", " ", capsys.readouterr().err)  # tyro frames and wraps
    assert stop.value.code == 2 and message in " ".join(error.split()) and "Traceback" not in error


def test_an_empty_folder_is_said(tmp_path, capsys):
    (tmp_path / "labels.csv").write_text("a,b")
    with pytest.raises(SystemExit):
        train_vqgan.main(["--image-folder", str(tmp_path), "--loop.run-dir", str(tmp_path / "run"), *COMMON])
    assert "no images in" in capsys.readouterr().err


def test_nan_stops_names_the_batch_and_keeps_the_last_checkpoint(train, monkeypatch, capsys, tmp_path):
    plain = TokenizerTask.train_step

    def poisoned(self, batch, step):
        if step == 3:
            batch["image"][0, 0, 0, 0] = float("nan")
        return plain(self, batch, step)

    monkeypatch.setattr(TokenizerTask, "train_step", poisoned)
    with pytest.raises(SystemExit) as stop:
        train("nan", "--loop.save-every", "2", steps=6)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "not finite at step 3" in error and re.search(r"samples \d{6}", error)
    kept = checkpoint.step_directories(tmp_path / "nan")
    assert [d.name for d in kept] == ["step_00000002"]
    assert all(t.isfinite().all() for t in read_weights(kept[0]).values() if t.is_floating_point())


def test_a_collapse_in_a_run_goes_back_and_the_run_ends_well(train, monkeypatch, capsys):
    plain = Adversary.gradient
    blows = []

    def blow_up_once(self, reconstruction, leaf, images, rec_gradient, last_layer, step, view):
        if step == 7 and not blows:
            blows.append(step)
            last_layer.data.mul_(30)  # unseen by autograd, which needs it in float32
        return plain(self, reconstruction, leaf, images, rec_gradient, last_layer, step, view)

    monkeypatch.setattr(Adversary, "gradient", blow_up_once)
    judge = ["--preset", "vqgan", "--adversary.warmup-steps", "2", "--adversary.ramp-steps", "0"]
    judge += ["--adversary.discriminator.channels", "32", "--adversary.discriminator.layers", "1"]
    every = ["--loop.eval-every", "2", "--loop.save-every", "2", "--loop.keep-last", "1", "--ema-decay", "0"]
    run = train("collapse", *judge, *every, "--kmeans-step", "0", "--revive-every", "0", steps=12)
    said = capsys.readouterr().out
    assert blows == [7] and said.count("collapse (") == 1 and "adversary at 0.5 of its weight" in said
    values = [row["rec_loss"] for row in rows(run, "val")]
    assert values[3] > 1.25 * min(values[:3]) and values[-1] < 1.25 * min(values[:3])


def test_a_killed_run_goes_on_bit_for_bit(tmp_path, shards, small_flags):
    flags = ["--data", str(shards), *small_flags, *COMMON, "--loop.num-steps", "8", "--loop.save-every", "2"]
    flags += ["--preset", "vqgan", "--adversary.warmup-steps", "1", "--adversary.ramp-steps", "1"]
    flags += ["--adversary.discriminator.channels", "32", "--adversary.discriminator.layers", "1"]
    flags += ["--loop.eval-every", "4", "--model.quantizer", "ema", "--multiscale", "1", "1.5"]
    train_vqgan.main([*flags, "--loop.run-dir", str(tmp_path / "whole")])

    command = [sys.executable, "-c", SLOW_STEPS, *flags, "--loop.run-dir", str(tmp_path / "killed")]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    deadline = time.monotonic() + 300
    while not (tmp_path / "killed" / "step_00000004" / "config.json").is_file():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "step_00000008").exists()
    train_vqgan.main([*flags, "--loop.run-dir", str(tmp_path / "killed")])

    ignored = ("samples_per_second", "data_share", "eta_seconds")
    whole, killed = (
        [{k: v for k, v in r.items() if k not in ignored} for r in rows(tmp_path / n)]
        for n in ("whole", "killed")
    )
    assert whole == killed
    a, b = (read_weights(tmp_path / n / "step_00000008") for n in ("whole", "killed"))
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


SLOW_STEPS = """
import sys, time
import torch
torch.set_num_threads(1)
import train_vqgan
from train_vqgan import TokenizerTask
plain = TokenizerTask.train_step
def slow(self, batch, step):
    time.sleep(0.3 if step >= 4 else 0)
    return plain(self, batch, step)
TokenizerTask.train_step = slow
train_vqgan.main(sys.argv[1:])
"""


def test_border_mask_finds_the_goods_and_weights_average_to_one():
    images = torch.full((3, 3, 64, 64), 0.9)
    images[0, :, 16:48, 16:48] = -0.5
    images[1] = torch.rand(3, 64, 64) * 2 - 1  # no background to speak of
    mask = border_mask(images)
    inside = torch.zeros(64, 64)
    inside[16:48, 16:48] = 1
    assert (mask[0, 0] - inside).abs().mean() < 0.05
    assert mask[2].min() == 1  # nothing stands out: everything counts
    weights = pixel_weights(images, 4.0)
    torch.testing.assert_close(weights.mean((1, 2, 3)), torch.ones(3))
    assert weights[0, 0, 32, 32] == pytest.approx(4 * float(weights[0, 0, 0, 0]), rel=1e-4)
    assert pixel_weights(images, 1.0) is None


def test_masks_from_data_go_through_the_same_crop_and_mirror(tmp_path, make_tar, make_sample):
    image = np.full((32, 24, 3), 255, np.uint8)
    image[4:20, 2:10] = (200, 0, 0)
    mask = np.zeros((32, 24), np.uint8)
    mask[4:20, 2:10] = 255
    members = {}
    for suffix, array in (("png", image), ("mask.png", mask)):
        buffer = io.BytesIO()
        Image.fromarray(array).save(buffer, "PNG")
        members[suffix] = buffer.getvalue()
    make_tar(tmp_path / "train-00000.tar", [members, {"png": make_sample(0)["png"]}])
    index = ShardIndex.open(tmp_path)
    from data_tools.images.crops import CropFlip

    for seed in range(4):
        found = DecodeMasked(24, CropFlip(0.7))(index, 0, np.random.default_rng(seed))
        red = (found["image"][1] < 0).float()  # little green: the goods
        assert (red - (found["mask"][0] > 0.5).float()).abs().mean() < 0.03
    assert torch.all(DecodeMasked(24)(index, 1, np.random.default_rng(0))["mask"] == -1)
    assert "1 of 2" in small_images(index, 25) or "2 of 2" in small_images(index, 25)


def test_colour_shift_stays_small_after_a_short_training(train):
    run = train("colour", "--optim.lr", "3e-3", "--optim.warmup-steps", "5", "--ema-decay", "0.9", steps=150)
    assert rows(run, "val")[-1]["color_shift"] < 10  # levels of 255; 45 untrained


@pytest.mark.parametrize("name", sorted(p.name for p in (ROOT / "configs").glob("*/vq*.yaml")))
def test_every_config_builds(name):
    from common.config import from_mapping, read_mapping
    from vq.options import Options

    for path in (ROOT / "configs").glob(f"*/{name}"):
        options = from_mapping(Options, read_mapping(path), where=str(path))
        with torch.device("meta"):
            ImageTokenizer(options.model)


@pytest.mark.slow
def test_compiled_training_gives_the_plain_losses(train):
    if not shutil.which("g++"):
        pytest.skip("torch.compile on a CPU needs g++")
    judge = ["--preset", "vqgan", "--adversary.warmup-steps", "0", "--adversary.ramp-steps", "0"]
    judge += ["--adversary.discriminator.channels", "32", "--adversary.discriminator.layers", "1"]
    judge += ["--adversary.rollback-share", "0", "--precision", "fp32"]
    plain = [r["rec_loss"] for r in rows(train("plain", *judge, steps=3))]
    compiled = [r["rec_loss"] for r in rows(train("compiled", *judge, "--compile", "True", steps=3))]
    assert compiled == pytest.approx(plain, rel=1e-3)


def test_compile_without_a_compiler_is_said(train, monkeypatch, capsys):
    monkeypatch.setattr("train_vqgan.shutil.which", lambda name: None)
    with pytest.raises(SystemExit):
        train("compiled", "--compile", "True")
    assert "compile needs the C++ compiler g++" in capsys.readouterr().err


def test_muon_trains_the_kernels_between_the_first_and_the_last(train):
    rate = ["--optim.lr", "3e-3", "--optim.warmup-steps", "1"]
    run = train("muon", "--optim.name", "muon", *rate, "--kmeans-step", "0", "--revive-every", "0", steps=20)
    losses = [row["rec_loss"] for row in rows(run)]
    assert losses[-1] < 0.9 * losses[0]
    moments = checkpoint.read_training_state(run / "latest")["task"]["engine"]["moments"]
    body = {n for n, entry in moments.items() if "momentum" in entry}
    assert body and all(".body." in n for n in body)
    assert "exp_avg" in moments["encoder.conv_in.weight"]
