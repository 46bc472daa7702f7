"""The model worker: a process that holds the generator and the ranker and steps all requests forward together.

It loads, measures one full batch, says `Ready`, and then repeats: read what came in, take one decode step, answer what
is complete. It knows nothing of HTTP or keys; when it ends, its requests end with it and the service starts another.
"""

import contextlib
import functools
import hashlib
import io
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from common.image import to_image
from common.outputs.label import labelled
from common.precision import autocast
from dalle import inpaint
from dalle.batching import ContinuousBatcher, Finished, Job
from dalle.lines import LineControl
from dalle.pipeline import Request, TextToImage
from data_tools.images.decode import decode
from data_tools.images.line_drawings import decode_lines
from rankers import load_ranker
from serve.messages import (
    Cancel,
    Done,
    Failed,
    Fill,
    ModelInfo,
    Partial,
    Ready,
    Refused,
    ServedImage,
    Stop,
    Work,
)
from serve.worker_options import WorkerOptions

FILL_EVERY = 1.0  # seconds between reports of how full the batch is
IDLE_POLL = 0.5  # seconds; a message wakes the worker at once
PARTIAL_FORMAT = {"png": "PNG", "jpeg": "JPEG", "webp": "WEBP"}
MEASURED_STEPS = 8
WARM_UP_TEXTS = ("一件红色的连衣裙", "红色", "a red dress")
UNKNOWN_GREY = (200, 200, 200)  # of the part of a partial image that has no tokens yet


@dataclass
class _Pending:
    """A request on its way."""

    work: Work
    job: int
    came: float
    started: float | None = None
    finished: dict[int, Finished] = field(default_factory=dict)
    shown: dict[int, int] = field(default_factory=dict)
    """Partial images sent of each image."""


def run_worker(connection: Connection, options: WorkerOptions) -> None:
    """The process's main function."""
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches the whole group: the service says when to end
    if options.threads:
        torch.set_num_threads(options.threads)
    # the service is gone: it was killed, perhaps while this process started
    with contextlib.suppress(EOFError, ConnectionError):
        _answer(connection, options)


def _answer(connection: Connection, options: WorkerOptions) -> None:
    """Until it is told to stop. Raises EOFError or ConnectionError when the other end of the pipe is closed."""
    try:
        worker = Worker(connection.send, options)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        connection.send(Failed(" ".join(str(error).split())))
        return
    connection.send(Ready(worker.info))
    while worker.is_running:
        while connection.poll(0 if worker.is_busy else IDLE_POLL):
            worker.receive(connection.recv())
        worker.step()


