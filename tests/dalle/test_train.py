"""Whole trainings of a tiny generator through `main`: what is written, exact resume, and every clear refusal."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_data import some_image, write_image_shards, write_image_tokenizer, write_token_shards

import train_dalle
from common.checkpoint import read_weights
from common.config import from_mapping, read_mapping
from common.distributed import start_world
from dalle.pipeline import TextToImage
from dalle.training.data import TrainData
from dalle.training.options import Options
from data_tools.ingest.records import Record
from data_tools.shards.captions import CaptionChoice
from data_tools.shards.image_shards import ShardWriter
from data_tools.shards.index import ShardIndex
from data_tools.shards.loader import DecodeImage
from vq.model import ImageTokenizer

ROOT = Path(train_dalle.__file__).parent


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """images/, tokenizer/, other/ (another tokenizer), tokens/"""
    folder = tmp_path_factory.mktemp("made")
    write_image_shards(folder / "images")
    write_image_tokenizer(folder / "tokenizer")
    write_image_tokenizer(folder / "other", seed=1)
    write_token_shards(folder / "tokens", folder / "images", folder / "tokenizer")
    return folder


def flags(made: Path, run_dir: Path, *more: str, data: str = "tokens", steps: int = 8) -> list[str]:
    """Dropout everywhere, so that a resume must restore every source of chance."""
    return [
        *("--data", str(made / data), "--image-tokenizer", str(made / "tokenizer")),
        *("--loop.run-dir", str(run_dir), "--loop.num-steps", str(steps), "--loop.global-batch-size", "8"),
        *(
            "--loop.log-every",
            "1",
            "--loop.save-every",
            "3",
            "--loop.eval-every",
            "4",
            "--loop.sample-every",
            "0",
        ),
        *("--loop.keep-last", "0", "--loop.tensorboard", "False", "--num-workers", "0", "--device", "cpu"),
        *("--model.dim", "16", "--model.num-layers", "2", "--model.num-heads", "2", "--model.dropout", "0.1"),
        *("--model.stochastic-depth", "0.2", "--model.token-dropout", "0.1", "--caption-dropout", "0.3"),
        *("--optim.warmup-steps", "2", "--sample-images", "0", *more),
    ]


@pytest.fixture(scope="module")
def whole(made, tmp_path_factory) -> Path:
    """A run that nothing interrupts, with its sample grid."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    train_dalle.main(flags(made, run_dir, "--sample-images", "1", "--sample-texts", "一个红色的圆盘"))
    return run_dir


def assert_same_weights(a: Path, b: Path) -> None:
    first, second = read_weights(a / "latest"), read_weights(b / "latest")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[n], second[n]) for n in first)


def metrics(run_dir: Path, kind: str = "train") -> list[dict]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [row for row in rows if row["kind"] == kind]


def test_a_run_leaves_a_checkpoint_that_draws(whole):
    directory = whole / "latest"
    names = {p.name for p in directory.iterdir()}
    assert {"config.json", "model.safetensors", "image_tokenizer", "sentencepiece.model"} <= names
    assert {"train_config.json", "training_state"} <= names
    shutil.copytree(directory, whole.parent / "elsewhere", symlinks=False)
    images = TextToImage.from_pretrained(whole.parent / "elsewhere", device="cpu")("一个红色的圆盘", 2)
    assert [p.size for p in images] == [(16, 16)] * 2
    assert (whole / "samples" / "samples_00000008.png").is_file()


def test_what_is_logged(whole):
    row = metrics(whole)[-1]
    wanted = {"loss", "text_loss", "image_loss", "image_bits", "grad_norm", "lr", "tokens_per_second", "mfu"}
    assert wanted <= row.keys()
    last = metrics(whole, "val")[-1]
    assert {
        "image_loss",
        "text_loss",
        "text_gain_bits",
        "image_bits_quarter_1",
        "image_bits_quarter_4",
    } <= last.keys()
    curve = json.loads((whole / "position_loss" / "step_00000008.json").read_text())["bits"]
    assert len(curve) == 16 and np.mean(curve) == pytest.approx(last["image_bits"], abs=1e-3)


def test_losses_fall(made, tmp_path):
    more = (
        "--model.dim",
        "32",
        "--optim.lr",
        "1e-2",
        "--model.dropout",
        "0.0",
        "--model.token-dropout",
        "0.0",
    )
    train_dalle.main(
        flags(made, tmp_path / "run", *more, "--ema-decay", "0.5", "--loop.save-every", "0", steps=40)
    )
    rows = metrics(tmp_path / "run")
    assert rows[-1]["image_loss"] < rows[0]["image_loss"] - 0.3
    assert rows[-1]["text_loss"] < rows[0]["text_loss"] - 0.5


