"""How near the data path is to its limit: TSV to shards, shards to batches, and memory against the number of rows.

    python -m benchmarks.data.shard                       # a quarter of an hour on two cores
    python -m benchmarks.data.shard --rows 500 --rounds 1 --memory-rows 200 2000
    python -m benchmarks.data.shard --images ../shared/data/goods

Each speed is a ratio to bare Pillow on the same images, in the same run and on as many processes, round by round in
turn. Two ratios are printed: of wall time, which wants an idle machine, and of processor time, which does not.
    TSV to shards       bare = decode + encode (WebP, the same quality)            goal 0.8
    shards to batches   bare = decode + resize to 128 pixels                       goal 0.9
    memory              peak of the main and of the largest worker process; flat from 1,000 to 100,000 rows
"""

import base64
import io
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from common.config import command, parse_options
from common.files import write_json
from data_tools.ingest.records import Record
from data_tools.parallel import cpu_count
from data_tools.readers.detect import open_source

ROOT = Path(__file__).resolve().parents[2]
QUALITY, SIDE, BATCH_SIDE = 90, 256, 128

# Runs the command as a user does, then says what it took: wall, processor seconds, peak of this and of any child.
MEASURED = """
import json, resource, sys, time
start = time.perf_counter()
from data_tools.shard import main
main(sys.argv[1:])
own, children = (resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
cpu = own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps({"wall": time.perf_counter() - start, "cpu": cpu,
                  "main_mib": int(peak) / 1024, "worker_mib": children.ru_maxrss / 1024}))
"""


@dataclass(frozen=True)
class BenchConfig:
    """Measure the data path against bare Pillow."""

    rows: int = 4000
    """Rows of the TSV."""
    rounds: int = 3
    """Times that each of the pair is measured, in turn; medians are printed."""
    memory_rows: tuple[int, ...] = (1000, 10_000, 100_000)
    """Numbers of rows to take the peak memory at; the images are small there."""
    images: Path | None = None
    """Source of real images to repeat; default: rendered ones with the detail of a photograph."""
    workers: int = 0
    """Processes; 0: one a processor."""
    out: Path | None = None
    """JSON file for the metrics."""

    def __post_init__(self):
        if min(self.rows, self.rounds) < 1:
            raise ValueError("--rows and --rounds must be at least 1")


