"""Two nodes, which are network namespaces of this machine: the hostfile launcher, ZeRO 1 to 3, and a node that dies.

The launcher is started on each node (`--no_ssh --node_rank`), as where nodes are not let into each other by ssh.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from tiny_data import write_made

import train_dalle

ROOT = Path(train_dalle.__file__).parent
STEPS, SAVE_EVERY = 24, 4

pytestmark = pytest.mark.slow


class Nodes:
    """Two namespaces that see nothing but each other."""

    def __init__(self) -> None:
        name = uuid.uuid4().hex[:6]
        self.names = [f"dalle-{name}-{i}" for i in range(2)]
        self.links = [f"v{name}{i}" for i in range(2)]
        self.addresses = ["10.231.7.1", "10.231.7.2"]

    def make(self) -> None:
        for name in self.names:
            ip("netns", "add", name)
        ip("link", "add", self.links[0], "type", "veth", "peer", "name", self.links[1])
        for name, link, address in zip(self.names, self.links, self.addresses, strict=True):
            ip("link", "set", link, "netns", name)
            ip("-n", name, "addr", "add", f"{address}/24", "dev", link)
            ip("-n", name, "link", "set", link, "up")
            ip("-n", name, "link", "set", "lo", "up")

    def remove(self) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)

    def start(self, node: int, arguments: list[str], hosts: Path) -> subprocess.Popen:
        """train_dalle.py on one node, by the launcher with the hostfile."""
        launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(hosts), "--no_ssh"]
        launcher += ["--node_rank", str(node), "--master_addr", self.addresses[0], "--master_port", "29655"]
        return self.run(node, [*launcher, str(ROOT / "train_dalle.py"), *arguments])

    def run(self, node: int, command: list[str]) -> subprocess.Popen:
        return subprocess.Popen(
            ["ip", "netns", "exec", self.names[node], *command],
            env=environment() | {"GLOO_SOCKET_IFNAME": self.links[node]},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def environment() -> dict[str, str]:
    paths = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "DS_ACCELERATOR": "cpu",
        "PATH": paths,
    }


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    made = Nodes()
    if not shutil.which("ip"):
        pytest.skip("network namespaces need the command ip (iproute2)")
    try:
        made.make()
    except subprocess.CalledProcessError as error:
        made.remove()
        pytest.skip(f"network namespaces are not allowed here: {error.stderr.strip()}")
    yield made
    made.remove()


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return write_made(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def alone(made, tmp_path_factory) -> list[list[float]]:
    """The trace of one process."""
    run = tmp_path_factory.mktemp("alone") / "run"
    train_dalle.main(flags(made, run))
    return trace(run)


def flags(made: Path, run_dir: Path, *more: str) -> list[str]:
    return [
        *("--data", str(made / "tokens"), "--image-tokenizer", str(made / "tokenizer")),
        *("--loop.run-dir", str(run_dir), "--loop.num-steps", str(STEPS), "--loop.global-batch-size", "8"),
        *("--loop.log-every", "1", "--loop.save-every", str(SAVE_EVERY), "--loop.tensorboard", "False"),
        *("--num-workers", "0", "--device", "cpu", "--precision", "fp32", "--sample-images", "0"),
        *("--model.dim", "16", "--model.num-layers", "2", "--model.num-heads", "2"),
        *("--optim.warmup-steps", "2", *more),
    ]


def trace(run_dir: Path) -> list[list[float]]:
    """(step, loss) of the last time that each step was made."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text("utf-8").splitlines()]
    return sorted(
        {row["step"]: [row["step"], row["loss"]] for row in rows if row["kind"] == "train"}.values()
    )


def hostfile(path: Path, nodes: Nodes, count: int) -> Path:
    path.write_text("".join(f"{address} slots=1\n" for address in nodes.addresses[:count]), "utf-8")
    return path


def finish(processes: list[subprocess.Popen], seconds: float = 900) -> None:
    said = [process.communicate(timeout=seconds)[0] for process in processes]
    assert not any(process.returncode for process in processes), "\n".join(text[-2500:] for text in said)


def kill(process: subprocess.Popen) -> None:
    """With all that it has started, as a node that loses its power."""
    started = psutil.Process(process.pid)
    for found in (*started.children(recursive=True), started):
        with contextlib.suppress(psutil.NoSuchProcess):
            found.kill()
    process.communicate()


@pytest.mark.parametrize("stage", ["1", "2", "3"])
def test_two_nodes_train_as_one_process_does(nodes, made, alone, tmp_path, stage):
    hosts = hostfile(tmp_path / "hosts", nodes, 2)
    arguments = flags(made, tmp_path / "run", "--deepspeed.zero-stage", stage)
    finish([nodes.start(node, arguments, hosts) for node in range(2)])
    found = trace(tmp_path / "run")
    assert [step for step, _ in found] == [step for step, _ in alone]
    assert [loss for _, loss in found] == pytest.approx([loss for _, loss in alone], rel=2e-4)


def test_a_node_dies_and_the_other_goes_on_alone(nodes, made, alone, tmp_path):
    hosts, run = hostfile(tmp_path / "hosts", nodes, 2), tmp_path / "run"
    arguments = flags(made, run, "--deepspeed.zero-stage", "2")
    processes = [nodes.start(node, arguments, hosts) for node in range(2)]
    try:
        deadline = time.monotonic() + 900
        while not list(run.glob(f"step_*{SAVE_EVERY}")) and time.monotonic() < deadline:
            assert all(process.poll() is None for process in processes)
            time.sleep(0.01)
    finally:
        kill(processes[1])
    assert len(trace(run)) < STEPS, "the run was over before the node died"
    kill(processes[0])  # its launcher would wait for the node; a scheduler ends it
    one = hostfile(tmp_path / "one", nodes, 1)
    finish([nodes.start(0, arguments, one)])
    found = trace(run)
    assert [step for step, _ in found] == [step for step, _ in alone]
    assert [loss for _, loss in found] == pytest.approx([loss for _, loss in alone], rel=2e-4)