class Worker:
    """Requests in, images out; `send` takes messages for the service."""

    def __init__(self, send: Callable[[Any], None], options: WorkerOptions) -> None:
        """Raises ValueError or OSError for a checkpoint or ranker that cannot be loaded."""
        self.send, self.options = send, options
        self.pipeline = TextToImage.from_pretrained(options.checkpoint, options.device, options.fast)
        self.ranker = load_ranker(options.ranker, options.device) if options.ranker else None
        self.batcher = ContinuousBatcher(self.pipeline, options.max_images)
        self.pending: dict[int, _Pending] = {}
        self.is_running, self.is_stopping = True, False
        self.tokens, self.told = 0, time.monotonic()
        self.info = self._info()

    @property
    def is_busy(self) -> bool:
        return not self.batcher.is_idle

    def _info(self) -> ModelInfo:
        pipeline, options = self.pipeline, self.options
        directory = Path(options.checkpoint)
        name = directory.parent.name if directory.name == "generator" else directory.name
        return ModelInfo(
            name,
            pipeline.sha256,
            pipeline.image_tokenizer.image_size,
            self.batcher.num_tokens,
            options.max_images,
            pipeline.fast.engine,
            pipeline.fast.weights,
            self.ranker.name if self.ranker else "",
            pipeline.config.line_size if pipeline.line_encoder else 0,
            self._measure(),
        )

    def _measure(self) -> float:
        """Images a second of full batches, from some steps and one decoding; also warms everything up."""
        count, batcher, pipeline = self.options.max_images, self.batcher, self.pipeline
        text = self._known_text()
        job = batcher.submit(Job(tuple(Request(text, i) for i in range(count))))
        batcher.step()  # the texts are read in this one
        started = time.perf_counter()
        for _ in range(MEASURED_STEPS):
            batcher.step()
        seconds = (time.perf_counter() - started) / MEASURED_STEPS * batcher.num_tokens
        ids = torch.stack([ids for _, ids, _ in batcher.progress(job)])
        batcher.cancel(job)
        started = time.perf_counter()
        images = pipeline.decode_ids(ids.to(pipeline.device))
        if self.ranker:
            self.ranker.score(text, images)
        return count / (seconds + time.perf_counter() - started)

    def _known_text(self) -> str:
        """A text that the tokenizer can read. Raises ValueError when it reads none of ours."""
        for text in WARM_UP_TEXTS:
            try:
                self.pipeline.encode_text(text)
            except ValueError:
                continue
            return text
        raise ValueError(
            f"the text tokenizer reads none of {', '.join(WARM_UP_TEXTS)}: what language is it for?"
        )

    def receive(self, message: Work | Cancel | Stop) -> None:
        """Take a message of the service."""
        if isinstance(message, Stop):
            self.is_stopping = True
        elif isinstance(message, Cancel):
            for number in [n for n, p in self.pending.items() if p.work.id == message.id]:
                self.batcher.cancel(number)
                del self.pending[number]
        else:
            try:
                number = self.batcher.submit(self._job(message))
            except ValueError as error:  # a text of unknown characters, an image that cannot be read ...
                self.send(Refused(message.id, " ".join(str(error).split())))
                return
            self.pending[number] = _Pending(message, number, time.perf_counter())

    def _job(self, work: Work) -> Job:
        requests = tuple(Request(work.prompt, i) for i in range(work.num_candidates))
        line = LineControl(decode_lines(work.line.image), work.line.scale) if work.line else None
        return Job(requests, work.seed, work.options, work.negative, self._source(work), line)

    def _source(self, work: Work) -> inpaint.Source | None:
        if work.source is None:
            return None
        tokenizer, image = self.pipeline.image_tokenizer, decode(work.source.image)
        if work.source.mode == "vary":
            return inpaint.vary(tokenizer, image, work.source.strength)
        if work.source.mode == "recolour":
            return inpaint.keep_background(tokenizer, image)
        return inpaint.inpaint(tokenizer, image, decode(work.source.mask))

    def step(self) -> None:
        """One decode step, and the answers that it completes."""
        if self.is_busy:
            for image in self.batcher.step():
                self.pending[image.job].finished[image.number] = image
            self.tokens += len(self.batcher.active)
            now = time.perf_counter()
            for image in self.batcher.active:
                pending = self.pending[image.job]
                pending.started = pending.started or now
            for number in [n for n, p in self.pending.items() if len(p.finished) == p.work.num_candidates]:
                self._answer(self.pending.pop(number))
            for pending in self.pending.values():
                if pending.work.partial_images:
                    self._show_progress(pending)
        elif self.is_stopping:
            self.is_running = False
        if time.monotonic() - self.told >= FILL_EVERY:
            self.send(Fill(len(self.batcher.active), len(self.batcher.waiting), self.tokens))
            self.tokens, self.told = 0, time.monotonic()

    def _answer(self, pending: _Pending) -> None:
        work, now = pending.work, time.perf_counter()
        seconds = {"wait": (pending.started or now) - pending.came, "sample": now - (pending.started or now)}
        found = [pending.finished[i] for i in range(work.num_candidates)]
        images = self.pipeline.decode_ids(torch.stack([f.ids for f in found]).to(self.pipeline.device))
        now, seconds["decode"] = _lap(now)
        is_white: list[bool | None] = [None] * len(images)
        if work.whiten:
            whitened = [self._whitener(image) for image in images]
            images, is_white = [w.image for w in whitened], [w.is_white for w in whitened]
            now, seconds["whiten"] = _lap(now)
        order, scores = list(range(len(images))), [None] * len(images)
        if work.rank and self.ranker:
            scores = self.ranker.score(work.prompt, images).tolist()
            order.sort(key=lambda i: (-scores[i], i))
        now, seconds["rank"] = _lap(now)
        served = tuple(
            ServedImage(
                self._encode(work, images[i], i),
                i,
                found[i].log_likelihood,
                scores[i],
                self._percentile(scores[i]),
                is_white[i],
            )
            for i in order[: work.num_images]
        )
        _, seconds["encode"] = _lap(now)
        self.send(Done(work.id, served, seconds))

    @functools.cached_property
    def _whitener(self) -> Any:
        from diffusion.white_background import Whitener  # when it is first asked for: a start takes no longer

        return Whitener()

    def _percentile(self, score: float | None) -> float | None:
        calibration = self.ranker.calibration if self.ranker else None
        return None if score is None or calibration is None else round(calibration.percentile(score), 2)

    def _encode(self, work: Work, image: Image.Image, index: int) -> bytes:
        if work.side != image.width:
            image = image.resize((work.side, work.side), Image.Resampling.LANCZOS)
        manifest = {
            "model": self.info.sha256,
            "text": work.prompt,
            "negative": work.negative,
            "seed": work.seed,
            "index": index,
            "sampling": vars(work.options),
        } | _inputs_of(work)
        image, arguments = labelled(image, work.output_format, work.label, manifest)
        return _encoded(image, work.output_format, **arguments)

    def _show_progress(self, pending: _Pending) -> None:
        """Send the partial images that are due: `partial_images` of each, evenly spread over its tokens."""
        work, total = pending.work, self.batcher.num_tokens
        for number, ids, count in self.batcher.progress(pending.job):
            due = count * (work.partial_images + 1) // total
            shown = pending.shown.get(number, 0)
            if shown < due <= work.partial_images:
                pending.shown[number] = due
                image = self._partial_image(ids, count)
                self.send(Partial(work.id, number, due - 1, _encoded(image, work.output_format)))

    @torch.inference_mode()
    def _partial_image(self, ids: torch.Tensor, count: int) -> Image.Image:
        """The rows of tokens that are complete; below them grey."""
        tokenizer = self.pipeline.image_tokenizer
        with autocast(self.pipeline.device):
            pixels = tokenizer.decode_ids(ids[None].to(self.pipeline.device))
        image = to_image(pixels[0].float().cpu())
        top = count // tokenizer.grid_size * tokenizer.downsample_factor
        image.paste(UNKNOWN_GREY, (0, top, image.width, image.height))
        return image


def _inputs_of(work: Work) -> dict[str, Any]:
    """What the manifest says of uploads: hashes alone."""
    found: dict[str, Any] = {}
    if work.source:
        found["source"] = {"mode": work.source.mode, "sha256": hashlib.sha256(work.source.image).hexdigest()}
        found["source"] |= {"strength": work.source.strength} if work.source.mode == "vary" else {}
    if work.line:
        found["line"] = {"scale": work.line.scale, "sha256": hashlib.sha256(work.line.image).hexdigest()}
    return found | ({"whiten": True} if work.whiten else {})


def _encoded(image: Image.Image, output_format: str, **arguments: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=PARTIAL_FORMAT[output_format], **arguments)
    return buffer.getvalue()


def _lap(since: float) -> tuple[float, float]:
    now = time.perf_counter()
    return now, now - since
