"""The service under requests that no honest client sends, and under kills.

    python -m benchmarks.service.fuzz                                       # 2,000 requests, 50 kills, minutes
    python -m benchmarks.service.fuzz --requests 10000 --kills 1000         # hours on two cores

First requests of broken HTTP, JSON, images, headers and connections, from several clients at once. Then kills: of the
model worker (SIGKILL), of clients in the middle of a request, now and then of the whole service, while others ask for
images. It ends with exit code 1 unless: no answer was a 500, no traceback is in the log, the service's folders hold
what it writes and nothing else, no key stands in any log, every image that was answered is there and in the audit
log, and the chain of the audit log is whole.
"""

import base64
import collections
import contextlib
import hashlib
import io
import json
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
from PIL import Image

from common.config import command, parse_options
from common.log import say
from serve.audit import verify
from serve.keys import KeyStore, Limits, open_database

ROOT = Path(__file__).parents[2]
TEXT = "一件红色的连衣裙"
GENERATIONS, EDITS, VARIATIONS = (f"/v1/images/{name}" for name in ("generations", "edits", "variations"))
ALLOWED_ERRORS = (503, 504)  # of 5xx: restarting or too many connections, and the deadline
WORKER_SHARE, SERVICE_EVERY = (
    0.2,
    100,
)  # kills that hit the worker; every how many kills the whole service is killed
SILENCE_S = 20.0  # without an answer a connection counts as unanswered


@dataclass(frozen=True)
class Options:
    """Fuzz the service, then kill parts of it."""

    requests: int = 2000
    """Fuzzed requests."""
    kills: int = 50
    """Random kills."""
    clients: int = 8
    """Connections at once."""
    seed: int = 0
    """Of all that is random here."""
    checkpoint: str = ""
    """Generator to serve; empty: the newest of runs/, else the one that ships."""
    start_seconds: float = 180.0
    """Longest that a start of the service may take."""

    def __post_init__(self) -> None:
        if self.requests < 0 or self.kills < 0 or self.clients < 1:
            raise ValueError("requests and kills must be 0 or more, clients at least 1")


@dataclass(frozen=True)
class Target:
    """Where the service listens, and a key that may do everything."""

    host: str
    port: int
    key: str


@dataclass
class Found:
    """What the clients saw."""

    statuses: collections.Counter[str] = field(default_factory=collections.Counter)
    bad: list[str] = field(default_factory=list)
    """Requests that were answered with a 500 or the like."""

    def add(self, answer: bytes, sent: bytes) -> None:
        status = answer[9:12].decode("latin-1") if answer.startswith(b"HTTP/1.1 ") else ""
        self.statuses[status or "closed"] += 1
        if status.startswith("5") and int(status) not in ALLOWED_ERRORS:
            self.bad.append(f"{status} for {sent[:300]!r}")


# --- what is sent -------------------------------------------------------------------------------------------------


