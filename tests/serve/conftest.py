"""A running service on a small generator, once for all tests of this folder."""

import sys
import threading
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "dalle"))
from small_checkpoint import write_generator

from dalle.engines import FastOptions
from serve.__main__ import start_fork_server
from serve.app import create_app
from serve.dispatch import Dispatcher
from serve.keys import KeyStore, Limits, open_database
from serve.options import ServeOptions
from serve.worker_options import WorkerOptions


class Running:
    """A service in a thread of its own, on a port of its own."""

    def __init__(self, folder: Path, checkpoint: Path, **changes) -> None:
        import uvicorn

        from serve.__main__ import listen

        database = f"sqlite:///{folder}/keys.db"
        store = KeyStore(open_database(database))
        self.key, self.record = store.create("tests", limits=Limits(0, 0, 0, 0))
        self.store, self.folder = store, folder
        self.options = ServeOptions(
            database=database,
            audit_dir=folder / "audit",
            image_dir=folder / "served",
            **({"max_images": 4, "max_queued_images": 24, "log_prompts": True} | changes),
        )
        worker = WorkerOptions(
            str(checkpoint), "", "cpu", FastOptions("torch", "float32"), self.options.max_images, threads=1
        )
        self.dispatcher = Dispatcher(worker, self.options.max_queued_images)
        listener = listen("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        app = create_app(self.options, self.dispatcher)
        self.server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listener]}, daemon=True)
        self.thread.start()

    def wait_ready(self, seconds: float = 600) -> "Running":
        until = time.monotonic() + seconds
        while self.dispatcher.state != "ready":
            assert time.monotonic() < until and self.dispatcher.state != "failed", self.dispatcher.reason
            time.sleep(0.05)
        return self

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(300)
        assert not self.thread.is_alive()


@pytest.fixture(scope="session", autouse=True)
def fork_server() -> None:
    """What workers import is imported once."""
    start_fork_server()


@pytest.fixture(scope="session")
def small_generator(tmp_path_factory) -> Path:
    return write_generator(tmp_path_factory.mktemp("serve") / "small")


@pytest.fixture(scope="session")
def lines_generator(tmp_path_factory) -> Path:
    """The same, following line drawings."""
    return write_generator(tmp_path_factory.mktemp("serve") / "lines", line_factor=4)


@pytest.fixture(scope="session")
def lines_service(tmp_path_factory, lines_generator):
    running = Running(tmp_path_factory.mktemp("lines_service"), lines_generator).wait_ready()
    yield running
    running.stop()


@pytest.fixture(scope="session")
def service(tmp_path_factory, small_generator):
    running = Running(tmp_path_factory.mktemp("service"), small_generator).wait_ready()
    yield running
    running.stop()
