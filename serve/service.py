"""What all routes share: who may ask for what, from a request to work and back, audit and metrics."""

import asyncio
import base64
import contextlib
import hashlib
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from common.log import say
from serve.audit import AuditLog
from serve.dispatch import Dispatcher
from serve.image_store import ImageStore
from serve.keys import ApiKey, KeyStore, open_database
from serve.masking import DenyList, mask
from serve.messages import Done, LineDrawing, ModelInfo, Partial, ServedImage, SourceImage, Work
from serve.metrics import Metrics
from serve.options import ServeOptions
from serve.schemas import MAX_CANDIDATES, ApiError, ImageRequest

MAX_PATH = 200  # characters of a path in the audit log
MAX_DECODING = 2  # uploads that are decoded at once, each of up to 32 million pixels
T = TypeVar("T")


class Service:
    """What all routes share."""

    def __init__(self, options: ServeOptions, dispatcher: Dispatcher) -> None:
        """Raises ValueError or OSError for a database, directory or deny list that cannot be used."""
        self.options, self.dispatcher = options, dispatcher
        self.keys = None if options.open else KeyStore(open_database(options.database))
        self.audit = AuditLog(options.audit_dir, keep_days=options.audit_days)
        self.deny = DenyList(options.deny_list)
        self._deny_problem = ""
        self.store = ImageStore(options.image_dir, options.image_minutes)
        self.metrics = Metrics()
        self.created = int(time.time())
        self._decoding = asyncio.Semaphore(MAX_DECODING)
        dispatcher.on_fill = lambda fill: self.metrics.filled(fill, options.max_images)

    # --- who may ask for what -----------------------------------------------------------------------------------------

    def authenticate(self, request: Request, scope: str) -> ApiKey | None:
        """The key of a request; None where none is asked for. Raises ApiError."""
        if self.keys is None:
            return None
        kind, _, token = request.headers.get("authorization", "").partition(" ")
        key = self.keys.verify(token.strip()) if kind.lower() == "bearer" and token else None
        if key is None:
            raise ApiError(401, "Incorrect API key provided.", "invalid_api_key")
        if scope not in key.scopes:
            raise ApiError(403, f"This key may not {scope}.", "insufficient_scope")
        request.state.key = key
        return key

    def check_text(self, text: str, param: str) -> None:
        """Raises ApiError for a text that is empty or holds a denied word."""
        try:
            self.deny.reload()
            self._deny_problem = ""
        except (OSError, ValueError) as error:
            if str(error) != self._deny_problem:  # once, not with every request
                say(f"{error}: the words that were read last stay in force")
            self._deny_problem = str(error)
        if self.deny.find(text):
            raise ApiError(
                400, "The prompt holds a word that is not allowed.", "content_policy_violation", param
            )

    def check_model(self, name: str | None) -> None:
        info = self.dispatcher.info
        if name is not None and info is not None and name != info.name:
            raise ApiError(404, f"The model '{name[:80]}' does not exist.", "model_not_found", "model")

    def spend(self, key: ApiKey | None, images: int) -> None:
        if key is None:
            return
        wait = self.keys.spend(key, images)
        if wait:
            raise ApiError(
                429,
                f"This key's limit is reached; try again in {wait:.0f} s.",
                "rate_limit_exceeded",
                retry_after=wait,
            )

    # --- from a request to work and back ------------------------------------------------------------------------------

    def require_model(self) -> ModelInfo:
        """Raises ApiError while nothing is loaded."""
        if self.dispatcher.info is None:
            raise ApiError(503, "The model is still loading.", "model_unavailable", retry_after=5.0)
        return self.dispatcher.info

    def require_lines(self, param: str) -> None:
        """Raises ApiError where the model follows no drawings."""
        if not self.require_model().line_size:
            raise ApiError(
                400,
                f"The model {self.dispatcher.info.name} was trained without line drawings, which '{param}' needs.",
                "unsupported_by_model",
                param,
            )

    async def prepare(self, function: Callable[..., T], *arguments: Any) -> T:
        """What `serve.uploads` makes of an upload for the model, in a thread: the event loop goes on, and a few at a
        time, so that memory is bounded. Raises ApiError."""
        model = self.require_model()
        async with self._decoding:
            return await asyncio.to_thread(function, *arguments, model)

    def work(
        self,
        body: ImageRequest,
        prompt: str,
        source: SourceImage | None = None,
        line: LineDrawing | None = None,
    ) -> Work:
        """What the worker is to do. Raises ApiError."""
        self.check_text(prompt, "prompt")
        self.check_text(body.negative, "negative")
        self.check_model(body.model)
        options, info = body.sampling(), self.dispatcher.info
        side = body.side(info.image_size) if info else 0
        if body.num_candidates > MAX_CANDIDATES:
            raise ApiError(
                400,
                f"n times the candidates of this quality may be at most {MAX_CANDIDATES}, not {body.num_candidates}.",
                "invalid_value",
                "n",
            )
        label = self.options.label
        if body.label is not None:
            label = replace(label, label=_stricter(label.label, body.label))
        return Work(
            id=secrets.token_hex(12),
            prompt=prompt,
            num_images=body.n,
            num_candidates=body.num_candidates,
            seed=secrets.randbelow(2**31) if body.seed is None else body.seed,
            options=options,
            negative=body.negative,
            rank=body.rank,
            side=side,
            output_format=body.output_format,
            label=label,
            partial_images=body.partial_images if body.stream else 0,
            source=source,
            line=line,
            whiten=body.whiten,
        )

    def entry(self, image: ServedImage, body: ImageRequest, work: Work, base_url: str) -> dict[str, Any]:
        """An image of the answer."""
        entry: dict[str, Any] = {"seed": work.seed, "index": image.index}
        if image.score is not None:
            entry |= {"score": round(image.score, 6), "percentile": image.percentile}
        if image.is_white is not None:
            entry["white"] = image.is_white
        if body.response_format == "b64_json":
            return entry | {"b64_json": base64.b64encode(image.data).decode()}
        return entry | {"url": f"{base_url}images/{self.store.put(image.data, body.output_format)}"}

    def record(
        self, request: Request, key: ApiKey | None, work: Work | None, started: float, outcome: dict[str, Any]
    ) -> None:
        """One line of the audit log, on the disk before the answer leaves."""
        entry = {
            "key": key.id if key else None,
            "client": request.client.host if request.client else None,
            "endpoint": request.scope["path"][:MAX_PATH],
            "seconds": round(time.perf_counter() - started, 3),
            **outcome,
        }
        if work:
            info = self.dispatcher.info
            entry |= {
                "model": info.sha256 if info else None,
                "prompt_sha256": hashlib.sha256(work.prompt.encode()).hexdigest(),
                "seed": work.seed,
                "images": work.num_images,
                "request": work.id,
            }
            if work.source:
                entry |= {"source": work.source.mode, "source_sha256": _sha256(work.source.image)}
            if work.line:
                entry["line_sha256"] = _sha256(work.line.image)
            if self.options.log_prompts:
                entry["prompt"] = mask(work.prompt)
        self.audit.append(entry)

    async def answer(
        self,
        request: Request,
        body: ImageRequest,
        key: ApiKey | None,
        prompt: str,
        source: SourceImage | None = None,
        line: LineDrawing | None = None,
    ) -> Response:
        """Checked and queued; the whole answer, or a stream of events."""
        started, work = time.perf_counter(), None
        try:
            work = self.work(body, prompt, source, line)
            self.dispatcher.require_room(work)  # first: what a full queue refuses is not counted
            self.spend(key, work.num_candidates)
            self.dispatcher.submit(work)
            self.metrics.queued.set(self.dispatcher.queued_images)
            if body.stream:
                events = self._stream(request, body, work, key, started)
                return _EventStream(events, lambda: self._left(request, key, work, started))
            done = await self._finish(request, work)
            served = [self.entry(image, body, work, str(request.base_url)) for image in done.images]
            self.record(request, key, work, started, _outcome(done))
            self.metrics.requests.labels(endpoint(request), 200).inc()
            return JSONResponse(self._whole(served, body, work, done), headers={"cache-control": "no-store"})
        except ApiError as error:
            self.refuse(request, key, work, started, error)
            raise

    def refuse(
        self, request: Request, key: ApiKey | None, work: Work | None, started: float, error: ApiError
    ) -> None:
        """Count and record a request that is not answered with images, once."""
        if error.is_recorded:
            return
        error.is_recorded = True
        self.metrics.requests.labels(endpoint(request), error.status).inc()
        self.metrics.refused.labels(error.code).inc()
        self.record(request, key, work, started, {"decision": "refused", "code": error.code})

    def _left(self, request: Request, key: ApiKey | None, work: Work, started: float) -> None:
        """At the end of a stream, also of one whose client was gone before it began: its place is free."""
        if self.dispatcher.forget(work.id):
            self.refuse(request, key, work, started, _client_gone())

    async def _finish(self, request: Request, work: Work) -> Done:
        """Wait for the images; a client that hangs up ends the wait, which frees its place."""

        async def finished() -> Done:
            async for event in self.dispatcher.events(work.id, self.options.deadline):
                if isinstance(event, Done):
                    return event
            raise ApiError(500, "The images were lost.", "internal_error")

        waiting = asyncio.ensure_future(finished())
        gone = asyncio.ensure_future(_until_gone(request))
        try:
            await asyncio.wait((waiting, gone), return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done():
                raise _client_gone()
            done = waiting.result()
        finally:
            for task in (waiting, gone):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, ApiError):
                    await task
        self.metrics.answered(done)
        return done

    def _whole(self, served: list[dict], body: ImageRequest, work: Work, done: Done) -> dict[str, Any]:
        return {
            "created": int(time.time()),
            "data": served,
            "background": "opaque",
            "output_format": body.output_format,
            "quality": _published_quality(body.quality),
            "size": f"{work.side}x{work.side}",
            "usage": self._usage(work),
            "seconds": {name: round(value, 4) for name, value in done.stage_seconds.items()},
        }

    def _usage(self, work: Work) -> dict[str, Any]:
        read, made = len(work.prompt), work.num_candidates * self.dispatcher.info.num_tokens
        return {
            "input_tokens": read,
            "output_tokens": made,
            "total_tokens": read + made,
            "input_tokens_details": {"text_tokens": read, "image_tokens": 0},
        }

    async def _stream(
        self, request: Request, body: ImageRequest, work: Work, key: ApiKey | None, started: float
    ) -> AsyncIterator[bytes]:
        """Server-sent events: images on their way, then each finished one, or an error."""
        name = "image_edit" if work.source else "image_generation"
        common = {
            "created_at": int(time.time()),
            "size": f"{work.side}x{work.side}",
            "quality": _published_quality(body.quality),
            "background": "opaque",
            "output_format": body.output_format,
        }
        events = self.dispatcher.events(work.id, self.options.deadline)
        try:
            async for event in events:
                if isinstance(event, Partial):
                    said = {
                        "b64_json": base64.b64encode(event.data).decode(),
                        "partial_image_index": event.number,
                    }
                    yield _sse(f"{name}.partial_image", common | said | {"index": event.index})
                    continue
                self.metrics.answered(event)
                self.record(request, key, work, started, _outcome(event))
                self.metrics.requests.labels(endpoint(request), 200).inc()
                for rank, image in enumerate(event.images):
                    said = self.entry(
                        image, body.model_copy(update={"response_format": "b64_json"}), work, ""
                    )
                    yield _sse(
                        f"{name}.completed", common | said | {"rank": rank, "usage": self._usage(work)}
                    )
        except ApiError as error:
            self.refuse(request, key, work, started, error)
            yield _sse("error", error.body())
        except (GeneratorExit, asyncio.CancelledError):
            self.refuse(request, key, work, started, _client_gone())
            raise
        finally:
            await events.aclose()


