"""Runs of toy_run.py, on one process or several, and what they left behind.

Processes are forked from a server that has torch and deepspeed loaded, with the environment that a launcher would set:
a second each, where `torchrun` and `deepspeed` themselves take five to fifteen.
"""

import json
import multiprocessing
import os
import signal
import socket
import sys
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

SECONDS = 600  # a loaded machine is slow, a hang is longer
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["toy_run", "tyro", "torch._dynamo", "deepspeed.runtime.zero.muon.muon_optimizer"]
)


def launcher_env(launcher: str, size: int) -> dict[str, str]:
    """What torchrun or deepspeed tell their processes, but for the rank."""
    if launcher == "none":
        return {}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if launcher == "deepspeed":
        return env | {"CROSS_RANK": "0", "CROSS_SIZE": "1", "LOCAL_SIZE": str(size)}
    return env | {"TORCHELASTIC_RUN_ID": "test", "LOCAL_WORLD_SIZE": str(size)}


def _child(argv: list[str], env: dict[str, str], output: Path) -> None:
    import toy_run

    os.environ.update(env)
    with output.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    multiprocessing.set_start_method(
        "fork", force=True
    )  # for loader workers, as in a run from the command line
    toy_run.main(argv)


@dataclass
class Run:
    """A started run and its directory."""

    directory: Path
    processes: list[BaseProcess]

    def wait(self) -> list[int | None]:
        """Exit codes by rank; the negative of a signal."""
        for process in self.processes:
            process.join(SECONDS)
        return [process.exitcode for process in self.processes]

    def signal(self, number: int) -> None:
        for process in self.processes:
            if process.is_alive():
                os.kill(process.pid, number)

    def output(self) -> str:
        return self.directory.with_suffix(".out").read_text("utf-8", errors="replace")


def start(directory: Path, data: Path, *flags: str, size: int = 1, launcher: str = "none") -> Run:
    argv = ["--data", str(data), "--loop.run-dir", str(directory), *flags]
    env = launcher_env(launcher, size)
    processes = []
    for rank in range(size):
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if env else {}
        process = CONTEXT.Process(target=_child, args=(argv, env | ranks, directory.with_suffix(".out")))
        process.start()
        processes.append(process)
    return Run(directory, processes)


def run(directory: Path, data: Path, *flags: str, size: int = 1, launcher: str = "none") -> Path:
    """A whole run that must end well; returns its directory."""
    started = start(directory, data, *flags, size=size, launcher=launcher)
    codes = started.wait()
    assert codes == [0] * size, f"exit codes {codes}\n{started.output()[-3000:]}"
    return directory


def command_env() -> dict[str, str]:
    """For real launchers: our modules on the path, one thread, the tools of this environment first."""
    root = Path(__file__).parents[2]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "PATH": path}


def trace(directory: Path, *names: str) -> list[tuple[float, ...]]:
    """Rows of metrics.jsonl: step and the named values, training and validation apart by sign of the step."""
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text("utf-8").splitlines()]
    rows = [r for r in rows if all(n in r for n in names)]
    return [(r["step"] if r["kind"] == "train" else -r["step"], *(r[n] for n in names)) for r in rows]


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "latest" / "model.safetensors")


def training_state(directory: Path) -> dict[str, Any]:
    """What a run goes on from, but for the seconds that it took."""
    state = torch.load(directory / "latest" / "training_state" / "state.pt", weights_only=True)
    return {name: value for name, value in state.items() if name != "seconds"}


def difference(a: Any, b: Any) -> float:
    """Largest difference of numbers and tensors in two nested states; raises where their shape differs."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), (sorted(a), sorted(b))
        return max((difference(a[k], b[k]) for k in a), default=0.0)
    if isinstance(a, torch.Tensor):
        assert a.shape == b.shape and a.dtype == b.dtype
        return float((a.double() - b.double()).abs().max()) if a.numel() else 0.0
    if isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        return max((difference(x, y) for x, y in zip(a, b, strict=True)), default=0.0)
    return abs(a - b) if isinstance(a, (int, float)) else float(a != b)