class Fuzzer:
    """Requests as bytes, all from one source of randomness."""

    def __init__(self, rng: random.Random, target: Target) -> None:
        self.rng, self.target = rng, target

    def request(self) -> bytes:
        """One request; nothing of it need be valid."""
        makers = (self.json_request, self.form_request, self.http_request, self.get_request)
        data = self.rng.choice(makers)()
        return self.damaged(data) if self.rng.random() < 0.15 else data

    def damaged(self, data: bytes) -> bytes:
        """Some bytes changed, or cut off."""
        data = bytearray(data)
        for _ in range(self.rng.randint(1, 6)):
            if data:
                data[self.rng.randrange(len(data))] = self.rng.randrange(256)
        return bytes(data[: self.rng.randint(0, len(data))] if self.rng.random() < 0.3 else data)

    def headers(self, **more: str) -> list[tuple[str, str]]:
        rng, key = self.rng, self.target.key
        authorizations = (
            f"Bearer {key}", f"Bearer {key}", f"Bearer {key}", f"Bearer {key}x", f"bearer  {key}", f"Basic {key}",
            "Bearer", "Bearer pp-", "Bearer pp-a-b-c", f"Bearer {key[:20]}", f"Bearer {'9' * 5000}", "", "\x7f\xe9",
        )  # fmt: skip
        found = [("Host", "x"), ("Authorization", rng.choice(authorizations))]
        extra = (
            ("Expect", "100-continue"), ("Upgrade", "websocket"), ("Connection", "Upgrade"), ("X-A", "b" * 3000),
            ("Accept-Encoding", "gzip, br"), ("Origin", "http://evil.example"), ("Range", "bytes=0-0"),
            ("Content-Encoding", "gzip"), ("Cookie", "a=" + "\xff" * 40), ("X-Forwarded-For", "' or 1=1"),
            ("Transfer-Encoding", rng.choice(("chunked", "gzip", "identity, chunked"))), ("Host", "y"),
            ("Host", "["), ("Host", "a b/\\"),
        )  # fmt: skip
        found += rng.sample(extra, rng.choice((0, 0, 0, 1, 2)))
        return found + list(more.items())

    def post(self, path: str, media: str, body: bytes) -> bytes:
        rng = self.rng
        length = rng.choice((len(body),) * 12 + (0, len(body) + 7, 10**12, -1, max(0, len(body) - 3)))
        headers = self.headers(**{"Content-Type": media, "Content-Length": str(length)})
        head = f"POST {path} HTTP/1.1\r\n" + "".join(f"{n}: {v}\r\n" for n, v in headers) + "\r\n"
        return head.encode("latin-1") + body

    def value(self, depth: int = 0) -> object:
        """Anything that JSON can say, and what it cannot."""
        rng = self.rng
        simple = (
            None, True, False, 0, 1, -1, 2, 16, 17, 2**31, 2**53, 2**63, 10**400, 0.5, -0.0, 1e308, float("nan"),
            float("inf"), "", "x", TEXT, "\x00", "\ud800", "♞" * 3, "红" * 2001, "256x256", "1x1", "auto", "b64_json",
            "../../etc/passwd", "' or 1=1 --", "{{7*7}}", "13812345678", "A" * 5000, self.image_base64(),
        )  # fmt: skip
        if depth < 4 and rng.random() < 0.2:
            inner = [self.value(depth + 1) for _ in range(rng.randint(0, 4))]
            return inner if rng.random() < 0.5 else {str(v)[:20]: v for v in inner}
        return rng.choice(simple)

    def fields(self) -> dict[str, object]:
        rng = self.rng
        fields: dict[str, object] = {"prompt": TEXT}
        names = (
            "model", "n", "size", "quality", "response_format", "output_format", "user", "stream", "partial_images",
            "seed", "cfg_scale", "cfg_schedule", "temperature", "top_k", "top_p", "min_p", "negative", "rank", "label",
            "whiten", "line", "line_scale", "recolour", "strength", "prompt", "style", "__proto__", "self", "元",
        )  # fmt: skip
        for name in rng.sample(names, rng.randint(0, 5)):
            fields[name] = self.value()
        sound = {"n": 2, "stream": True, "partial_images": 2, "whiten": True, "rank": False, "seed": 7}
        for name in rng.sample(list(sound), rng.randint(0, 3)):
            fields[name] = sound[name]
        if rng.random() < 0.1:
            fields.pop("prompt", None)
        return fields

    def json_request(self) -> bytes:
        rng = self.rng
        text = json.dumps(
            self.fields() if rng.random() < 0.9 else self.value(), ensure_ascii=rng.random() < 0.5
        )
        whole = rng.random()
        if whole < 0.05:
            text = "[" * 100_000
        elif whole < 0.1:
            text = text[:-1] + ', "n": 1, "n": "2"}'
        elif whole < 0.15:
            text = text + text
        media = rng.choice(
            ("application/json",) * 6 + ("text/plain", "multipart/form-data", "a/b; charset=\xff", "")
        )
        body = text.encode("utf-8", "surrogatepass")
        body = self.damaged(body) if rng.random() < 0.15 else body
        return self.post(rng.choice((GENERATIONS,) * 5 + (EDITS, VARIATIONS)), media, body)

    def image_file(self) -> bytes:
        """An image file, sound or not."""
        rng = self.rng
        size = rng.choice(((40, 40), (64, 48), (1, 1), (1, 300), (128, 128), (500, 3)))
        mode = rng.choice(("RGB", "RGBA", "L", "LA", "P", "1", "I;16", "CMYK", "F"))
        file_format = rng.choice(("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"))
        image = Image.frombytes("RGB", size, rng.randbytes(size[0] * size[1] * 3))
        buffer = io.BytesIO()
        try:
            image.convert(mode).save(buffer, file_format)
        except (OSError, ValueError, KeyError):  # a format that has no such mode
            image.save(buffer, "PNG")
        data = buffer.getvalue()
        kind = rng.random()
        if kind < 0.3:
            return self.damaged(data)
        if kind < 0.4 and data.startswith(b"\x89PNG"):  # a header that promises a bomb
            return data[:16] + struct.pack(">II", rng.choice((30_000, 2**31)), 30_000) + data[24:]
        return rng.randbytes(200) if kind < 0.45 else data

    def image_base64(self) -> str:
        text = base64.b64encode(self.image_file()).decode()
        return self.rng.choice((text, "data:image/png;base64," + text, text[:-1], text + "\n", "data:,"))

    def form_request(self) -> bytes:
        rng, boundary = self.rng, self.rng.choice(("b", "b" * 70, "b b", '"b"', "\xe9", ""))
        parts = []
        for name, value in self.fields().items():
            text = value if isinstance(value, str) else json.dumps(value)
            parts.append((f'name="{name}"', text.encode("utf-8", "surrogatepass")))
        for name in rng.sample(("image", "mask", "image[]", "line", "x"), rng.randint(0, 3)):
            filename = rng.choice(("a.png", "../../x.png", "\x00", "a" * 300, 'q".png', ""))
            parts.append((f'name="{name}"; filename="{filename}"', self.image_file()))
        if rng.random() < 0.6:
            parts.append(('name="image"; filename="i.png"', self.image_file()))
        rng.shuffle(parts)
        mark = boundary.strip('"').encode("latin-1")
        body = b"".join(
            b"--" + mark + b"\r\nContent-Disposition: form-data; " + head.encode("utf-8", "surrogatepass")
            + b"\r\n\r\n" + data + b"\r\n" for head, data in parts
        )  # fmt: skip
        body += b"--" + mark + rng.choice((b"--\r\n",) * 5 + (b"", b"--", b"\r\n"))
        return self.post(rng.choice((EDITS, VARIATIONS)), f"multipart/form-data; boundary={boundary}", body)

    def get_request(self) -> bytes:
        rng = self.rng
        paths = (
            "/", "/docs", "/openapi.json", "/metrics", "/healthz", "/readyz", "/v1/models", "/v1/models/" + "x" * 300,
            "/images/../../keys.db", "/images/%2e%2e%2fkeys.db", "/images/" + "a" * 32 + ".png", "/images/%00.png",
            "/static/../app.py", "/static/..%2fapp.py", "/static//etc/passwd", "/static/%c0%ae%c0%ae/", "/static/",
            "/static/%00x", "/static/" + "a" * 5000, "/static", "/static/app.js?" + "q" * 2000, "//x", "*", "/%ff%fe",
            "http://x/v1/models", "/" + "a" * 9000, "/v1/图",
        )  # fmt: skip
        method = rng.choice(
            ("GET",) * 6 + ("HEAD", "OPTIONS", "DELETE", "PUT", "TRACE", "PATCH", "get", "X" * 50)
        )
        headers = "".join(f"{n}: {v}\r\n" for n, v in self.headers())
        return f"{method} {rng.choice(paths)} HTTP/1.1\r\n{headers}\r\n".encode("utf-8", "replace")

    def http_request(self) -> bytes:
        """Grammar of HTTP broken on purpose."""
        rng, get = self.rng, b"GET /healthz HTTP/1.1\r\nHost: x\r\n"
        chunked = f"POST {GENERATIONS} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
        broken = (
            b"",
            b"\r\n" * 50,
            rng.randbytes(300),
            b"GET /\r\n\r\n",
            b"GET / HTTP/9.9\r\n\r\n",
            b"GET  /  HTTP/1.1\r\n\r\n",
            get + b"A" * 200_000 + b"\r\n\r\n",
            get + b"X: 1\r\n" * 3000 + b"\r\n",
            get + b"X : 1\r\n\r\n",
            get + b" folded: 1\r\n\r\n",
            get + b"\r\n" + get + b"\r\n",
            get + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
            get + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            get.replace(b"\r\n", b"\n") + b"\n",
            chunked + b"zz\r\n",
            chunked + b"5\r\nab",
            chunked + b"FFFFFFFFFFFFFFFFF\r\na",
            chunked + b"0\r\n\r\n",
            chunked + b"2\r\n{}\r\n0\r\n\r\n",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc",  # TLS
        )
        return rng.choice(broken)


