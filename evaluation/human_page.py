"""The page of evaluation.human and its server: the standard library's, since a handful of raters is all it gets."""

import json
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from common.console.html import render
from common.text.language import Language, Words, words_of

MAX_BODY = 4096  # bytes of a choice
MAX_NAME = 64  # characters of a rater's name


class Handler(BaseHTTPRequestHandler):
    """Answers for the study of its server."""

    server: "StudyServer"
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        if url.path == "/":
            page = render("evaluation/templates/human.html", self.server.words)
            self._send(page.encode(), "text/html; charset=utf-8")
        elif url.path == "/next":
            self._try(lambda: self.server.study.next(_rater(query)))
        elif url.path == "/image":
            self._image(query)
        else:
            self._json({"error": f"no page {url.path}"}, HTTPStatus.NOT_FOUND)

    def do_POST(self) -> None:
        if urlsplit(self.path).path != "/choice":
            self._json({"error": "choices go to /choice"}, HTTPStatus.NOT_FOUND)
            return
        length = self.headers.get("Content-Length", "")
        if not length.isdigit() or int(length) > MAX_BODY:
            self.close_connection = True
            self._json({"error": "the choice is too long"}, HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
            return
        body = self.rfile.read(int(length))
        self._try(lambda: {"new": self.server.study.record(*_choice(body))})

    def _image(self, query: dict[str, str]) -> None:
        try:
            data = self.server.study.image(_rater(query), query.get("pair", ""), query.get("side", ""))
        except (ValueError, OSError) as error:
            self._json({"error": str(error)}, HTTPStatus.BAD_REQUEST)
            return
        self._send(data, "image/png")

    def _try(self, answer: Any) -> None:
        try:
            value = answer()
        except (ValueError, OSError) as error:
            self._json({"error": str(error)}, HTTPStatus.BAD_REQUEST)
            return
        self._json(value)

    def _json(self, value: Any, status: HTTPStatus = HTTPStatus.OK) -> None:
        self._send(json.dumps(value, ensure_ascii=False).encode(), "application/json", status)

    def _send(self, data: bytes, kind: str, status: HTTPStatus = HTTPStatus.OK) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *values: Any) -> None:
        """Silence: a line an image says nothing."""


class StudyServer(ThreadingHTTPServer):
    """One study at one address."""

    def __init__(self, study: Any, host: str, port: int, words: Words) -> None:
        self.study, self.words = study, words
        super().__init__((host, port), Handler)


def serve(study: Any, host: str, port: int, language: Language = "auto") -> StudyServer:
    """A server of `evaluation.human.Study`, bound and not yet serving. Raises ValueError when it cannot be."""
    try:
        return StudyServer(study, host, port, words_of(language, "human"))
    except OSError as error:
        raise ValueError(
            f"cannot listen on {host}:{port} ({error}): choose another --port or --host"
        ) from error


def _rater(query: dict[str, Any]) -> str:
    name = query.get("rater")
    if not isinstance(name, str) or not name.strip() or len(name) > MAX_NAME:
        raise ValueError(f"a rater needs a name of at most {MAX_NAME} characters")
    return name.strip()


def _choice(body: bytes) -> tuple[str, str, str, float]:
    """Raises ValueError for anything but a choice."""
    value = json.loads(body)
    if not isinstance(value, dict):
        raise ValueError("a choice is an object")
    seconds = value.get("seconds")
    if not isinstance(seconds, (int, float)) or not 0 <= seconds < 1e7:
        raise ValueError(f"seconds must be a time, not {seconds!r}")
    return _rater(value), str(value.get("pair")), str(value.get("choice")), float(seconds)
