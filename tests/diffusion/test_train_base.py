"""Whole trainings of a tiny base through `main`: what is written, exact resume, and every clear refusal."""

import json
import multiprocessing
import os
import socket
import time
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from tiny_shards import write_image_shards, write_vocab

from common.files import read_json
from diffusion import train_base
from diffusion.base import load_base
from diffusion.objective import NoiseSchedule
from diffusion.scratch.networks import AutoencoderConfig, TextConfig, UnetConfig

# Not forked from this process: where autograd has run in a test before, a forked child cannot run it again.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["diffusion.train_base"])


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """images/ and vocab/."""
    folder = tmp_path_factory.mktemp("made")
    write_image_shards(folder / "images")
    write_vocab(folder / "vocab")
    return folder


def flags(made: Path, run_dir: Path, *more: str, steps: int = 6) -> list[str]:
    return [
        *("--data", str(made / "images"), "--text.vocab", str(made / "vocab")),
        *("--autoencoder.image-size", "16", "--autoencoder.channels", "8", "16"),
        *("--autoencoder.norm-groups", "4", "--autoencoder.latent-channels", "2"),
        *("--text.dim", "16", "--text.num-layers", "1", "--text.num-heads", "2", "--text.text-len", "12"),
        *("--unet.channels", "8", "16", "--unet.attention", "False", "True", "--unet.head-dim", "8"),
        *("--unet.norm-groups", "4", "--stage-a.small-crop", "8", "--stage-a.num-steps", str(steps)),
        *("--stage-a.global-batch-size", "8", "--stage-a.val-images", "8", "--stage-b.views", "2"),
        *("--stage-a.optim.warmup-steps", "2", "--optim.warmup-steps", "2", "--caption-dropout", "0.3"),
        *("--loop.run-dir", str(run_dir), "--loop.num-steps", str(steps), "--loop.global-batch-size", "8"),
        *(
            "--loop.log-every",
            "1",
            "--loop.save-every",
            "2",
            "--loop.eval-every",
            "3",
            "--loop.sample-every",
            "0",
        ),
        *("--loop.keep-last", "0", "--loop.tensorboard", "False", "--num-workers", "0", "--device", "cpu"),
        *("--precision", "fp32", "--sample-images", "2", "--val-samples", "8", *more),
    ]