def send(target: Target, data: bytes, rng: random.Random) -> bytes:
    """The first bytes of the answer to `data`, sent as honest or as broken clients send."""
    way = rng.random()
    with contextlib.suppress(OSError), socket.create_connection((target.host, target.port), SILENCE_S) as s:
        if way < 0.06:  # slowly, then gone in the middle
            for i in range(0, min(len(data), 40), 8):
                s.sendall(data[i : i + 8])
                time.sleep(0.02)
            return b""
        if way < 0.1:  # reset in the middle
            s.sendall(data[: len(data) // 2])
            s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return b""
        if way < 0.14:  # all of it, and gone without reading
            s.sendall(data)
            return b""
        with contextlib.suppress(OSError):  # refused before all of it was sent: the answer is there already
            s.sendall(data)
            if way < 0.6:
                s.shutdown(socket.SHUT_WR)
        s.settimeout(SILENCE_S if way < 0.6 else 3.0)
        return s.recv(4096)
    return b""


def fuzz(target: Target, requests: int, clients: int, seed: int) -> Found:
    """Send fuzzed requests from several threads."""
    found, numbers, lock = Found(), iter(range(requests)), threading.Lock()

    def client() -> None:
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            rng = random.Random(f"{seed}-{number}")
            data = Fuzzer(rng, target).request()
            answer = send(target, data, rng)
            with lock:
                found.add(answer, data)

    _run_all([client] * clients)
    return found


def _run_all(functions: Sequence[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=function) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


# --- the service --------------------------------------------------------------------------------------------------


class Server:
    """The service in processes of its own, in a folder of its own."""

    def __init__(self, folder: Path, checkpoint: str, start_seconds: float) -> None:
        self.folder, self.start_seconds = folder, start_seconds
        store = KeyStore(open_database(f"sqlite:///{folder}/keys.db"))
        key, _ = store.create("fuzz", limits=Limits(0, 0, 0, 0))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.target = Target("127.0.0.1", free.getsockname()[1], key)
        (folder / "cwd").mkdir()
        self.flags = [
            "--port", str(self.target.port), "--database", f"sqlite:///{folder}/keys.db", "--audit-dir",
            f"{folder}/audit", "--image-dir", f"{folder}/served", "--log-prompts", "--ranker", "none",
            "--body-seconds", "5", "--image-minutes", "10000", "--checkpoint", checkpoint,
        ]  # fmt: skip
        self.log = folder / "log.txt"
        self.process: subprocess.Popen | None = None
        self.start()

    def start(self) -> None:
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "serve", *self.flags],
                stdout=log,
                stderr=log,
                cwd=self.folder / "cwd",
                env=environment,
            )
        self.wait_ready()

    @property
    def url(self) -> str:
        return f"http://{self.target.host}:{self.target.port}"

    def wait_ready(self) -> None:
        until = time.monotonic() + self.start_seconds
        while time.monotonic() < until and self.process.poll() is None:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/readyz", timeout=10).status_code == 200:
                    return
            time.sleep(0.1)
        raise ValueError(f"the service did not start: {self.log.read_text('utf-8', 'replace')[-500:]}")

    def worker(self) -> psutil.Process | None:
        """The model worker: a child of the process that workers are forked from."""
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(self.process.pid).children(recursive=True):
                if child.ppid() != self.process.pid and child.status() != psutil.STATUS_ZOMBIE:
                    return child
        return None

    def kill_worker(self) -> None:
        if worker := self.worker():
            with contextlib.suppress(psutil.Error):
                worker.kill()

    def kill(self) -> None:
        """The service at once; its worker sees the end of the pipe and ends too."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(180)


# --- kills --------------------------------------------------------------------------------------------------------


class Asking:
    """Clients that ask for images as long as the kills go on, and remember what they were answered."""

    def __init__(self, server: Server) -> None:
        self.server, self.is_over = server, False
        self.statuses: collections.Counter[int | str] = collections.Counter()
        self.answered: list[tuple[str, str]] = []  # name of the file, SHA-256

    def ask(self, number: int) -> None:
        headers = {"Authorization": f"Bearer {self.server.target.key}"}
        seed = 1000 * number
        while not self.is_over:
            seed += 1
            body = {"prompt": TEXT, "n": 1 + seed % 2, "seed": seed}
            try:
                answer = httpx.post(f"{self.server.url}{GENERATIONS}", json=body, headers=headers, timeout=60)
                self.statuses[answer.status_code] += 1
                for entry in answer.json()["data"] if answer.status_code == 200 else ():
                    image = httpx.get(entry["url"], timeout=60)
                    image.raise_for_status()
                    name = entry["url"].rpartition("/")[2]
                    self.answered.append((name, hashlib.sha256(image.content).hexdigest()))
            except httpx.TransportError:  # the whole service was killed
                self.statuses["no answer"] += 1
                time.sleep(0.2)
                continue
            if answer.status_code != 200:
                time.sleep(0.2)


def hang_up(target: Target, rng: random.Random) -> None:
    """A client that is killed in the middle of its request or of its answer."""
    stream = rng.random() < 0.5
    body = json.dumps(
        {"prompt": TEXT, "n": 4, "stream": stream, "partial_images": 4 if stream else 0}
    ).encode()
    head = (
        f"POST {GENERATIONS} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {target.key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    data = head.encode() + body
    with contextlib.suppress(OSError), socket.create_connection((target.host, target.port), 10) as s:
        s.sendall(data if rng.random() < 0.8 else data[: rng.randrange(len(data))])
        time.sleep(rng.random() * 0.5)
        s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def kill_at_random(server: Server, kills: int, seed: int) -> Asking:
    """`kills` kills while three clients ask."""
    asking, rng = Asking(server), random.Random(f"kills-{seed}")
    threads = [threading.Thread(target=asking.ask, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    try:
        for number in range(1, kills + 1):
            time.sleep(rng.random() * 0.6)
            if number % SERVICE_EVERY == 0:
                server.kill()
                server.start()
            elif rng.random() < WORKER_SHARE:
                server.kill_worker()
            else:
                hang_up(server.target, rng)
    finally:
        asking.is_over = True
        for thread in threads:
            thread.join()
    return asking


# --- what must hold -----------------------------------------------------------------------------------------------

OURS = re.compile(
    r"keys\.db(-wal|-shm)?|log\.txt|cwd|audit|served|audit/(audit_\d{12}\.jsonl|head\.json)"
    r"|served/[A-Za-z0-9_\-]{32}\.(png|jpeg|webp)|(audit|served)/\..*\.\d+\.tmp"
)  # the last: half written when the service was killed


def problems_of(folder: Path, key: str, answered: Sequence[tuple[str, str]]) -> list[str]:
    """What is wrong with the folder of a service that has ended."""
    found = []
    names = [str(path.relative_to(folder)) for path in folder.rglob("*")]
    found += [f"a file that it should not have written: {name}" for name in names if not OURS.fullmatch(name)]
    log = (folder / "log.txt").read_bytes() if (folder / "log.txt").is_file() else b""
    audit = b"".join(path.read_bytes() for path in sorted((folder / "audit").glob("*.jsonl")))
    if b"Traceback" in log:
        found.append(
            f"a traceback in the log: {log[log.index(b'Traceback') :][:3000].decode('utf-8', 'replace')}"
        )
    secret = key.split("-", 2)[2].encode()
    found += [
        f"the key stands in the {what}" for what, data in (("log", log), ("audit", audit)) if secret in data
    ]
    try:
        count = verify(folder / "audit")
        say(f"audit: {count} records, the chain is whole")
    except ValueError as error:
        found.append(str(error))
    lost = [name for name, digest in answered if not _is_kept(folder / "served" / name, digest)]
    unrecorded = [name for name, digest in answered if digest.encode() not in audit]
    found += [f"{len(lost)} answered images are lost"] * bool(lost)
    found += [f"{len(unrecorded)} answered images are not in the audit log"] * bool(unrecorded)
    return found


def _is_kept(path: Path, digest: str) -> bool:
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == digest


@command
def main(argv: Sequence[str] | None = None) -> list[str]:
    """Fuzz and kill; returns what was wrong, and ends the process with 1 where something was."""
    options = parse_options(Options, argv, description=__doc__)
    os.environ.setdefault("NO_PROXY", "127.0.0.1")
    from dalle import default_checkpoint

    checkpoint = str(Path(options.checkpoint or default_checkpoint()).resolve())
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        server = Server(folder, checkpoint, options.start_seconds)
        found = fuzz(server.target, options.requests, options.clients, options.seed)
        say(f"{options.requests} requests: {dict(found.statuses.most_common())}")
        server.wait_ready()
        asking = kill_at_random(server, options.kills, options.seed)
        server.wait_ready()
        say(f"{options.kills} kills: {dict(asking.statuses)}, {len(asking.answered)} images answered")
        code = server.stop()
        problems = found.bad + problems_of(folder, server.target.key, asking.answered)
        problems += [f"the service ended with code {code} after SIGTERM"] * (code != 0)
        problems += ["no request was answered while parts were killed"] * (
            options.kills > 0 and not asking.answered
        )
    for problem in problems[:20]:
        say(f"wrong: {problem}")
    say(f"{len(problems)} things are wrong" if problems else "nothing is wrong")
    if problems:
        sys.exit(1)
    return problems


if __name__ == "__main__":
    main()
