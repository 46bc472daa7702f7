"""Serve images of a text over HTTP: OpenAI's images API and a web page.

    python -m serve --open                         # on this machine alone, without keys: http://127.0.0.1:8000
    python -m serve.keys create --name editors     # a key, then:
    python -m serve --host 0.0.0.0

Takes the generator and ranker that were trained last, else those that ship.
"""

import multiprocessing
import signal
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING

from common.config import command, parse_options

if TYPE_CHECKING:
    from serve.dispatch import Dispatcher
    from serve.options import ServeOptions

PRELOADED = "serve.worker"


def start_fork_server() -> None:
    """Start the process that model workers are forked from: it imports what they need while this one imports what the
    service needs, and a worker that takes the place of another imports nothing."""
    from multiprocessing.forkserver import ensure_running

    multiprocessing.set_forkserver_preload([PRELOADED])
    ensure_running()


def make_dispatcher(options: "ServeOptions") -> "Dispatcher":
    """Raises FileNotFoundError when nothing was trained and nothing ships."""
    from dalle import default_checkpoint
    from rankers import default_ranker
    from serve.dispatch import Dispatcher
    from serve.worker_options import WorkerOptions

    ranker = "" if options.ranker == "none" else options.ranker or str(default_ranker())
    checkpoint = options.checkpoint or str(default_checkpoint())
    worker = WorkerOptions(
        checkpoint, ranker, options.device, options.fast, options.max_images, options.threads
    )
    return Dispatcher(worker, options.max_queued_images)


def listen(host: str, port: int) -> socket.socket:
    """Raises ValueError when the address cannot be had, before anything is loaded."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen()  # two sockets may be bound to one port as long as neither listens
    except OSError as error:
        listener.close()
        raise ValueError(
            f"cannot listen at {host}:{port}: {error.strerror}; choose another with --port"
        ) from error
    return listener


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Serve until a signal ends it. Raises ValueError for a model that cannot be loaded."""
    import uvicorn  # here and below: the fork server is to start before anything large is imported

    from common.log import say
    from serve.app import create_app
    from serve.options import ServeOptions

    options = parse_options(ServeOptions, argv, description=__doc__)
    listener = listen(options.host, options.port)
    dispatcher = make_dispatcher(options)
    app = create_app(options, dispatcher)
    config = uvicorn.Config(
        app,
        limit_concurrency=options.max_connections,
        timeout_keep_alive=20,
        timeout_graceful_shutdown=int(options.drain_seconds) + 5,
        access_log=False,
        server_header=False,
        log_level="warning",
    )
    server = uvicorn.Server(config)

    def end() -> None:
        server.should_exit = True

    dispatcher.on_failed = end
    host, port = listener.getsockname()[:2]
    say(f"serving at http://{host}:{port}" + (" without keys" if options.open else ""))
    # uvicorn drains at SIGTERM and then raises it again for the handler that it found: a drained end is no failure
    signal.signal(signal.SIGTERM, lambda *_: None)
    server.run(sockets=[listener])
    if dispatcher.reason:
        raise ValueError(dispatcher.reason)


if __name__ == "__main__":
    start_fork_server()
    main()
