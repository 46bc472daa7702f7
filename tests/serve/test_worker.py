"""The model worker's own process."""

from multiprocessing import Pipe

import pytest

from dalle.engines import FastOptions
from serve.worker import run_worker
from serve.worker_options import WorkerOptions


@pytest.mark.parametrize("exists", [True, False])
def test_a_worker_whose_service_was_killed_meanwhile_ends_without_a_traceback(
    small_generator, tmp_path, monkeypatch, exists
):
    monkeypatch.setattr("serve.worker.signal.signal", lambda *_: None)  # of this process, here
    service, own = Pipe()
    service.close()
    checkpoint = small_generator if exists else tmp_path / "nothing"
    run_worker(own, WorkerOptions(str(checkpoint), "", "cpu", FastOptions("torch", "float32"), max_images=2))
