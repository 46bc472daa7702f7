"""The same training under other launchers gives the loss trace of one process, and goes on under any of them."""

import io
import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
from collections.abc import Collection
from pathlib import Path

import psutil
import pytest
from tiny_data import write_made

import train_dalle
from common.checkpoint import step_directories

ROOT = Path(train_dalle.__file__).parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return write_made(tmp_path_factory.mktemp("made"))


def flags(made: Path, run_dir: Path, *more: str, steps: int = 6) -> list[str]:
    """Without dropout, whose draws belong to a process; hidden captions belong to the samples."""
    return [
        *("--data", str(made / "tokens"), "--image-tokenizer", str(made / "tokenizer")),
        *("--loop.run-dir", str(run_dir), "--loop.num-steps", str(steps), "--loop.global-batch-size", "8"),
        *("--loop.log-every", "1", "--loop.save-every", "3", "--loop.tensorboard", "False"),
        *("--num-workers", "0", "--device", "cpu", "--precision", "fp32", "--caption-dropout", "0.3"),
        *("--model.dim", "16", "--model.num-layers", "2", "--model.num-heads", "2"),
        *("--optim.warmup-steps", "2", "--sample-images", "0", *more),
    ]


def deepspeed() -> list[str]:
    """Its launcher, at a port that no test beside this one uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", str(port)]


def launch(launcher: list[str], arguments: list[str]) -> None:
    paths = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "DS_ACCELERATOR": "cpu",
        "PATH": paths,
    }
    done = subprocess.run(
        [*launcher, str(ROOT / "train_dalle.py"), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def trace(run_dir: Path) -> list[list[float]]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text("utf-8").splitlines()]
    names = ("step", "loss", "text_loss", "image_loss", "grad_norm")
    return [[row[n] for n in names] for row in rows if row["kind"] == "train"]


@pytest.fixture(scope="module")
def alone(made, tmp_path_factory) -> list[list[float]]:
    """The trace of one process."""
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    train_dalle.main(flags(made, run_dir))
    return trace(run_dir)


def assert_same_trace(run_dir: Path, expected: list[list[float]]) -> None:
    found = trace(run_dir)
    assert len(found) == len(expected) == 6
    for mine, theirs in zip(found, expected, strict=True):
        assert mine == pytest.approx(theirs, rel=2e-4)


def keys(run_dir: Path, name: str, steps: Collection[int]) -> list[str]:
    rows = (run_dir / "keys" / f"{name}.jsonl").read_text("utf-8").splitlines()
    return [key for row in map(json.loads, rows) if row["step"] in steps for key in row["keys"]]


def test_two_processes_go_on_as_one(made, alone, tmp_path):
    """torchrun with two processes up to step 3, in the middle of the epoch of 6 steps, then one process to its end;
    and there are fewer shards than processes."""
    tokens = tmp_path / "tokens"
    tokens.mkdir()
    (tokens / "train-00000.tar").write_bytes(one_tar(sorted((made / "tokens").glob("train-*.tar"))))
    for name in ("val-00000.tar", "tokenizer.json"):
        shutil.copyfile(made / "tokens" / name, tokens / name)
    arguments = [*flags(made, tmp_path / "run", "--loop.log-keys", "True"), "--data", str(tokens)]
    launch(TORCHRUN, arguments)
    assert_same_trace(tmp_path / "run", alone)
    shutil.rmtree(tmp_path / "run" / "step_00000006")
    train_dalle.main(arguments)
    assert_same_trace(tmp_path / "run", alone)
    before = [key for rank in ("0_of_2", "1_of_2") for key in keys(tmp_path / "run", rank, range(3))]
    assert sorted(before + keys(tmp_path / "run", "0_of_1", range(3, 6))) == [f"{i:06d}" for i in range(48)]


def one_tar(paths: list[Path]) -> bytes:
    """All their members in one."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as whole:
        for path in paths:
            with tarfile.open(path) as part:
                for member in part:
                    whole.addfile(member, part.extractfile(member))
    return buffer.getvalue()


@pytest.mark.slow
def test_two_processes_killed_go_on_as_one(made, tmp_path):
    """kill -9 of the launcher and both processes in mid-epoch, then one process: the samples of every epoch
    once, and the trace of the uninterrupted run."""
    steps, run_dir = 600, tmp_path / "run"
    train_dalle.main(flags(made, tmp_path / "whole", "--loop.save-every", "0", steps=steps))
    arguments = flags(made, run_dir, "--loop.log-keys", "True", "--loop.save-every", "50", steps=steps)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command, pipe = [*TORCHRUN, str(ROOT / "train_dalle.py"), *arguments], subprocess.PIPE
    started = subprocess.Popen(command, env=environment, stdout=pipe, text=True)
    next(line for line in started.stdout if line.startswith("step 120/"))
    for process in (psutil.Process(started.pid), *psutil.Process(started.pid).children(recursive=True)):
        process.kill()
    started.communicate()
    (last,) = step_directories(run_dir)[-1:]
    resumed = int(last.name.removeprefix("step_"))
    assert 100 <= resumed < steps and resumed % 6  # an epoch has 6 steps
    train_dalle.main(arguments)
    assert trace(run_dir) == [pytest.approx(row, rel=2e-4) for row in trace(tmp_path / "whole")]
    for first in range(0, steps, 6):
        epoch = range(first, first + 6)
        early = [step for step in epoch if step < resumed]
        seen = [key for rank in ("0_of_2", "1_of_2") for key in keys(run_dir, rank, early)]
        seen += keys(run_dir, "0_of_1", [step for step in epoch if step >= resumed])
        assert sorted(seen) == [f"{i:06d}" for i in range(48)]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["0", "1", "2", "3"])
def test_deepspeed_zero_goes_on_as_one(stage, made, alone, tmp_path):
    more = ("--deepspeed.zero-stage", stage)
    launch(deepspeed(), flags(made, tmp_path / "run", *more))
    assert_same_trace(tmp_path / "run", alone)
    shutil.rmtree(tmp_path / "run" / "step_00000006")
    train_dalle.main(flags(made, tmp_path / "run", *more))
    assert_same_trace(tmp_path / "run", alone)


@pytest.mark.slow
def test_one_process_goes_on_under_zero_three_without_average(made, alone, tmp_path):
    arguments = flags(made, tmp_path / "run", "--ema-decay", "0", "--loop.micro-batch-size", "2")
    train_dalle.main(arguments)
    shutil.rmtree(tmp_path / "run" / "step_00000006")
    launch(deepspeed(), [*arguments, "--deepspeed.zero-stage", "3"])
    assert_same_trace(tmp_path / "run", alone)