def start(arguments: list[str]) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "train_dalle.py"), *arguments]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_killed_and_resumed_is_the_uninterrupted_run_bit_for_bit(made, whole, tmp_path):
    arguments = flags(made, tmp_path / "run")
    process = start(arguments)
    log = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (log.is_file() and '"step": 4' in log.read_text("utf-8")):
        assert process.poll() is None and time.monotonic() < deadline, process.stdout.read()
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    train_dalle.main(arguments)
    assert_same_weights(tmp_path / "run", whole)
    assert [r["step"] for r in metrics(tmp_path / "run")] == list(range(1, 9))
    for mine, theirs in zip(metrics(tmp_path / "run"), metrics(whole), strict=True):
        assert mine["loss"] == theirs["loss"]


def test_accumulation_gives_the_same_losses(made, whole, tmp_path):
    """Without dropout, whose draws depend on the shapes."""
    plain = ("--model.dropout", "0.0", "--model.stochastic-depth", "0.0", "--model.token-dropout", "0.0")
    common = (*plain, "--precision", "fp32", "--loop.save-every", "0")
    train_dalle.main(flags(made, tmp_path / "one", *common, steps=4))
    train_dalle.main(flags(made, tmp_path / "four", *common, "--loop.micro-batch-size", "2", steps=4))
    for one, four in zip(metrics(tmp_path / "one"), metrics(tmp_path / "four"), strict=True):
        for name in ("loss", "text_loss", "image_loss", "grad_norm"):
            assert one[name] == pytest.approx(four[name], rel=1e-4)


@pytest.mark.slow
def test_compiled_training_gives_the_plain_losses(made, tmp_path):
    if not shutil.which("g++"):
        pytest.skip("torch.compile on a CPU needs g++")
    calm = ("--model.dropout", "0", "--model.stochastic-depth", "0", "--model.token-dropout", "0")
    calm += ("--precision", "fp32", "--caption-dropout", "0")
    for name, more in (("plain", ()), ("compiled", ("--compile",))):
        train_dalle.main(flags(made, tmp_path / name, *calm, *more, steps=3))
    plain, compiled = ([row["loss"] for row in metrics(tmp_path / name)] for name in ("plain", "compiled"))
    assert compiled == pytest.approx(plain, rel=1e-4)


def test_images_encoded_on_the_fly(made, tmp_path):
    more = ("--augment.min-scale", "1.0", "--augment.flip", "False", "--loop.save-every", "0")
    train_dalle.main(flags(made, tmp_path / "run", *more, data="images", steps=2))
    train_dalle.main(flags(made, tmp_path / "tokens", "--loop.save-every", "0", steps=2))
    on_the_fly, stored = metrics(tmp_path / "run", "val")[-1], metrics(tmp_path / "tokens", "val")[-1]
    assert on_the_fly["image_bits"] == pytest.approx(stored["image_bits"], abs=0.05)


def test_options_matter(made, whole, tmp_path):
    changes = {
        "caption": ("--caption-dropout", "0.9"),
        "text": ("--loss.text-weight", "3"),
        "smooth": ("--loss.label-smoothing", "0.2"),
        "ema": ("--ema-decay", "0.2"),
        "len": ("--max-text-len", "5"),
    }
    for name, change in changes.items():
        train_dalle.main(flags(made, tmp_path / name, *change, steps=3))
        before, after = read_weights(whole / "step_00000003"), read_weights(tmp_path / name / "latest")
        assert any(not torch.equal(before[n], after[n]) for n in before), name


def test_short_captions_mix(made):
    """Two captions an image: any of them, or the short one only, as the share says."""
    with ShardWriter(made / "long", "train") as writer:
        for i in range(40):
            writer.write(Record(f"{i:06d}", some_image(i), "png", ("一个很长的描述", "短"), {}, "test"))
    index, shares = ShardIndex.open(made / "long"), {}
    for share in (0.0, 0.5, 1.0):
        decode = DecodeImage(16, captions=CaptionChoice(share))
        texts = [decode(index, i % 40, np.random.default_rng(i))["text"] for i in range(400)]
        shares[share] = texts.count("短") / 400
    assert shares == pytest.approx({0.0: 0.5, 0.5: 0.75, 1.0: 1.0}, abs=0.08)
    data = TrainData(index, index, False, ImageTokenizer.from_pretrained(made / "tokenizer"), made, None)
    batches = data.train_batches(Options(short_caption_share=1.0, num_workers=0), 8, start_world("cpu"), 0)
    assert set(next(batches)["text"]) == {"短"}


