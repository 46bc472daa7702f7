"""How long does a training wait for shards on a slow, failing server? The goal is under 5 % of its time.

    python -m benchmarks.data.slow_loading
    python -m benchmarks.data.slow_loading --latency-ms 300 --error-share 0.2 --step-ms 20

A server of this process answers each request after `latency_ms`, and fails `error_share` of them: HTTP 503, a closed
connection, or an answer that ends early. The training is a sleep of `step_ms` a batch; what is timed is how long its
thread stands still for a shard that is not there yet, whatever else a busy machine makes it wait for. `start_s` is the
first batch, which nothing can prepare; `wait_share` leaves it out, `wait_share_with_start` does not. Exit code 1 where
`wait_share` is not under the goal, or a sample is missing.
"""

import contextlib
import io
import json
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import torch

from common.config import command, parse_options
from common.distributed import World
from data_tools.ingest.records import Record
from data_tools.shards.image_shards import ShardWriter
from data_tools.shards.index import ShardIndex
from data_tools.shards.loader import DecodeTokens, train_batches
from data_tools.shards.remote import RemoteOptions, RemoteShard

GOAL = 0.05


@dataclass(frozen=True)
class Options:
    """Time the waiting."""

    shards: int = 48
    """Shards on the server."""
    samples: int = 256
    """Samples a shard."""
    window_shards: int = 8
    """Shards whose samples are shuffled together."""
    connections: int = 4
    """Shards fetched at a time."""
    batch_size: int = 32
    """Samples a batch."""
    step_ms: float = 40.0
    """A training step, in milliseconds."""
    latency_ms: float = 100.0
    """Of each answer, in milliseconds."""
    error_share: float = 0.05
    """Requests that fail, 0 to 1."""
    seed: int = 0
    """Of the failures and of the order."""

    def __post_init__(self) -> None:
        if not 0 <= self.error_share < 1:
            raise ValueError(f"--error-share must be from 0 to below 1, not {self.error_share}")


def write_shards(folder: Path, options: Options) -> None:
    """Codes as vq.encode_shards writes them: 4 views of 256."""
    rng = np.random.default_rng(options.seed)
    with ShardWriter(folder, "train", samples_per_shard=options.samples) as writer:
        for i in range(options.shards * options.samples):
            codes = io.BytesIO()
            np.save(codes, rng.integers(0, 1024, (4, 256), dtype=np.uint16))
            writer.write(Record(f"{i:08d}", b"", "", ("text",), {}, extra={"ids.npy": codes.getvalue()}))


@contextlib.contextmanager
def slow_server(folder: Path, options: Options) -> Iterator[tuple[str, Counter[str]]]:
    """Its address, and what it has answered so far."""
    answers: Counter[str] = Counter()
    chance, guard = random.Random(options.seed), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            time.sleep(options.latency_ms / 1000)
            path = folder / self.path.strip("/")
            if not path.is_file():
                return self.send_error(404)
            with guard:
                fails = chance.random() < options.error_share
                kind = chance.choice(["503", "closed", "cut"]) if fails else "whole"
                answers[kind] += 1
            if kind == "503":
                return self.send_error(503)
            if kind == "closed":
                return self.connection.close()
            data = path.read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data if kind == "whole" else data[: len(data) // 2])

        def log_message(self, *_: object) -> None:
            """Quiet."""

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            """A connection that it closed itself is no news."""

    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", answers
    finally:
        server.shutdown()
        server.server_close()


def measure(options: Options, address: str, cache: str) -> dict[str, float]:
    """One epoch: seconds of the first batch, of training and of waiting, and the number of different samples."""
    remote = RemoteOptions(cache=cache, window_shards=options.window_shards, connections=options.connections)
    started = time.perf_counter()
    index = ShardIndex.open(address, "train", remote).require("ids.npy")
    world = World(0, 1, 0, torch.device("cpu"), "none")
    waits = watch_fetches(index)
    batches = iter(train_batches(index, DecodeTokens(), options.batch_size, world, options.seed))
    keys = set(next(batches)["key"])
    first, trained = time.perf_counter() - started, 0.0
    waits.clear()
    for _ in range(options.shards * options.samples // options.batch_size - 1):
        begun = time.perf_counter()
        time.sleep(options.step_ms / 1000)
        trained += time.perf_counter() - begun
        keys.update(next(batches)["key"])
    batches.close()
    return {"start_s": first, "train_s": trained, "wait_s": sum(waits), "samples": len(keys)}


def watch_fetches(index: ShardIndex) -> list[float]:
    """Seconds of each fetch that the thread of the training, which is this one, had to stand by for."""
    fetch, trainer, waits = index.remote.cache.fetch, threading.get_ident(), []

    def timed(shard: RemoteShard) -> Path:
        started, ready = time.perf_counter(), shard.path.is_file()
        path = fetch(shard)
        if threading.get_ident() == trainer and not ready:
            waits.append(time.perf_counter() - started)
        return path

    index.remote.cache.fetch = timed
    return waits


@command
def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Measure and print one JSON object; returns it."""
    options = parse_options(Options, argv, description=__doc__)
    with tempfile.TemporaryDirectory() as folder:
        site = Path(folder) / "site"
        write_shards(site, options)
        with slow_server(site, options) as (address, answers):
            found = measure(options, address, str(Path(folder) / "cache"))
    started, wait, train = found["start_s"], found["wait_s"], found["train_s"]
    found["wait_share"] = wait / (wait + train)
    found["wait_share_with_start"] = (started + wait) / (started + wait + train)
    result = {name: round(value, 4) for name, value in found.items()} | {"answers": dict(answers)}
    print(json.dumps(result, sort_keys=True))
    if found["wait_share"] >= GOAL or found["samples"] < options.shards * options.samples:
        print(f"missed: waiting under {GOAL:.0%} of the time, and every sample once", file=sys.stderr)
        raise SystemExit(1)
    return result


if __name__ == "__main__":
    main()
