"""What does Ray cost? `data_tools.shard` on the same images with the local engine and on a Ray cluster, in turn.

    python -m benchmarks.data.ray_overhead                      # wants requirements-ray.txt
    python -m benchmarks.data.ray_overhead --rows 2000 --rounds 1

Goal: at most 10 % more than the local engine on 10,000 images. Each round runs both commands whole, in processes of
their own, and once each on a few rows, which is what starting takes. Ratios are of what is left without the start, and
of the whole command; of processor time, which other processes change little, and of wall time, which wants
an idle machine. Processor time is that of all processes below the command, read every `POLL_S`. Exit code 1 where the
bytes differ or the ratio of processor time without the start misses the goal.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.data.shard import ROOT, SIDE, drawn_images, write_tsv
from common.config import command, parse_options
from common.files import sha256_file
from common.log import say
from data_tools.engine import import_ray
from data_tools.parallel import cpu_count

GOAL = 1.10
POLL_S = 0.25
START_ROWS = 32
Cost = dict[str, float]
"""Seconds: wall, cpu."""


@dataclass(frozen=True)
class Options:
    """Compare the engines."""

    rows: int = 10_000
    """Images."""
    rounds: int = 3
    """Times that each command is measured; medians count."""
    workers: int = 0
    """Processes of the local engine; 0: one a processor, as Ray takes."""

    def __post_init__(self) -> None:
        if self.rows <= START_ROWS or self.rounds < 1:
            raise ValueError(f"--rows must be above {START_ROWS} and --rounds at least 1")


def run(source: Path, out: Path, flags: Sequence[str]) -> Cost:
    """The command; what it and the processes below it take."""
    arguments = [str(source), str(out), "--size", str(SIDE), *flags]
    start, used = time.perf_counter(), {}
    with tempfile.TemporaryFile() as words:
        process = psutil.Popen(
            [sys.executable, "-m", "data_tools.shard", *arguments], cwd=ROOT, stdout=words, stderr=words
        )
        while process.poll() is None:
            for each in (process, *_below(process)):
                try:
                    times = each.cpu_times()
                except psutil.Error:  # it has just ended
                    continue
                used[each.pid, each.create_time()] = times.user + times.system
            time.sleep(POLL_S)
        if process.returncode:
            words.seek(0)
            raise subprocess.CalledProcessError(process.returncode, arguments, words.read().decode())
    return {"wall": time.perf_counter() - start, "cpu": sum(used.values())}


def _below(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []


def medians(costs: Sequence[Cost]) -> Cost:
    return {name: statistics.median(cost[name] for cost in costs) for name in ("wall", "cpu")}


def same_bytes(one: Path, other: Path) -> bool:
    """Whether both folders hold the same files."""
    names = [{p.relative_to(f) for p in f.rglob("*") if p.is_file()} for f in (one, other)]
    return names[0] == names[1] and all(sha256_file(one / n) == sha256_file(other / n) for n in names[0])


@command
def main(argv: Sequence[str] | None = None) -> dict[str, object]:
    """Measure and print one JSON object; returns it."""
    options = parse_options(Options, argv, description=__doc__)
    import_ray()  # one sentence where it is missing
    engines = {"local": ["--workers", str(options.workers or cpu_count())], "ray": ["--engine", "ray"]}
    whole: dict[str, list[Cost]] = {name: [] for name in engines}
    started: dict[str, list[Cost]] = {name: [] for name in engines}
    same = True
    with tempfile.TemporaryDirectory(prefix="ray_overhead-") as name:
        folder, images = Path(name), drawn_images(300, SIDE)
        few = write_tsv(folder / "few", images, START_ROWS)
        source = write_tsv(folder / "all", images, options.rows)
        for number in range(options.rounds):
            for engine, flags in engines.items():
                started[engine].append(run(few, folder / f"few-{engine}{number}", flags))
                whole[engine].append(run(source, folder / f"{engine}{number}", flags))
                say(f"round {number} | {engine} | start {started[engine][-1]} | whole {whole[engine][-1]}")
            same &= same_bytes(folder / f"local{number}", folder / f"ray{number}")
    start = {name: medians(costs) for name, costs in started.items()}
    total = {name: medians(costs) for name, costs in whole.items()}
    work = {name: {kind: total[name][kind] - start[name][kind] for kind in start[name]} for name in engines}
    result = {
        "rows": options.rows,
        "same_bytes": same,
        "start_s": start,
        "whole_s": total,
        "ratio_without_start": {k: round(work["ray"][k] / work["local"][k], 3) for k in work["ray"]},
        "ratio_whole": {k: round(total["ray"][k] / total["local"][k], 3) for k in total["ray"]},
    }
    print(json.dumps(result, sort_keys=True))
    if not same or result["ratio_without_start"]["cpu"] > GOAL:
        print(f"missed: the same bytes, and a ratio of at most {GOAL:g}", file=sys.stderr)
        raise SystemExit(1)
    return result


if __name__ == "__main__":
    main()
