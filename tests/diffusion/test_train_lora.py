"""Whole runs of diffusion.train_lora on a tiny random base."""

import json

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file
from tiny_tuning import FLAGS, rows, write_base, write_images

from common.checkpoint import step_directories
from diffusion import train_lora
from diffusion.lora.adapters import LoraOptions, add_adapter, base_norm
from diffusion.lora.formats import WEIGHTS_FILE, read_lora
from diffusion.tuning.quantize import quantize_base_


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("material")
    return write_base(folder / "base"), write_images(folder / "data")


@pytest.fixture
def train(tmp_path, material, monkeypatch):
    # planning takes longer than these runs; test_plan.py has it
    monkeypatch.setattr("diffusion.tuning.run.require_memory", lambda *arguments: None)

    def run(name="run", *flags, steps=4):
        base, data = material
        chosen = ["--base", str(base), "--data.source", str(data), "--loop.num-steps", str(steps)]
        train_lora.main([*chosen, "--loop.run-dir", str(tmp_path / name), *FLAGS, *flags])
        return tmp_path / name

    return run


def test_a_run_learns_and_its_file_loads_everywhere(train, material):
    run = train("run", "--optim.lr", "1e-2", "--lora.text-encoder", "True", "--layout", "kohya", steps=30)
    losses = [row["loss"] for row in rows(run)]
    assert np.mean(losses[-8:]) < np.mean(losses[:8])
    norms = [row["unet_update"] for row in rows(run)]
    assert norms[0] < norms[-1] and rows(run)[-1]["text_encoder_update"] > 0
    assert {"loss"} <= set(rows(run, "val")[-1])
    assert (run / "samples" / "before_after_00000030.png").is_file()
    pipeline = StableDiffusionPipeline.from_pretrained(material[0])
    pipeline.load_lora_weights(run / "latest")
    assert {n.partition(".")[0] for n in load_file(run / "latest" / WEIGHTS_FILE)} == {"unet", "text_encoder"}
    kohya = read_lora(run / "latest" / "lora_kohya.safetensors")
    assert kohya.layout == "kohya" and kohya.num_parameters == read_lora(run).num_parameters
    config = json.loads((run / "latest" / "config.json").read_text())
    assert config["kind"] == "lora" and config["base_licence"] == "mit" and config["model"]["rank"] == 8
    assert config["images_seen"] == 30 * 4 and 0 < config["training_hours"] < 1


def test_a_killed_run_goes_on_exactly(train):
    whole = train("whole", steps=6)
    train("cut", "--loop.save-every", "2", steps=6)
    cut = train("cut2", "--loop.save-every", "2", steps=4)
    (cut / "latest").unlink()
    train("cut2", steps=6)
    for name in ("whole", "cut", "cut2"):
        weights = load_file(whole.parent / name / "step_00000006" / WEIGHTS_FILE)
        for key, tensor in load_file(whole / "step_00000006" / WEIGHTS_FILE).items():
            assert torch.equal(weights[key], tensor), (name, key)
    losses = {row["step"]: row["loss"] for row in rows(cut)}
    assert [losses[s] for s in range(1, 7)] == [row["loss"] for row in rows(whole)]


def test_micro_batches_and_checkpointing_give_the_same_step(train):
    plain = [row["loss"] for row in rows(train("a", "--lora.dropout", "0"))]
    for name, flags in {
        "split": ["--loop.micro-batch-size", "1"],
        "checkpointed": ["--gradient-checkpointing", "True"],
        "cached": ["--data.cache-latents", "True"],
    }.items():
        losses = [row["loss"] for row in rows(train(name, "--lora.dropout", "0", *flags))]
        assert losses == pytest.approx(plain, rel=2e-3 if name == "cached" else 1e-4), name


def test_the_published_learning_rate_is_warned_of_and_learns_nothing(train, capsys):
    small = rows(train("small", "--optim.lr", "1e-7"))[-1]["unet_update"]
    assert "a LoRA learns next to nothing" in capsys.readouterr().out
    usual = rows(train("usual"))[-1]["unet_update"]
    assert "a LoRA learns next to nothing" not in capsys.readouterr().out
    assert small < usual / 500


def test_prior_images_are_made_once_and_trained_on(train, tmp_path):
    prior = ["--prior.text", "鞋", "--prior.count", "3", "--prior.images", str(tmp_path / "prior")]
    flags = [*prior, "--data.enlarge", "True"]
    run = train("run", *flags)
    assert all(row["loss"] > row["prior_loss"] > 0 for row in rows(run))
    images = sorted((tmp_path / "prior").iterdir())
    before = [np.asarray(Image.open(path)).astype(int) for path in images]
    images[1].unlink()
    again = train("again", *flags)
    for path, pixels in zip(images, before, strict=True):  # alone or in a batch: up to rounding
        assert np.abs(np.asarray(Image.open(path)).astype(int) - pixels).max() <= 1
    assert [r["loss"] for r in rows(again)] == pytest.approx([r["loss"] for r in rows(run)], rel=1e-3)


