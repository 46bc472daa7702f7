"""The service against the pipeline that it stands before, and under more load than it can take.

    python -m benchmarks.service.speed                          # the shipped model, two minutes of overload
    python -m benchmarks.service.speed --overload-minutes 10    # the target's time
    python -m benchmarks.service.speed --rounds 3 --overload-minutes 0.5 --queue 32     # does it run at all?

Prints: seconds from start to the first image (target: 3); seconds to 8 ranked images over HTTP and in process (target:
1.25 times); images a second of 16 clients at once and of the pipeline's batches of 16 (target: 90 %); under four times
the load: status codes, memory of all processes before, when a first minute of it has filled the caches, and at the end
(target: 5 % more than after that minute), the wait of accepted requests against queue / rate (target: 20 % more).
"""

import collections
import concurrent.futures
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import httpx
import psutil

from common.config import command, parse_options
from common.log import say
from dalle import default_checkpoint
from dalle.pipeline import TextToImage
from dalle.sampling import SamplingOptions
from rankers import default_ranker, load_ranker

TEXT = "一件红色的T恤"
PORT = 8765
WARM_S = 60.0  # of overload, until the worker has met its largest batches
URL = f"http://127.0.0.1:{PORT}"


@dataclass(frozen=True)
class Options:
    """Measure the service."""

    rounds: int = 9
    """Requests for 8 images, over HTTP and in process by turns."""
    overload_minutes: float = 2.0
    """Minutes of four times the load."""
    clients: int = 16
    """Clients at once."""
    queue: int = 128
    """Images that the service lets wait, of all requests: four times as many are asked for at once."""

    def __post_init__(self) -> None:
        if min(self.rounds, self.clients) < 1 or self.queue < 16 or self.overload_minutes < 0:
            raise ValueError(
                "rounds and clients must be at least 1, queue at least 16, overload_minutes at least 0"
            )


class Server:
    """The service in processes of its own."""

    def __init__(self, folder: str, queue: int) -> None:
        arguments = [
            "--open",
            "--port",
            str(PORT),
            "--audit-dir",
            f"{folder}/audit",
            "--image-dir",
            f"{folder}/served",
            "--max-queued-images",
            str(queue),
            "--deadline",
            "3600",
        ]
        started = time.perf_counter()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "serve", *arguments], stdout=subprocess.DEVNULL
        )
        while not self._is_ready():
            if self.process.poll() is not None or time.perf_counter() - started > 180:
                raise SystemExit("the service did not start")
            time.sleep(0.05)
        ready = time.perf_counter() - started
        ask(1).raise_for_status()
        processes = self._processes()
        used = sum(sum(p.cpu_times()[:2]) for p in processes)
        say(
            f"first image {time.perf_counter() - started:.1f} s after start, ready after {ready:.1f} s; "
            f"{used:.1f} s of processor time in {len(processes)} processes"
        )

    @staticmethod
    def _is_ready() -> bool:
        try:
            return httpx.get(f"{URL}/readyz").status_code == 200
        except httpx.TransportError:
            return False

    def memory(self) -> float:
        """MiB of the service and its worker."""
        return (
            sum(p.memory_full_info().uss for p in self._processes()) / 2**20
        )  # what is shared counts for none

    def _processes(self) -> list[psutil.Process]:
        root = psutil.Process(self.process.pid)
        return [root, *root.children(recursive=True)]

    def stop(self) -> float:
        """Seconds from SIGTERM to the end."""
        started = time.perf_counter()
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(120)
        return time.perf_counter() - started


def ask(count: int, seed: int = 0) -> httpx.Response:
    body = {"prompt": TEXT, "n": count, "seed": seed, "response_format": "b64_json"}
    return httpx.post(f"{URL}/v1/images/generations", json=body, timeout=3600)


