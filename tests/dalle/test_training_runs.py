"""Whole training runs: with kernels and without they follow the same path; each repeats itself to the last digit."""

import json

import pytest
from tiny_data import write_made

import train_dalle
import train_vqgan
from kernels import compiler, train_block

STEPS = 20
SHORT = (
    "--loop.num-steps", str(STEPS), "--loop.global-batch-size", "6", "--loop.log-every", "1", "--loop.eval-every", "0",
    "--loop.sample-every", "0", "--loop.save-every", "0", "--loop.tensorboard", "False", "--device", "cpu",
    "--num-workers", "0",
)  # fmt: skip
SIZES = (
    "--model.dim", "64", "--model.num-layers", "2", "--model.num-heads", "2", "--sample-images", "0", "--val-samples",
    "8", "--optim.warmup-steps", "5",
)  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return write_made(tmp_path_factory.mktemp("made"))


@pytest.fixture
def train(tmp_path, made, monkeypatch):
    """train(name, *flags) -> (losses of the steps, the run's options as stored); on a CPU without AMX."""
    monkeypatch.setattr(compiler, "prefers_torch", lambda: False)

    def run(name: str, *flags: str, script=train_dalle, sizes=SIZES):
        run_dir = tmp_path / name
        own = ("--data", str(made / "images"), "--image-tokenizer", str(made / "tokenizer"))
        own = own if script is train_dalle else ("--data", str(made / "images"))
        script.main([*own, "--loop.run-dir", str(run_dir), *SHORT, *sizes, *flags])
        rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        options = json.loads((run_dir / "latest" / "train_config.json").read_text())
        return [row["loss"] for row in rows if "loss" in row][:STEPS], options

    return run


def test_kernels_on_and_off_follow_the_same_path(train, capsys):
    calm = ("--model.dropout", "0", "--model.token-dropout", "0", "--model.stochastic-depth", "0")
    on, options = train("on", *calm)
    assert "kernels: " in capsys.readouterr().out
    if not compiler.unavailable_reason(train_block.SOURCE):
        assert options["kernels_used"]["blocks"] == "2 of 2 blocks by compiled code"
    again, _ = train("again", *calm)
    off, options = train("off", *calm, "--kernels", "off")
    assert options["kernels_used"] == {"off": "off: PyTorch computes everything"}
    assert len(on) == STEPS and on == again and on != off
    assert on == pytest.approx(off, rel=0.01)
    assert on[-1] < on[0]


def test_a_run_with_dropout_repeats_itself(train):
    noisy = ("--model.dropout", "0.1", "--model.stochastic-depth", "0.2")
    assert train("first", *noisy)[0] == train("second", *noisy)[0]


def test_the_image_tokenizers_run_repeats_itself(train):
    sizes = ("--model.image-size", "16", "--model.codebook-size", "16", "--model.codebook-dim", "4")
    sizes += ("--model.fast.haar-levels", "1", "--model.fast.channels", "32", "32")
    sizes += ("--model.fast.encoder-blocks", "0", "1", "--model.fast.decoder-blocks", "0", "1")
    first, second = (train(name, script=train_vqgan, sizes=sizes)[0] for name in ("a", "b"))
    assert len(first) == STEPS and first == second
