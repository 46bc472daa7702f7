"""Can a training start on every node of a hostfile? Asks each by ssh, before a launcher waits for one that is down.

    python -m common.nodes hostfile
    deepspeed --hostfile hostfile train_dalle.py --config configs/large/dalle_3b.yaml

A hostfile has a line a node, `worker-1 slots=8`, as DeepSpeed reads it. Each node must let you in by ssh without a
password, see this very folder (a shared file system), and have as many GPUs as its slots. Exit code 2 names the rest.
"""

import re
import shlex
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import tyro

from common.config import command, parse_options
from common.files import read_lines
from common.log import say


@dataclass(frozen=True)
class Options:
    """Check the nodes of a hostfile."""

    hostfile: tyro.conf.Positional[Path]
    """File with a line a node: HOST slots=N."""
    seconds: int = 10
    """How long to wait for a node."""
    folder: Path | None = None
    """Folder that all nodes must see; None: the one this is started in."""
    gpus: bool = True
    """Also count the GPUs of each node."""

    def __post_init__(self) -> None:
        if self.seconds < 1:
            raise ValueError(f"seconds must be at least 1, not {self.seconds}")


@dataclass(frozen=True)
class Node:
    host: str
    slots: int


def read_hostfile(path: Path) -> list[Node]:
    """Raises FileNotFoundError, or ValueError naming the line."""
    if not path.is_file():
        raise FileNotFoundError(f"no hostfile {path}")
    nodes: dict[str, Node] = {}
    for number, line in enumerate(read_lines(path), 1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        found = re.fullmatch(r"([^\s-]\S*)\s+slots=([1-9]\d*)", line)
        if found is None:
            raise ValueError(f"{path}:{number} is not HOST slots=N: {line!r}")
        if found[1] in nodes:
            raise ValueError(f"{path}:{number} names {found[1]} again")
        nodes[found[1]] = Node(found[1], int(found[2]))
    if not nodes:
        raise ValueError(f"{path} names no node: write a line a node, HOST slots=N")
    return list(nodes.values())


def problem_of(node: Node, options: Options) -> str:
    """What keeps a training from this node; empty: nothing."""
    folder = (options.folder or Path.cwd()).resolve()
    remote = f"test -d {shlex.quote(str(folder))} && echo sees"
    remote += " && nvidia-smi --list-gpus | wc -l" if options.gpus else " && echo 0"
    ssh = ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={options.seconds}", node.host, remote]
    try:
        done = subprocess.run(ssh, capture_output=True, text=True, timeout=options.seconds + 20)
    except FileNotFoundError:
        return "there is no ssh on this machine"
    except subprocess.TimeoutExpired:
        return f"does not answer within {options.seconds + 20} seconds"
    if done.returncode == 255:  # ssh's own failure
        said = done.stderr.strip().splitlines()
        return f"cannot be reached by ssh without a password ({said[-1] if said else 'no reason given'})"
    answer = done.stdout.split()
    if answer[:1] != ["sees"]:
        return f"does not see the folder {folder}: put it on a file system that all nodes share"
    found = int(answer[1]) if len(answer) > 1 else 0
    if options.gpus and found < node.slots:
        return f"has {found} GPUs, not the {node.slots} of its slots"
    return ""


@command
def main(argv: Sequence[str] | None = None) -> list[Node]:
    """Print a line a node; returns them when all are ready."""
    options = parse_options(Options, argv, description=__doc__)
    nodes = read_hostfile(options.hostfile)
    with ThreadPoolExecutor(max_workers=32) as pool:
        problems = list(pool.map(lambda node: problem_of(node, options), nodes))
    for node, problem in zip(nodes, problems, strict=True):
        say(f"{node.host}: {problem or f'ready, {node.slots} processes'}")
    bad = [node.host for node, problem in zip(nodes, problems, strict=True) if problem]
    if bad:
        shown = ", ".join(bad[:5]) + (" ..." if len(bad) > 5 else "")
        raise ValueError(
            f"{len(bad)} of {len(nodes)} nodes are not ready: {shown}; mend them or take them out"
        )
    say(f"all {len(nodes)} nodes are ready for {sum(node.slots for node in nodes)} processes")
    return nodes


if __name__ == "__main__":
    main()