class _EventStream(StreamingResponse):
    """Server-sent events; `at_end` is called however the response ends."""

    def __init__(self, events: AsyncIterator[bytes], at_end: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"cache-control": "no-store"})
        self.at_end = at_end

    async def __call__(self, *asgi: Any) -> None:
        try:
            await super().__call__(*asgi)
        finally:
            self.at_end()


def endpoint(request: Request) -> str:
    """The route of a request, as it is declared: what a client makes up is no name of a metric."""
    route = request.scope.get("route")
    return getattr(route, "path", "unknown")


def _client_gone() -> ApiError:
    return ApiError(499, "The client closed the connection.", "client_closed_request")


def _stricter(ours: str, asked: str) -> str:
    """A request may ask for more label than the service sets, never for less."""
    order = ("off", "implicit", "both")
    return max(ours, asked, key=order.index)


def _published_quality(quality: str) -> str:
    return {"standard": "low", "hd": "high"}.get(quality, quality if quality != "auto" else "low")


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _outcome(done: Done) -> dict[str, Any]:
    hashes = [_sha256(image.data) for image in done.images]
    return {"decision": "answered", "image_sha256": hashes}


def _sse(event: str, data: Mapping[str, Any]) -> bytes:
    return (
        f"event: {event}\ndata: {json.dumps({'type': event} | dict(data), ensure_ascii=False)}\n\n".encode()
    )


async def _until_gone(request: Request) -> None:
    """Returns when the client has hung up; the body has been read, so all that can still come is the end."""
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            return
