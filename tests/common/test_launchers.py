"""The real `torchrun` and `deepspeed` commands: same run, same checkpoint directory; Ctrl-C saves."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import SECONDS, command_env, launcher_env, trace
from test_deepspeed import assert_same_run, zero

SCRIPT = str(Path(__file__).with_name("toy_run.py"))
LAUNCHERS = {
    "torchrun-2": ["torchrun", "--nproc_per_node", "2"],
    "deepspeed-1": ["deepspeed"],
    "deepspeed-2": ["deepspeed", "--num_gpus", "2"],
}


def command(launcher: str, directory: Path, data: Path, *flags: str) -> list[str]:
    """With a port of its own: the launchers' default may be taken by another test."""
    words = LAUNCHERS[launcher]
    port = "--master_port=" + launcher_env("torchrun", 2)["MASTER_PORT"]
    return [words[0], port, *words[1:], SCRIPT, "--data", str(data), "--loop.run-dir", str(directory), *flags]


@pytest.mark.parametrize(
    ("launcher", "flags"),
    [
        ("deepspeed-2", ()),
        pytest.param("deepspeed-1", (), marks=pytest.mark.slow),
        pytest.param("deepspeed-2", zero(2), marks=pytest.mark.slow),
        pytest.param("deepspeed-2", zero(3), marks=pytest.mark.slow),
        pytest.param("torchrun-2", (), marks=pytest.mark.slow),
        pytest.param("torchrun-2", zero(1), marks=pytest.mark.slow),
    ],
)
def test_every_launcher_gives_the_plain_run(launcher, flags, tmp_path, tokens, plain_run):
    words = command(launcher, tmp_path / "run", tokens, *flags)
    done = subprocess.run(words, env=command_env(), capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert_same_run(tmp_path / "run", plain_run)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun-2", "deepspeed-2"])
def test_ctrl_c_under_a_launcher_saves(launcher, tmp_path, tokens, plain_run):
    """The terminal sends the signal to the whole process group."""
    flags = ("--pause", "0.3", "--loop.save-every", "0", "--num-workers", "1")
    words = command(launcher, tmp_path / "run", tokens, *flags)
    process = subprocess.Popen(
        words,
        env=command_env(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    wait_for_step(tmp_path / "run", 3)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=SECONDS)
    assert "run the same command again to go on" in output, output[-3000:]
    assert process.returncode != 0
    done = subprocess.run(words, env=command_env(), capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0 and "going on from" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]
    assert trace(tmp_path / "run", "loss")[-2][0] == 12


def wait_for_step(directory: Path, step: int) -> None:
    path = directory / "metrics.jsonl"
    end = time.monotonic() + SECONDS
    while not (path.is_file() and path.read_text("utf-8").count("train") >= step):
        assert time.monotonic() < end, f"no step {step} in {directory}"
        time.sleep(0.02)


def test_a_peer_that_never_comes_ends_in_a_sentence(tmp_path, tokens):
    code = "from common.config import command; from common.distributed import start_world as s\n"
    code += "command(lambda argv: s('cpu', join_seconds=2))()"
    env = command_env() | launcher_env("torchrun", 2) | {"RANK": "0", "TORCH_CPP_LOG_LEVEL": "FATAL"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode == 2
    assert "did not all meet at 127.0.0.1:" in done.stderr and "Traceback" not in done.stderr
