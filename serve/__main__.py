"""Serve images of a text over HTTP: OpenAI's images API and a web page.

    python -m serve --open                         # on this machine alone, without keys: http://127.0.0.1:8000
    python -m serve.keys create --name editors     # a key, then:
    python -m serve --host 0.0.0.0

Takes the generator and ranker that were trained last, else those that ship.
"""

import socket
from collections.abc import Sequence

from common.config import command, parse_options
from common.log import say
from dalle.pipeline import default_checkpoint
from rankers import default_ranker
from serve.app import create_app
from serve.dispatch import Dispatcher
from serve.options import ServeOptions
from serve.worker import WorkerOptions


def make_dispatcher(options: ServeOptions) -> Dispatcher:
    """Raises FileNotFoundError when nothing was trained and nothing ships."""
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
    except OSError as error:
        raise ValueError(
            f"cannot listen at {host}:{port}: {error.strerror}; choose another with --port"
        ) from error
    return listener


@command
def main(argv: Sequence[str] | None = None) -> None:
    import uvicorn

    options = parse_options(ServeOptions, argv, description=__doc__)
    listener = listen(options.host, options.port)
    app = create_app(options, make_dispatcher(options))
    config = uvicorn.Config(
        app,
        limit_concurrency=options.max_connections,
        timeout_keep_alive=20,
        timeout_graceful_shutdown=int(options.drain_seconds) + 5,
        access_log=False,
        server_header=False,
        log_level="warning",
    )
    host, port = listener.getsockname()[:2]
    say(f"serving at http://{host}:{port}" + (" without keys" if options.open else ""))
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main()
