"""The page of evaluation.human and its server: the standard library's, since a handful of raters is all it gets."""

import html
import json
import re
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from common.language import Language, Words, words_of

MAX_BODY = 4096  # bytes of a choice
MAX_NAME = 64  # characters of a rater's name

PAGE = """<!doctype html>
<html lang="[[en]]"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<title>[[Which one is better?]]</title>
<style>
body{font:16px/1.5 system-ui,"Noto Sans CJK SC","Noto Sans SC","PingFang SC","Microsoft YaHei",sans-serif;margin:0;
background:#fafafa;color:#222;text-align:center}
main{max-width:64rem;margin:0 auto;padding:1rem}
h1{font-size:1.6rem;margin:.6rem 0;overflow-wrap:anywhere;max-height:9rem;overflow-y:auto}
.two{display:flex;gap:1.2rem;justify-content:center}
.two button{flex:1 1 0;max-width:30rem;padding:.5rem;border:3px solid #ddd;background:#fff;cursor:pointer;
border-radius:.5rem}
.two button:hover,.two button:focus-visible{border-color:#4c78a8;outline:none}
img{width:100%;aspect-ratio:1;object-fit:contain;display:block;image-rendering:auto}
.rest{margin:1rem 0}.rest button,form button{font:inherit;padding:.4rem 1.2rem;margin:.2rem;border:1px solid #bbb;
background:#fff;border-radius:.4rem;cursor:pointer}
input{font:inherit;padding:.4rem .6rem}progress{width:100%;height:.5rem}small{color:#777}
[hidden]{display:none!important}
</style></head><body><main>
<form id="start"><h1>[[Which one is better?]]</h1>
<p>[[Two images of one text: choose the one that shows what it says, and looks better.]]</p>
<p><input id="name" maxlength="64" placeholder="[[your name]]" required> <button>[[Start]]</button></p></form>
<section id="ask" hidden><progress id="bar"></progress><small id="count"></small><h1 id="text"></h1>
<div class="two"><button data-choice="left" aria-label="left"><img id="left" alt=""><small>1 / ←</small></button>
<button data-choice="right" aria-label="right"><img id="right" alt=""><small>2 / →</small></button></div>
<p class="rest"><button data-choice="equal">[[Equally good]] <small>0</small></button>
<button data-choice="both_bad">[[Both are bad]] <small>-</small></button></p></section>
<section id="end" hidden><h1>[[All pairs are done, thank you.]]</h1></section>
<p id="error" role="alert"></p>
</main><script>
const $ = id => document.getElementById(id);
let rater = "", pair = null, shown = 0, busy = false;
async function call(path, options) {
  const answer = await fetch(path, options), value = await answer.json();
  if (!answer.ok) throw new Error(value.error);
  return value;
}
async function ask() {
  const next = await call("/next?rater=" + encodeURIComponent(rater));
  pair = next.pair || null;
  $("start").hidden = true; $("ask").hidden = !pair; $("end").hidden = !!pair;
  $("bar").max = next.total; $("bar").value = next.done; $("count").textContent = next.done + " / " + next.total;
  if (!pair) return;
  $("text").textContent = next.text;
  await Promise.all(["left", "right"].map(side => {
    $(side).src = "/picture?pair=" + pair + "&side=" + side + "&rater=" + encodeURIComponent(rater);
    return $(side).decode();
  }));
  shown = performance.now();
}
async function choose(choice) {
  if (busy || !pair) return;
  busy = true;
  try {
    const body = JSON.stringify({rater, pair, choice, seconds: (performance.now() - shown) / 1000});
    await call("/choice", {method: "POST", headers: {"Content-Type": "application/json"}, body});
    await ask();
    $("error").textContent = "";
  } catch (error) { $("error").textContent = error.message; }
  busy = false;
}
$("start").onsubmit = event => {
  event.preventDefault(); begin($("name").value.trim());
};
function begin(name) {
  rater = name;
  ask().catch(error => $("error").textContent = error.message);
}
const invited = new URLSearchParams(location.search).get("rater");
if (invited) begin(invited.trim());
document.querySelectorAll("[data-choice]").forEach(b => b.onclick = () => { b.blur(); choose(b.dataset.choice); });
const keys = {"1": "left", ArrowLeft: "left", "2": "right", ArrowRight: "right", "0": "equal", "-": "both_bad"};
document.onkeydown = event => {
  if (!event.repeat && keys[event.key] && !$("ask").hidden) { event.preventDefault(); choose(keys[event.key]); }
};
</script></body></html>
"""


def page_in(words: Words) -> str:
    """The page in a language: what stands in [[ ]] is looked up in its words."""
    return re.sub(r"\[\[(.+?)\]\]", lambda found: html.escape(words(found[1])), PAGE)


class Handler(BaseHTTPRequestHandler):
    """Answers for the study of its server."""

    server: "StudyServer"
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        if url.path == "/":
            self._send(page_in(self.server.words).encode(), "text/html; charset=utf-8")
        elif url.path == "/next":
            self._try(lambda: self.server.study.next(_rater(query)))
        elif url.path == "/picture":
            self._picture(query)
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

    def _picture(self, query: dict[str, str]) -> None:
        try:
            data = self.server.study.picture(_rater(query), query.get("pair", ""), query.get("side", ""))
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
        """Silence: a line a picture says nothing."""


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
