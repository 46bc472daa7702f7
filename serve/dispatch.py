"""The service's side of the model worker: a bounded queue, deadlines, cancellation, restarts.

All methods run in the event loop. A thread reads what the worker says and hands it over; when the worker dies, its
requests answer 503 at once and another worker is started, later each time one dies before it has answered anything.
"""

import asyncio
import contextlib
import multiprocessing
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, Literal

from common.log import say
from serve.messages import Cancel, Done, Failed, Fill, ModelInfo, Partial, Ready, Refused, Stop, Work
from serve.schemas import ApiError
from serve.worker_options import WorkerOptions

State = Literal["starting", "ready", "restarting", "draining", "failed", "stopped"]
# seconds between restarts; a life that counts as a success, as one that has answered does
FIRST_PAUSE, LONGEST_PAUSE, LIVED = 0.5, 30.0, 60.0
RATE_MEMORY = 0.9  # of the running mean of images a second


def _run_worker(connection: Connection, options: WorkerOptions) -> None:
    from serve.worker import run_worker  # in the worker's process alone: the service needs no models

    run_worker(connection, options)


@dataclass
class _Request:
    work: Work
    events: asyncio.Queue[Any] = field(default_factory=asyncio.Queue)


class Dispatcher:
    """Sends work to one worker process and streams its answers back."""

    def __init__(
        self,
        options: WorkerOptions,
        max_queued_images: int = 128,
        target: Callable[[Connection, WorkerOptions], None] = _run_worker,
    ) -> None:
        self.options, self.max_queued_images, self.target = options, max_queued_images, target
        self.state: State = "starting"
        self.reason = ""
        self.info: ModelInfo | None = None
        self.fill = Fill(0, 0, 0)
        self.restarts = 0
        self.queued_images = 0
        self.images_per_second = 0.0
        self.on_fill: Callable[[Fill], None] = lambda fill: None
        self.on_failed: Callable[[], None] = lambda: None
        self._requests: dict[str, _Request] = {}
        self._changed = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._process: Any = None
        self._outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._pause, self._restart_task, self._began = FIRST_PAUSE, None, 0.0

    async def start(self) -> None:
        """Start the worker; returns at once. `wait_ready` waits for it."""
        self._loop = asyncio.get_running_loop()
        self._launch()

    async def wait_ready(self, timeout: float | None = None) -> ModelInfo:
        """Raises ValueError with the worker's reason when it cannot start."""
        async with asyncio.timeout(timeout):
            while self.state in ("starting", "restarting"):
                self._changed.clear()
                await self._changed.wait()
        if self.info is None or self.state == "failed":
            raise ValueError(self.reason or "the model worker ended while it was starting")
        return self.info

    def retry_after(self, more_images: int = 0) -> float:
        """Seconds until there is room for `more_images`, from the measured rate."""
        surplus = self.queued_images + more_images - self.max_queued_images
        return max(1.0, surplus / max(self.images_per_second, 1e-3))

    def require_room(self, work: Work) -> None:
        """Raises ApiError: 503 without a worker, 429 with Retry-After when the queue is full."""
        if self.state != "ready":
            wait = {"starting": 5.0, "restarting": max(1.0, self._pause)}.get(self.state)
            message = {
                "starting": "The model is still loading.",
                "restarting": "The model is being restarted.",
                "draining": "The service is shutting down.",
            }.get(self.state, f"The model could not be started: {self.reason}")
            raise ApiError(503, message, "model_unavailable", retry_after=wait)
        if work.num_candidates > self.max_queued_images:
            raise ApiError(
                400,
                f"At most {self.max_queued_images} images can be sampled for one request.",
                "invalid_value",
                "n",
            )
        if self.queued_images + work.num_candidates > self.max_queued_images:
            wait = self.retry_after(work.num_candidates)
            raise ApiError(
                429, f"The queue is full; there is room in {wait:.0f} s.", "queue_full", retry_after=wait
            )

    def submit(self, work: Work) -> None:
        """Take a request in. Raises ApiError as `require_room` does."""
        self.require_room(work)
        self._requests[work.id] = _Request(work)
        self._count(work.num_candidates)
        self._outbox.put(work)

    async def events(self, work_id: str, deadline: float) -> AsyncIterator[Partial | Done]:
        """What the worker says of a request, up to `Done`.

        deadline: seconds from now. Raises ApiError; leaving early, by an error or by a client that hangs up, cancels.
        """
        request, until = self._requests[work_id], self._loop.time() + deadline
        try:
            while True:
                try:
                    async with asyncio.timeout_at(until):
                        event = await request.events.get()
                except TimeoutError:
                    raise ApiError(
                        504, f"The images were not ready within {deadline:.0f} s.", "deadline_exceeded"
                    ) from None
                if isinstance(event, ApiError):
                    raise event
                yield event
                if isinstance(event, Done):
                    return
        finally:
            self.forget(work_id)

    async def drain(self, timeout: float) -> None:
        """Take nothing more, finish what was begun within `timeout` seconds, end the worker."""
        self._set_state("draining")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self._idle.wait()
        self._outbox.put(Stop())
        await asyncio.to_thread(self._end_process, 5.0)
        self._set_state("stopped")

    # --- the process --------------------------------------------------------------------------------------------------

    def _launch(self) -> None:
        # from a clean server, not from this process, which has threads (`serve.__main__.start_fork_server`)
        context = multiprocessing.get_context("forkserver")
        ours, theirs = context.Pipe()
        self._process = context.Process(target=self.target, args=(theirs, self.options), daemon=True)
        self._process.start()
        theirs.close()
        self._began, self._has_answered = time.monotonic(), False
        self._outbox = queue.SimpleQueue()
        # in threads: a pipe is full when an uploaded image is larger than its buffer and the worker is busy
        threading.Thread(target=_write, args=(ours, self._outbox), daemon=True).start()
        threading.Thread(target=self._read, args=(ours, self._process, self._outbox), daemon=True).start()

    def _read(self, connection: Connection, process: Any, outbox: queue.SimpleQueue) -> None:
        """In a thread of its own: messages of one worker, then its end."""
        while True:
            try:
                message = connection.recv()
            except (EOFError, OSError):
                break
            self._call(self._take, message)
        process.join()
        outbox.put(None)
        self._call(self._ended, process.exitcode)

    def _call(self, function: Callable[..., None], *arguments: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(function, *arguments)

    def _take(self, message: Any) -> None:
        if isinstance(message, Ready):
            self.info, self.images_per_second = message.info, message.info.images_per_second
            if self.state in ("starting", "restarting"):
                self._set_state("ready")
        elif isinstance(message, Failed):
            self.reason = message.reason
        elif isinstance(message, Fill):
            self.fill = message
            self.on_fill(message)
            if message.waiting and message.tokens and self.info:
                rate = (
                    message.tokens / self.info.num_tokens
                )  # images in the last second, when the batch was full
                self.images_per_second = RATE_MEMORY * self.images_per_second + (1 - RATE_MEMORY) * rate
        elif message.id in self._requests:
            refused = isinstance(message, Refused)
            event = ApiError(400, message.reason, "invalid_prompt", "prompt") if refused else message
            self._requests[message.id].events.put_nowait(event)
            self._has_answered = self._has_answered or isinstance(message, Done)

    def _ended(self, exit_code: int | None) -> None:
        lost = ApiError(
            503,
            "The model worker ended while it worked on this; try again.",
            "worker_died",
            retry_after=self._pause,
        )
        for request in self._requests.values():
            request.events.put_nowait(lost)
        if self.state in ("draining", "stopped"):
            return
        if self.reason:
            self._set_state("failed")
            self.on_failed()
            return
        if self._has_answered or time.monotonic() - self._began > LIVED:
            self._pause = FIRST_PAUSE
        say(f"the model worker ended with code {exit_code}: another starts in {self._pause:.1f} s")
        self.restarts += 1
        self._set_state("restarting")
        self._restart_task = self._loop.create_task(self._restart())

    async def _restart(self) -> None:
        await asyncio.sleep(self._pause)
        self._pause = min(LONGEST_PAUSE, 2 * self._pause)
        if self.state == "restarting":
            self._launch()

    def _end_process(self, timeout: float) -> None:
        if self._process is not None:
            self._process.join(timeout)
            if self._process.is_alive():
                self._process.kill()
                self._process.join()

    def _set_state(self, state: State) -> None:
        self.state = state
        self._changed.set()

    def _count(self, images: int) -> None:
        self.queued_images += images
        self._idle.clear() if self.queued_images else self._idle.set()

    def forget(self, work_id: str) -> bool:
        """Free the place of a request; False where that has been done."""
        request = self._requests.pop(work_id, None)
        if request is None:
            return False
        self._count(-request.work.num_candidates)
        self._outbox.put(Cancel(work_id))
        return True


def _write(connection: Connection, outbox: queue.SimpleQueue) -> None:
    """In a thread of its own: messages to one worker; None ends it."""
    while (message := outbox.get()) is not None:
        try:
            connection.send(message)
        except (OSError, ValueError):  # it has just died: `_ended` answers its requests
            break
    connection.close()
