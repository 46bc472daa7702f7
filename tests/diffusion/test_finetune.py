"""Whole runs of diffusion.finetune on a tiny random base: shards, TSV files, folders, resume, two processes."""

import base64
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from tiny_tuning import COLORS, FLAGS, rows, write_base, write_images

import common.config
from data_tools.shard import ShardConfig, shard
from diffusion import finetune
from diffusion.base import load_base
from diffusion.tuning.data import TuneData
from diffusion.tuning.distance import kernel_distance
from diffusion.tuning.options import DataOptions

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("material")
    return write_base(folder / "base"), write_images(folder / "data")


@pytest.fixture
def train(tmp_path, material, monkeypatch):
    monkeypatch.setattr("diffusion.tuning.run.require_memory", lambda *arguments: None)
    monkeypatch.chdir(tmp_path)

    def run(name="run", *flags, steps=4):
        base, data = material
        chosen = ["--base", str(base), "--data.source", str(data), "--loop.num-steps", str(steps)]
        chosen += ["--loop.global-batch-size", "4", "--loop.run-dir", str(tmp_path / name)]
        finetune.main([*chosen, *FLAGS, *flags])
        return tmp_path / name

    return run


def test_a_run_learns_and_its_folder_is_an_ordinary_pipeline(train, material):
    run = train("run", "--optim.lr", "3e-3", "--ema-decay", "0.9", steps=30)
    losses = [row["loss"] for row in rows(run)]
    assert np.mean(losses[-8:]) < 0.95 * np.mean(losses[:8])
    pipeline = StableDiffusionPipeline.from_pretrained(run / "latest")
    before = load_file(material[0] / UNET)
    assert any(not torch.equal(before[n], t) for n, t in pipeline.unet.state_dict().items())
    for part, weights in (("vae", "diffusion_pytorch_model"), ("text_encoder", "model")):
        old, new = (load_file(f / part / f"{weights}.safetensors") for f in (material[0], run / "latest"))
        assert all(torch.equal(old[n], new[n]) for n in old)
    assert (run / "samples" / "samples_00000030.png").is_file()
    assert load_base(run).text_len == 12
    config = json.loads((run / "latest" / "config.json").read_text())
    assert config["images_seen"] == 30 * 4 and 0 < config["training_hours"] < 1
    assert config["base_costs"] == {}, "the base of this test records nothing"
    assert json.loads((run / "latest" / "config.json").read_text())["kind"] == "diffusion"


def test_a_killed_run_goes_on_exactly(train):
    whole = train("whole", "--ema-decay", "0.9", steps=5)
    train("cut", "--ema-decay", "0.9", "--loop.save-every", "2", steps=5)
    run = train("cut2", "--ema-decay", "0.9", steps=2)
    expected = load_file(whole / "step_00000005" / UNET)
    for directory in (whole.parent / "cut" / "step_00000005",):
        found = load_file(directory / UNET)
        assert all(torch.equal(found[n], t) for n, t in expected.items())
    train("cut2", "--ema-decay", "0.9", steps=5)
    found = load_file(run / "step_00000005" / UNET)
    assert all(torch.equal(found[n], t) for n, t in expected.items())


def write_tsv(folder, material):
    folder.mkdir()
    for split, numbers in (("train", range(12)), ("val", range(12, 16))):
        images, texts = [], []
        for i in numbers:
            data = (material[1] / "images" / f"{i:02d}.png").read_bytes()
            images.append(f"{i:032x}\t{base64.urlsafe_b64encode(data).decode()}")
            texts.append(f"{i:032x}\t{list(COLORS)[i % 4]}")
        (folder / f"T2I_{split}.img.tsv").write_text("\n".join(images) + "\n")
        (folder / f"T2I_{split}.text.tsv").write_text("\n".join(texts) + "\n", "utf-8")
    return folder


def test_ecommerce_t2i_is_packed_once_and_buckets_see_its_sizes(train, material, tmp_path, capsys):
    source = write_tsv(tmp_path / "t2i", material)
    flags = ["--data.source", str(source), "--epochs", "2", "--loop.global-batch-size", "3"]
    train("run", *flags)
    said = capsys.readouterr().out
    assert "12 training and 4 validation images" in said and "8 steps of 3: 2.0 passes" in said
    assert "32x64 4" in said and "64x32 4" in said
    assert sorted(p.name for p in (tmp_path / "data" / "t2i_shards").glob("*.tar")) == [
        "train-00000.tar",
        "val-00000.tar",
    ]
    train("again", *flags)


def test_shards_augmented_texts_and_cached_latents(train, material, tmp_path):
    shard(ShardConfig(material[1], str(tmp_path / "shards"), val_share=0.3, workers=0))
    flags = ["--data.source", str(tmp_path / "shards"), "--data.text-augment.synonyms", "0.5"]
    flags += ["--data.enlarge", "True"]
    plain = train("plain", *flags, "--data.crops.flip", "True", "--data.move.shift", "0.1", steps=2)
    assert len(rows(plain)) == 2
    run = train("cached", *flags, "--data.cache-latents", "True", steps=2)
    folders = list((run / "latents").iterdir())
    train("cached", *flags, "--data.cache-latents", "True", steps=3)
    assert list((run / "latents").iterdir()) == folders
    train("cached", *flags, "--data.cache-latents", "True", "--data.buckets.resolutions", "32", steps=4)
    assert len(list((run / "latents").iterdir())) == 2  # other sizes never meet old latents