def latency(rounds: int, pipeline: TextToImage, ranker: object) -> None:
    over_http, in_process = [], []
    for i in range(rounds):
        started = time.perf_counter()
        images = [p.image for p in pipeline.generate([TEXT], 8, i, SamplingOptions())]
        ranker.score(TEXT, images)
        in_process.append(time.perf_counter() - started)
        started = time.perf_counter()
        ask(8, i).raise_for_status()
        over_http.append(time.perf_counter() - started)
    ours, theirs = statistics.median(over_http), statistics.median(in_process)
    say(
        f"8 ranked images, median of {rounds}: HTTP {ours:.2f} s, in process {theirs:.2f} s, ratio {ours / theirs:.2f}"
    )


def throughput(clients: int, pipeline: TextToImage) -> None:
    per_client, rounds = 4, 2
    list(pipeline.generate([TEXT], 16, 0, SamplingOptions(), batch_size=16))
    started = time.perf_counter()
    list(pipeline.generate([TEXT], 64, 1, SamplingOptions(), batch_size=16))
    rate = 64 / (time.perf_counter() - started)
    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        started = time.perf_counter()
        answers = list(pool.map(lambda i: ask(per_client, i), range(clients * rounds)))
        served = sum(len(a.json().get("data", [])) for a in answers) / (time.perf_counter() - started)
    say(
        f"{clients} clients: {served:.2f} images/s, pipeline in batches of 16: {rate:.2f}, ratio {served / rate:.2f}"
    )


def overload(minutes: float, server: Server, queue: int) -> None:
    """Clients that ask for 16 images each without a pause: four queues' worth."""
    codes: collections.Counter[int | str] = collections.Counter()
    taken: list[float] = []  # seconds of accepted requests
    before, began, lock = server.memory(), time.monotonic(), threading.Lock()
    warm = [before]  # and then after a minute
    minute = threading.Timer(WARM_S, lambda: warm.append(server.memory()))
    minute.start()

    def client(number: int) -> None:
        seed = number * 1000
        while time.monotonic() < began + 60 * minutes:
            started = time.monotonic()
            try:
                answer = ask(16, seed)
            except httpx.TransportError as error:
                with lock:
                    codes[type(error).__name__] += 1
                continue
            with lock:
                codes[answer.status_code] += 1
                if answer.status_code == 200:
                    taken.append(time.monotonic() - started)
            if answer.status_code == 429:
                time.sleep(min(2.0, float(answer.headers["retry-after"])))
            seed += 1

    threads = [threading.Thread(target=client, args=(i,)) for i in range(4 * queue // 16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    elapsed, after = time.monotonic() - began, server.memory()
    minute.cancel()
    if not taken:
        say(f"overload: nothing was answered in {elapsed:.0f} s: status {dict(codes)}")
        return
    rate, p99 = 16 * len(taken) / elapsed, sorted(taken)[int(0.99 * (len(taken) - 1))]
    say(f"overload, {elapsed / 60:.1f} minutes: status {dict(codes)}, {rate:.1f} images/s")
    say(
        f"memory before {before:.0f}, after {WARM_S:.0f} s {warm[-1]:.0f}, at the end {after:.0f} MiB "
        f"({100 * (after / warm[-1] - 1):+.1f} % since then)"
    )
    say(
        f"p99 of accepted requests {p99:.1f} s, queue / rate {queue / rate:.1f} s, ratio {p99 * rate / queue:.2f}"
    )
    say(f"afterwards: one request answers {ask(1).status_code}")


@command
def main(argv: Sequence[str] | None = None) -> None:
    options = parse_options(Options, argv, description=__doc__)
    os.environ.setdefault("NO_PROXY", "127.0.0.1")
    with tempfile.TemporaryDirectory() as folder:
        server = Server(folder, options.queue)
        try:
            pipeline = TextToImage.from_pretrained(default_checkpoint())
            ranker = load_ranker(default_ranker())
            latency(options.rounds, pipeline, ranker)
            throughput(options.clients, pipeline)
            if options.overload_minutes:
                overload(options.overload_minutes, server, options.queue)
        finally:
            say(f"SIGTERM to the end: {server.stop():.1f} s")


if __name__ == "__main__":
    main()
