"""Peak memory of clean, dedup, stats and download against the number of rows: what each row adds, in bytes.

    python -m benchmarks.data.memory                               # half an hour on two cores
    python -m benchmarks.data.memory --rows 1000 10000 --commands clean dedup

Each command runs as a user runs it, in its own process on synthetic rows (rendered images of 64 pixels, all different).
No command holds images, so a row may add only what has to be known of every row: ids met before, hashes, lengths.
Exit code 1 when a row adds more than its limit below. download fetches at most 10,000 rows from a server it starts.
"""

import base64
import csv
import io
import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from common.config import command, parse_options

LIMITS = {"clean": 150, "dedup": 700, "stats": 1200, "download": 1500}  # bytes a row
MOST_DOWNLOADS = 10_000
MEASURED = """
import importlib, json, sys
main = importlib.import_module("data_tools." + sys.argv[1]).main
main(sys.argv[2:])
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps(int(peak) * 1024))
"""
CommandName = Literal["clean", "dedup", "stats", "download"]


@dataclass(frozen=True)
class Options:
    """What is measured."""

    rows: tuple[int, ...] = (1000, 10_000, 100_000)
    """Numbers of rows, ascending; the first is the base."""
    commands: tuple[CommandName, ...] = ("clean", "dedup", "stats", "download")
    """Commands to run."""

    def __post_init__(self) -> None:
        if len(self.rows) < 2 or list(self.rows) != sorted(set(self.rows)) or self.rows[0] < 1:
            raise ValueError(f"--rows needs at least two ascending numbers, not {self.rows}")


def drawn_image(number: int) -> bytes:
    """A JPEG of 64 pixels that no other number has."""
    generator = np.random.default_rng(number)
    coarse = Image.fromarray(generator.integers(0, 255, (4, 4, 3), np.uint8))
    buffer = io.BytesIO()
    coarse.resize((64, 64), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=75)
    return buffer.getvalue()


def write_rows(folder: Path, rows: int) -> Path:
    """ECommerce-T2I files."""
    folder.mkdir()
    with (
        (folder / "T2I_train.img.tsv").open("w") as images,
        (folder / "T2I_train.text.tsv").open("w") as texts,
    ):
        for number in range(rows):
            images.write(f"{number:032x}\t{base64.urlsafe_b64encode(drawn_image(number)).decode()}\n")
            texts.write(f"{number:032x}\t\u4e00\u4ef6\u4e0a\u8863 {number}\n")
    return folder


class ImageServer(BaseHTTPRequestHandler):
    """/NUMBER is that image."""

    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16

    def do_GET(self) -> None:
        data = drawn_image(int(self.path.strip("/")))
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Quiet."""


def peak_bytes(name: str, source: Path, folder: Path, rows: int) -> int:
    """Largest resident size of the main process of one command."""
    out = folder / f"{name}{rows}"
    arguments = {
        "clean": [str(source), str(out), "--rules", "shop", "--images.min-side", "0", "--workers", "0"],
        "dedup": [str(source), str(out), "--workers", "0"],
        "stats": [
            str(source),
            "--out",
            str(out.with_suffix(".html")),
            "--watermarks",
            "False",
            "--workers",
            "0",
        ],
        "download": [str(source), str(out), "--allow-private", "True"],
    }
    argv = [sys.executable, "-c", MEASURED, name, *arguments[name]]
    done = subprocess.run(argv, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{name} failed: {done.stderr.strip().splitlines()[-1]}")
    return int(done.stdout.splitlines()[-1])


def measure(options: Options, folder: Path) -> dict[str, dict[str, float]]:
    """Peak MiB by number of rows, and the bytes that a row adds between the first and the last, by command."""
    with ThreadingHTTPServer(("127.0.0.1", 0), ImageServer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        result: dict[str, dict[str, float]] = {name: {} for name in options.commands}
        last: dict[str, tuple[int, int]] = {}
        first: dict[str, tuple[int, int]] = {}
        for rows in options.rows:
            source = write_rows(folder / f"rows{rows}", rows)
            for name in options.commands:
                count = min(rows, MOST_DOWNLOADS) if name == "download" else rows
                if f"{count} rows" in result[name]:
                    continue
                used = (
                    write_urls(folder / f"urls{count}.csv", server, count) if name == "download" else source
                )
                peak = peak_bytes(name, used, folder, count)
                result[name][f"{count} rows"] = round(peak / 2**20, 1)
                first.setdefault(name, (count, peak))
                last[name] = (count, peak)
                print(f"{name}: {count} rows, peak {peak / 2**20:.0f} MiB", file=sys.stderr, flush=True)
        server.shutdown()
    for name in options.commands:
        (few, small), (many, large) = first[name], last[name]
        result[name]["bytes_a_row"] = round(max(0, large - small) / max(many - few, 1), 1)
    return result


def write_urls(path: Path, server: ThreadingHTTPServer, rows: int) -> Path:
    """A Wukong list of the server's images."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("url", "caption"))
        writer.writerows(
            (f"http://127.0.0.1:{server.server_port}/{i}", f"\u4e00\u4ef6\u4e0a\u8863 {i}")
            for i in range(rows)
        )
    return path


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print one JSON object."""
    options = parse_options(Options, argv, description=__doc__)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(options, Path(folder))
    print(json.dumps(result))
    over = [name for name, metrics in result.items() if metrics["bytes_a_row"] > LIMITS[name]]
    if over:
        print(
            f"over the limit of bytes a row: {', '.join(f'{n} {LIMITS[n]}' for n in over)}", file=sys.stderr
        )
        raise SystemExit(1)


if __name__ == "__main__":
    main()