def test_the_text_encoder_can_be_trained(train, material):
    run = train("run", "--train-text-encoder", "True", "--gradient-checkpointing", "True", steps=2)
    old, new = (load_file(f / "text_encoder" / "model.safetensors") for f in (material[0], run / "latest"))
    changed = {n for n in old if not torch.equal(old[n], new[n])}
    assert any(".query.weight" in n for n in changed) and not any(n.startswith("pooler") for n in changed)


def test_several_resolutions_in_one_run(train, material):
    run = train("run", "--data.buckets.resolutions", "32", "48", "--loop.log-keys", "True", steps=8)
    assert len(rows(run)) == 8


def test_the_distance_is_measured_every_so_many_steps(train, monkeypatch):
    monkeypatch.setattr("diffusion.tuning.task.image_distance", lambda *arguments: 0.5)
    flags = ["--loop.eval-every", "1", "--distance-every", "2"]
    run = train("run", *flags)
    assert [row.get("kid") for row in rows(run, "val")] == [None, 0.5, None, 0.5]


def test_the_kernel_distance_by_hand():
    a, b = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 1.0], [1.0, 1.0]])
    within_a, within_b = 1.0, 2.0**3  # (0 / 2 + 1)^3, (2 / 2 + 1)^3
    across = 1.5**3
    assert kernel_distance(a, b) == pytest.approx(within_a + within_b - 2 * across)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(300, 8, generator=generator), torch.randn(300, 8, generator=generator)
    assert abs(kernel_distance(x, y)) < 0.05 < kernel_distance(x, y + 1)
    with pytest.raises(ValueError, match="needs two images of each"):
        kernel_distance(a[:1], b)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--data.source", ""], "name the training images with --data.source"),
        (["--base", "nowhere"], "no base model nowhere"),
        (["--distance-every", "3", "--loop.eval-every", "2"], "must be a multiple of loop.eval_every"),
        (["--ema-decay", "0.9", "--deepspeed.zero-stage", "3"], "needs whole weights"),
        (["--data.crops.flip", "True"], "need enlarge"),
        (["--data.cache-latents", "True", "--data.move.shift", "0.1"], "keeps one view an image"),
        (["--data.buckets.resolutions", "48", "40"], "multiples of the step"),
    ],
)
def test_bad_input(train, capsys, flags, sentence):
    with pytest.raises(SystemExit) as stop:
        train("bad", *flags)
    assert stop.value.code == 2 and sentence in capsys.readouterr().err


def test_too_little_memory_is_said_before_the_first_step(material, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("diffusion.tuning.memory.free_memory", lambda device: 1000.0)
    base, data = material
    flags = ["--base", str(base), "--data.source", str(data), "--loop.run-dir", str(tmp_path / "run"), *FLAGS]
    with pytest.raises(SystemExit):
        finetune.main([*flags, "--loop.num-steps", "1"])
    assert "beside the weights and 0.00 GiB are free" in capsys.readouterr().err
    finetune.main([*flags, "--loop.num-steps", "1", "--ignore-memory", "True"])
    assert "memory: a step needs about" in capsys.readouterr().out


def test_a_folder_needs_two_images(material, tmp_path, start=None):
    from common.distributed import start_world

    data = write_images(tmp_path / "one", 1)
    with pytest.raises(ValueError, match="at least two are needed"):
        TuneData.open(DataOptions(str(data)), tmp_path / "run", start_world("cpu"))


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_two_processes_follow_one(train, material, tmp_path, launcher):
    one = train("one", "--loop.global-batch-size", "4")
    base, data = material
    flags = ["--base", str(base), "--data.source", str(data), "--loop.num-steps", "4", *FLAGS]
    flags += [
        "--loop.global-batch-size",
        "4",
        "--loop.run-dir",
        str(tmp_path / "two"),
        "--ignore-memory",
        "True",
    ]
    launchers = {
        "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"],
        "deepspeed": ["deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", "29671", "--module"],
    }
    root = Path(common.config.__file__).parent.parent
    paths = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), "PATH": paths}
    command = [sys.executable, "-m", *launchers[launcher], "diffusion.finetune", *flags]
    environment |= {"DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    losses = [row["loss"] for row in rows(tmp_path / "two")]
    assert losses == pytest.approx([row["loss"] for row in rows(one)], rel=1e-3)
    a, b = (load_file(run / "step_00000004" / UNET) for run in (one, tmp_path / "two"))
    for name, tensor in a.items():
        torch.testing.assert_close(b[name], tensor, atol=1e-4, rtol=1e-2)