def test_a_run_says_that_its_data_changed(made, whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "run")
    shutil.copytree(made / "tokens", tmp_path / "tokens")
    (tmp_path / "tokens" / "train-00002.tar").unlink()
    train_dalle.main([*flags(made, tmp_path / "run", steps=9), "--data", str(tmp_path / "tokens")])
    assert "the samples of the data are 32, and were 48 before" in capsys.readouterr().out


def test_no_text_loss(made, tmp_path):
    train_dalle.main(flags(made, tmp_path / "run", "--loss.text-weight", "0", steps=2))
    assert "text_loss" not in metrics(tmp_path / "run", "val")[-1]
    assert not any(name.startswith("text_out") for name in read_weights(tmp_path / "run" / "latest"))


def refusal(capsys, arguments: list[str]) -> str:
    """The one sentence that a wrong command ends with."""
    with pytest.raises(SystemExit) as ended:
        train_dalle.main(arguments)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


def test_token_shards_of_another_tokenizer(made, tmp_path, capsys):
    arguments = flags(made, tmp_path / "run")
    arguments[arguments.index("--image-tokenizer") + 1] = str(made / "other")
    assert "made by the tokenizer" in refusal(capsys, arguments)


def test_a_run_keeps_its_tokenizer_and_its_sizes(made, whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "run", symlinks=True)
    arguments = flags(made, tmp_path / "run", steps=9)
    arguments[arguments.index("--image-tokenizer") + 1] = str(made / "other")
    assert "was started with the image tokenizer" in refusal(capsys, arguments)
    assert "dim 16, not 32" in refusal(capsys, flags(made, tmp_path / "run", "--model.dim", "32", steps=9))
    assert_same_weights(tmp_path / "run", whole)


def test_missing_and_empty_data(made, tmp_path, capsys):
    (made / "nothing").mkdir(exist_ok=True)
    assert "there is no file or folder" in refusal(capsys, flags(made, tmp_path / "a", data="missing"))
    assert "an empty folder" in refusal(capsys, flags(made, tmp_path / "b", data="nothing"))


def test_no_image_tokenizer_names_the_command(made, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = flags(made, tmp_path / "run")
    i = arguments.index("--image-tokenizer")
    assert "python train_vqgan.py" in refusal(capsys, arguments[:i] + arguments[i + 2 :])


@pytest.mark.parametrize(
    "change, said",
    [
        (("--image-tokenizer", "nowhere"), "no checkpoint directory nowhere"),
        (("--text-tokenizer", "/nowhere"), "no text tokenizer folder /nowhere"),
        (("--loop.micro-batch-size", "3"), "choose micro_batch_size among the divisors of 8"),
        (("--caption-dropout", "1.5"), "caption_dropout must lie in [0, 1), not 1.5"),
        (("--model.num-heads", "3"), "dim 16 does not divide over 3 heads"),
        (("--config", "nowhere.yaml"), "no config file nowhere.yaml"),
        (("--sample-texts", "龘龘", "--sample-images", "1"), "knows nothing of the caption"),
        (("--modle.dim", "16"), "--modle.dim"),
    ],
)
def test_bad_input_is_one_sentence(change, said, made, tmp_path, capsys):
    assert said in refusal(capsys, [*flags(made, tmp_path / "run"), *change])


def test_the_newest_tokenizer_of_stage_one_is_the_default(made, tmp_path, monkeypatch):
    shutil.copytree(made / "tokenizer", tmp_path / "runs" / "vqgan" / "step_00000001")
    (tmp_path / "runs" / "vqgan" / "latest").symlink_to("step_00000001")
    monkeypatch.chdir(tmp_path)
    arguments = flags(made, tmp_path / "run", steps=1)
    i = arguments.index("--image-tokenizer")
    train_dalle.main(arguments[:i] + arguments[i + 2 :])
    assert (tmp_path / "run" / "latest" / "image_tokenizer" / "model.safetensors").is_file()


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("dalle*.yaml")), ids=lambda p: p.parent.name)
def test_every_recipe_builds(path):
    options = from_mapping(Options, read_mapping(path), where=str(path))
    assert options.model.config(21128, 0, options.max_text_len, 1024, 16).num_image_tokens == 256