def test_fp16_scales_its_loss(train):
    run = train("half", "--precision", "fp16", "--base-bits", "16", "--optim.lr", "1e-3")
    assert all(np.isfinite(row["loss"]) for row in rows(run)) and rows(run)[-1]["unet_update"] > 0
    assert rows(run)[0]["loss_scale"] > 1


def test_nan_is_refused_and_the_checkpoint_stands(train, monkeypatch, capsys):
    run = train("run", "--loop.save-every", "2", steps=2)
    plain = train_lora.LoraMethod.metrics
    monkeypatch.setattr(
        "diffusion.tuning.task.step_loss", lambda *a: torch.tensor(float("nan"), requires_grad=True)
    )
    with pytest.raises(SystemExit) as stop:
        train("run", "--loop.save-every", "2", steps=4)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "is not finite at step 2" in said and "step_00000002 is whole" in said
    assert [d.name for d in step_directories(run)] == ["step_00000002"] and plain


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--base-bits", "4"], "a base of 4 bits needs computation in 16"),
        (["--data.buckets.resolutions", "40", "--data.buckets.step", "20"], "multiples of 8, not 20"),
        (["--prior.text", "x"], "prior images are squares"),
        (["--lora.targets", "to_w"], "the unet has no module 'to_w'"),
        (["--deepspeed.zero-stage", "3"], "zero_stage 3 shards weights"),
        (["--optim.name", "muon"], "optim.name must be adamw here"),
        (["--data.source", "nowhere"], "nowhere"),
    ],
)
def test_bad_input(train, capsys, flags, sentence):
    with pytest.raises(SystemExit) as stop:
        train("bad", *flags)
    assert stop.value.code == 2 and sentence in capsys.readouterr().err


def test_captions_that_are_missing(train, material, tmp_path, capsys):
    data = write_images(tmp_path / "data", 9)
    (data / "captions" / "03.txt").unlink()
    (data / "captions" / "05.txt").write_text(" \n")
    with pytest.raises(SystemExit):
        train("a", "--data.source", str(data))
    assert "2 of 9 images" in capsys.readouterr().err
    train("b", "--data.source", str(data), "--data.missing-captions", "skip", steps=1)
    assert "have no caption, the first is images/03.png: left out" in capsys.readouterr().out


def test_small_images_are_counted(train, tmp_path, capsys):
    data = write_images(tmp_path / "data", 9, sizes=((40, 40), (24, 24)))
    train("a", "--data.source", str(data), "--data.enlarge", "True", steps=1)
    assert "of 8 images are smaller than 48 pixels and are enlarged" in capsys.readouterr().out
    train("b", "--data.source", str(data), steps=1)
    assert "smaller than 48 are not enlarged" in capsys.readouterr().out


def test_another_adapter_in_the_run_directory(train, capsys):
    train("run", steps=2)
    with pytest.raises(SystemExit):
        train("run", "--lora.rank", "4", steps=4)
    assert "trains other weights" in capsys.readouterr().err


def test_a_base_of_few_bits_needs_a_package(monkeypatch):
    unet = torch.nn.Sequential(torch.nn.Linear(64, 64))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"of 4 bits cannot be computed here: bitsandbytes is not installed"):
        quantize_base_(unet, 4, "fp16")


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_a_quantised_base_is_near_the_whole_one_and_trains(bits):
    if bits < 16:
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    torch.manual_seed(0)
    sizes = {"block_out_channels": (64, 128), "cross_attention_dim": 64, "attention_head_dim": 4}
    blocks = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "layers_per_block": 1}
    blocks |= {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
    unet = UNet2DConditionModel(sample_size=8, **sizes, **blocks)
    inputs = (torch.randn(2, 4, 8, 8), torch.tensor([10, 500]), torch.randn(2, 6, 64))
    with torch.no_grad():
        whole = unet(*inputs).sample
    said = quantize_base_(unet, bits, "fp16")
    assert "float16" in said
    parameters = add_adapter(unet, LoraOptions(dropout=0.0), "unet")
    with torch.autocast("cpu", torch.float16):
        found = unet(*inputs).sample
    assert (found.float() - whole).norm() < {16: 0.01, 8: 0.05, 4: 0.2}[bits] * whole.norm()
    found.float().square().mean().backward()
    assert all(p.dtype == torch.float32 for p in parameters)
    assert sum(float(p.grad.norm()) for p in parameters) > 0 and base_norm(unet) > 0