@pytest.fixture(scope="module")
def whole(made, tmp_path_factory) -> Path:
    """A run that nothing interrupts."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    train_base.main(flags(made, run_dir))
    return run_dir


def trace(run_dir: Path) -> list[list[float]]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [[row["step"], row["loss"], row["grad_norm"]] for row in rows if row["kind"] == "train"]


def traces(run_dir: Path) -> list[list[list[float]]]:
    return [trace(run_dir / "autoencoder"), trace(run_dir)]


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    files = sorted((run_dir / "latest").glob("*/*.safetensors"))
    return {f"{f.parent.name}.{n}": t for f in files for n, t in load_file(f).items()}


def assert_same_weights(a: Path, b: Path) -> None:
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_plain_diffusers_loads_and_runs_what_was_trained(whole):
    pipeline = StableDiffusionPipeline.from_pretrained(whole / "latest")
    assert type(pipeline.text_encoder).__name__ == "BertModel"
    assert pipeline.tokenizer.model_max_length == 12
    images = pipeline("一个红色的杯子", num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 16, 16, 3)
    assert images.std() > 0


def test_a_checkpoint_records_what_it_took(whole):
    config = read_json(whole / "latest" / "config.json")
    assert (config["kind"], config["step"], config["images_seen"]) == ("diffusion", 6, 48)
    base = load_base(whole)
    assert config["parameters"]["unet"] == sum(p.numel() for p in base.unet.parameters())
    assert 0 < config["training_hours"] < 1
    assert base.text_len == 12
    schedule = NoiseSchedule.from_scheduler(base.scheduler)
    assert (schedule.prediction, float(schedule.alphas_cumprod[-1])) == ("v_prediction", 0.0)
    assert (whole / "samples" / "samples_00000006.png").is_file()
    with Image.open(whole / "autoencoder" / "samples" / "reconstructions_00000006.png") as grid:
        assert grid.size == (8 * 18 - 2, 2 * 18 - 2)


def test_losses_of_both_stages_are_logged(whole):
    for rows in traces(whole):
        assert [row[0] for row in rows] == [1, 2, 3, 4, 5, 6]
    val = [json.loads(x) for x in (whole / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert {"loss", "text_gain"} <= next(row.keys() for row in val if row["kind"] == "val")
    val = [json.loads(x) for x in (whole / "autoencoder" / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert {"psnr", "color_slope", "rec_loss", "kl"} <= next(
        row.keys() for row in val if row["kind"] == "val"
    )


@pytest.mark.parametrize("stage", [pytest.param("autoencoder", marks=pytest.mark.slow), "."])
def test_killed_at_any_step_a_run_goes_on_with_the_same_losses(stage, made, whole, tmp_path):
    """kill -9 once the stage has a checkpoint: the last steps of the first run come again."""
    run_dir = tmp_path / "run"
    process = CONTEXT.Process(target=train_base.main, args=(flags(made, run_dir),))
    process.start()
    while not list((run_dir / stage).glob("step_00000002/config.json")):
        assert process.is_alive()
        time.sleep(0.005)
    process.kill()
    process.join()
    train_base.main(flags(made, run_dir))
    assert traces(run_dir) == traces(whole)
    assert_same_weights(run_dir, whole)


def test_accumulation_gives_the_same_losses(made, whole, tmp_path):
    train_base.main(flags(made, tmp_path / "run", "--loop.micro-batch-size", "2"))
    for row, other in zip(trace(tmp_path / "run"), trace(whole), strict=True):
        assert row == pytest.approx(other, rel=1e-4)


def _process(launcher: str, rank: int, port: int, argv: list[str]) -> None:
    """What a launcher tells its processes; forked from a server that has imported everything."""
    world = {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
    torchrun = {"TORCHELASTIC_RUN_ID": "test", "LOCAL_WORLD_SIZE": "2"}
    deepspeed = {"CROSS_RANK": "0", "CROSS_SIZE": "1", "LOCAL_SIZE": "2", "DS_ACCELERATOR": "cpu"}
    os.environ.update(
        world | {"MASTER_PORT": str(port)} | (torchrun if launcher == "torchrun" else deepspeed)
    )
    train_base.main(argv)


@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("deepspeed", marks=pytest.mark.slow)])
def test_two_processes_give_the_losses_of_one(launcher, made, whole, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    argv = flags(made, tmp_path / "run")
    processes = [CONTEXT.Process(target=_process, args=(launcher, rank, port, argv)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(600)
    assert [process.exitcode for process in processes] == [0, 0]
    for rows, others in zip(traces(tmp_path / "run"), traces(whole), strict=True):
        for row, other in zip(rows, others, strict=True):
            assert row == pytest.approx(other, rel=1e-3)


def refused(capsys, argv: list[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        train_base.main(argv)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_other_sizes_than_the_run_has_are_refused(made, whole, capsys):
    assert "holds a model with latent_channels 2, not 4" in refused(
        capsys, flags(made, whole, "--autoencoder.latent-channels", "4", steps=8)
    )
    assert "holds a model with unet" in refused(capsys, flags(made, whole, "--unet.num-blocks", "2", steps=8))
    assert "was trained with a moving average" in refused(
        capsys, flags(made, whole, "--ema-decay", "0", steps=8)
    )


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (("--prediction", "epsilon"), "zero_snr needs v_prediction"),
        (("--autoencoder.norm-groups", "3"), "norm_groups 3 must divide every width"),
        (("--autoencoder.image-size", "17"), "image_size must be a multiple of 2"),
        (("--unet.head-dim", "5"), "head_dim 5 must divide every width"),
        (("--unet.attention", "True"), "attention must name each of the 2 widths"),
        (("--text.vocab", "nowhere"), "no vocabulary folder nowhere"),
        (("--text.vocab", ""), "no vocabulary: name the folder"),
        (("--caption-dropout", "1"), "caption_dropout must lie in [0, 1)"),
        (("--data", "nowhere"), "no data folder nowhere"),
    ],
)
def test_bad_options_end_in_one_sentence(more, sentence, made, tmp_path, capsys):
    assert sentence in refused(capsys, flags(made, tmp_path / "run", *more))
    assert not list(tmp_path.rglob("step_*"))


def test_sizes_of_the_networks_are_those_of_the_options():
    vae = AutoencoderConfig(image_size=64, channels=(16, 32, 48), norm_groups=8, latent_channels=6).build()
    latents = vae.encode(torch.zeros(1, 3, 64, 64)).latent_dist.mean
    assert latents.shape == (1, 6, 16, 16)
    config = AutoencoderConfig(image_size=64, channels=(16, 32, 48), norm_groups=8, latent_channels=6)
    unet = UnetConfig((64, 128), attention=(False, True), head_dim=32).build(config, 32)
    assert unet.down_blocks[1].attentions[0].transformer_blocks[0].attn1.heads == 4
    assert unet.config.sample_size == 16
    with pytest.raises(ValueError, match="cannot be halved 5 times"):
        UnetConfig((32,) * 6, attention=(False,) * 6, head_dim=32).build(config, 32)
    with pytest.raises(ValueError, match="num_heads 3 must divide the width 256"):
        TextConfig(num_heads=3)