def drawn_images(count: int, side: int) -> list[bytes]:
    """JPEGs of smooth noise over three scales: about 12 kB at 256 pixels, as product photographs have."""
    import numpy as np

    images = []
    for seed in range(count):
        rng, canvas = np.random.default_rng(seed), np.full((side, side, 3), 128.0)
        for cells, strength in ((4, 60), (16, 30), (64, 12)):
            grid = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
            canvas += (
                (np.asarray(grid.resize((side, side), Image.Resampling.BICUBIC), float) - 128) * strength / 64
            )
        buffer = io.BytesIO()
        Image.fromarray(canvas.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
        images.append(buffer.getvalue())
    return images


def real_images(source: Path, count: int) -> list[bytes]:
    """The first images of a source, at 256 pixels, as JPEG."""
    images = []
    for item in open_source(source):
        if isinstance(item, Record) and item.image:
            buffer = io.BytesIO()
            with Image.open(io.BytesIO(item.image)) as image:
                image.convert("RGB").resize((SIDE, SIDE)).save(buffer, "JPEG", quality=90)
            images.append(buffer.getvalue())
            if len(images) == count:
                break
    return images


def write_tsv(folder: Path, encoded_images: Sequence[bytes], rows: int) -> Path:
    """An ECommerce-T2I source that repeats `encoded_images`; texts in another order than images."""
    folder.mkdir()
    encoded = [base64.urlsafe_b64encode(data).decode() for data in encoded_images]
    with (
        (folder / "T2I_train.img.tsv").open("w") as images,
        (folder / "T2I_train.text.tsv").open("w") as texts,
    ):
        for i in range(rows):
            images.write(f"{i:032x}\t{encoded[i % len(encoded)]}\n")
            texts.write(f"{rows - 1 - i:032x}\t\u4e00\u4ef6\u7ea2\u8272\u8fde\u8863\u88d9 {rows - 1 - i}\n")
    return folder


def bare_encode(task: tuple[Sequence[bytes], int]) -> float:
    """Processor seconds to decode and encode `task[1]` images."""
    images, count = task
    start = time.process_time()
    for i in range(count):
        with Image.open(io.BytesIO(images[i % len(images)])) as image:
            image.convert("RGB").save(io.BytesIO(), "WEBP", quality=QUALITY, method=4)
    return time.process_time() - start


def bare_resize(task: tuple[Sequence[bytes], int]) -> float:
    """Processor seconds to decode and resize."""
    images, count = task
    start = time.process_time()
    for i in range(count):
        with Image.open(io.BytesIO(images[i % len(images)])) as image:
            image.convert("RGB").resize((BATCH_SIDE, BATCH_SIDE), Image.Resampling.LANCZOS)
    return time.process_time() - start


def run_bare(
    pool: ProcessPoolExecutor, work: Callable, images: Sequence[bytes], rows: int, workers: int
) -> dict:
    """Wall and processor seconds of the bare work, spread evenly over the processes of a warm pool."""
    tasks = [(images, rows // workers + (i < rows % workers)) for i in range(workers)]
    start = time.perf_counter()
    cpu = sum(pool.map(work, tasks))
    return {"wall": time.perf_counter() - start, "cpu": cpu}


def run_shard(source: Path, out: Path, workers: int, *flags: str) -> dict:
    """The command in a process of its own; its start is counted."""
    arguments = [str(source), str(out), "--workers", str(workers), "--quality", str(QUALITY), *flags]
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *arguments],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    return json.loads(done.stdout)


def run_loader(shards: Path, rows: int, workers: int) -> dict:
    """Seconds from shards to batches of 64 at 128 pixels, after the first batch (its processes have then started)."""
    import torch

    from common.distributed import World
    from data_tools.shards.index import ShardIndex
    from data_tools.shards.loader import DecodeImage, train_batches

    torch.set_num_threads(1)
    world = World(0, 1, 0, torch.device("cpu"), "none")
    batches = train_batches(ShardIndex.open(shards), DecodeImage(BATCH_SIDE), 64, world, num_workers=workers)
    next(batches)
    start, cpu = time.perf_counter(), _cpu_with_children()
    for _ in range(rows // 64):
        next(batches)
    seconds = {"wall": time.perf_counter() - start, "cpu": _cpu_with_children() - cpu}
    batches.close()
    return {name: value * rows / (rows // 64 * 64) for name, value in seconds.items()}


def _cpu_with_children() -> float:
    """Processor seconds of this process and of its living children."""
    import psutil

    me = psutil.Process()
    times = [process.cpu_times() for process in (me, *me.children(recursive=True))]
    return sum(t.user + t.system for t in times)


def ratios(pairs: Sequence[tuple[dict, dict]]) -> dict[str, float]:
    """Median over the rounds of bare / ours."""
    return {
        name: round(statistics.median(bare[name] / ours[name] for bare, ours in pairs), 3)
        for name in ("wall", "cpu")
    }


def measure_speed(config: BenchConfig, folder: Path, workers: int) -> Iterator[tuple[str, dict]]:
    """(question, metrics) of the two speeds."""
    images = real_images(config.images, 300) if config.images else drawn_images(300, SIDE)
    source = write_tsv(folder / "speed", images, config.rows)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context) as pool:
        run_bare(pool, bare_encode, images, 10 * workers, workers)
        pairs = []
        for number in range(config.rounds):
            bare = run_bare(pool, bare_encode, images, config.rows, workers)
            pairs.append((bare, run_shard(source, folder / f"out{number}", workers)))
        size = sum(map(len, images)) / len(images)
        yield (
            "tsv_to_shards",
            {"ratio": ratios(pairs), "goal": 0.8, "picture_bytes": round(size), "rows": config.rows},
        )
        stored = [r.image for r in open_source(folder / "out0") if isinstance(r, Record)]
        pairs = []
        for _ in range(config.rounds):
            bare = run_bare(pool, bare_resize, stored[:300], config.rows, workers)
            pairs.append((bare, run_loader(folder / "out0", config.rows, workers)))
        yield "shards_to_batches", {"ratio": ratios(pairs), "goal": 0.9, "rows": config.rows}


def measure_memory(config: BenchConfig, folder: Path, workers: int) -> dict:
    """Peaks by number of rows."""
    peaks = {}
    for rows in config.memory_rows:
        source = write_tsv(folder / f"memory{rows}", drawn_images(50, 48), rows)
        metrics = run_shard(source, folder / f"memory_out{rows}", workers, "--size", "32")
        peaks[str(rows)] = {name: round(metrics[name], 1) for name in ("main_mib", "worker_mib")}
    return {"peaks": peaks, "goal": "flat"}


@command
def main(argv: Sequence[str] | None = None) -> dict:
    """Measure and print."""
    config = parse_options(BenchConfig, argv, description=__doc__.splitlines()[0])
    workers = config.workers or cpu_count()
    metrics = {"workers": workers, "load_at_start": round(os.getloadavg()[0], 2)}
    with tempfile.TemporaryDirectory(prefix="data_shard-") as name:
        for question, values in measure_speed(config, Path(name), workers):
            metrics[question] = values
            print(f"{question}: {json.dumps(values)}", flush=True)
        metrics["memory"] = measure_memory(config, Path(name), workers)
        print(f"memory: {json.dumps(metrics['memory'])}", flush=True)
    if config.out:
        write_json(config.out, metrics)
    return metrics


if __name__ == "__main__":
    main()
