"""An image server on 127.0.0.1 for the tests: a folder of files and a few paths that misbehave."""

import socketserver
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler
from pathlib import Path

from make_sources import some_image


class Server(socketserver.ThreadingTCPServer):
    """Serves `folder`; counts requests by path; `delay` seconds each."""

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, folder: Path | None = None, delay: float = 0.0):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.delay = folder, delay
        self.requests: Counter[str] = Counter()
        self.total = 0
        self.broken = True
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address) -> None:
        """A client that was killed is no news."""

    def __exit__(self, *_) -> None:
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # headers and body in one packet: no 40 ms of delayed acknowledgements
    server: Server

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        with self.server.lock:
            self.server.requests[self.path] += 1
            self.server.total += 1
            times = self.server.requests[self.path]
        time.sleep(self.server.delay)
        if method := getattr(self, "get_" + self.path.strip("/").split("/")[0].replace("-", "_"), None):
            return method(times)
        path = self.server.folder / self.path.strip("/") if self.server.folder else None
        if path and path.is_file():
            return self.answer(200, path.read_bytes())
        return self.answer(404, b"gone")

    def answer(self, status: int, data: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def get_good(self, times: int) -> None:
        """/good/SEED"""
        self.answer(200, some_image(int(self.path.rpartition("/")[2])))

    def get_missing(self, times: int) -> None:
        self.answer(404)

    def get_twice_busy(self, times: int) -> None:
        self.answer(503, Retry_After="0") if times < 3 else self.answer(200, some_image(1))

    def get_always_busy(self, times: int) -> None:
        self.answer(503)

    def get_later(self, times: int) -> None:
        """Fails until the server is repaired."""
        self.answer(500) if self.server.broken else self.answer(200, some_image(2))

    def get_page(self, times: int) -> None:
        self.answer(200, b"<html>" + b"not found " * 100, Content_Type="image/jpeg")

    def get_noai(self, times: int) -> None:
        self.answer(200, some_image(1), X_Robots_Tag="noai, noimageai")

    def get_other_robot(self, times: int) -> None:
        self.answer(200, some_image(1), X_Robots_Tag="otherbot: noai")

    def get_tdm(self, times: int) -> None:
        self.answer(200, some_image(1), tdm_reservation="1")

    def get_large(self, times: int) -> None:
        self.answer(200, some_image(1) + bytes(1 << 20))

    def get_endless(self, times: int) -> None:
        """An image's first bytes, then zeros without end and without a length."""
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(some_image(1))
        for _ in range(1000):
            self.wfile.write(bytes(1 << 16))
        self.close_connection = True

    def get_short(self, times: int) -> None:
        """Promises more than it sends."""
        data = some_image(1)
        self.send_response(200)
        self.send_header("Content-Length", str(len(data) + 100))
        self.end_headers()
        self.wfile.write(data)
        self.close_connection = True

    def get_slow(self, times: int) -> None:
        time.sleep(3)
        self.answer(200, some_image(1))

    def get_to(self, times: int) -> None:
        """/to/URL: a redirect."""
        self.answer(302, Location=self.path.removeprefix("/to/"))

    def get_loop(self, times: int) -> None:
        self.answer(302, Location="/loop")
