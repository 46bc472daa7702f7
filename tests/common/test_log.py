"""metrics.jsonl holds each step once, whatever was killed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from common.distributed import World
from common.log import MetricLog, Window, clock, drop_from_step, short

ROOT = Path(__file__).parents[2]
ALONE = World(0, 1, 0, torch.device("cpu"), "none")


def test_a_window_averages_and_survives_a_checkpoint():
    window = Window()
    for loss in (1.0, 2.0, 6.0):
        window.add({"loss": loss})
    window.add({"loss": 1.0, "late": 5.0})
    assert window.means() == {"loss": 2.5, "late": 5.0}
    again = Window(json.loads(json.dumps(window.mean_over(ALONE))))
    for w in (window, again):
        w.add({"loss": 0.1})
    assert again.means() == window.means() == {"loss": 10.1 / 5, "late": 5.0}
    window.clear()
    assert window.means() == {}


def test_the_log_goes_on_where_the_checkpoint_stands(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricLog(tmp_path, 0, tensorboard=False, wandb_project="", options={})
    for step in (1, 2, 3):
        log.write(step, "train", {"loss": 1.0 / step})
    log.write(2, "val", {"loss": 0.5})
    log.close()
    with path.open("ab") as file:
        file.write(
            '{"step": 2, "kind": "验'.encode()[:-1]
        )  # killed in the middle of a line and of a character
    log = MetricLog(tmp_path, 2, tensorboard=False, wandb_project="", options={})
    log.write(3, "train", {"loss": 9.0})
    image = log.image(3, "grid", Image.new("RGB", (2, 2)))
    log.close()
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert [(r["step"], r["kind"]) for r in rows] == [(1, "train"), (2, "train"), (2, "val"), (3, "train")]
    assert rows[-1]["loss"] == 9.0
    assert image == tmp_path / "samples" / "grid_00000003.png" and image.is_file()


def test_nothing_to_drop_is_no_mistake(tmp_path):
    drop_from_step(tmp_path / "none.jsonl", 5)
    assert not list(tmp_path.iterdir())


def test_tensorboard_files_are_written(tmp_path):
    pytest.importorskip("tensorboard")
    log = MetricLog(tmp_path, 0, tensorboard=True, wandb_project="", options={})
    log.write(1, "train", {"loss": 1.0})
    log.close()
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_numbers_are_short():
    assert [short(v) for v in (0, 0.00029, 3.14159, 12345.6)] == ["0", "2.90e-04", "3.142", "1.235e+04"]
    assert [clock(s) for s in (-3, 59, 3723)] == ["0:00:00", "0:00:59", "1:02:03"]


def test_images_reach_tensorboard(tmp_path):
    log = MetricLog(tmp_path, 0, True, "", {})
    assert log.image(3, "samples", Image.new("RGB", (8, 8), "red")).is_file()
    log.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"samples" in events.read_bytes() and b"PNG" in events.read_bytes()


def test_weights_and_biases_if_asked(tmp_path, monkeypatch):
    """Its offline mode writes beside the run; one id for the life of the directory."""
    pytest.importorskip("wandb", reason="pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for step in (1, 2):
        log = MetricLog(tmp_path, step, False, "goods", {"lr": 1e-3})
        log.write(step, "train", {"loss": 2.0})
        log.image(step, "samples", Image.new("RGB", (8, 8)))
        identity = log.wandb.id
        log.close()
        assert identity == (tmp_path / "wandb_id").read_text("utf-8")
    assert len(list((tmp_path / "wandb").glob(f"offline-run-*-{identity}"))) >= 1


def test_weights_and_biases_says_what_it_lacks(tmp_path):
    """Without the package, or without a key, one sentence."""
    code = "from pathlib import Path; from common.log import MetricLog\n"
    code += f"MetricLog(Path({str(tmp_path)!r}), 0, False, 'goods', {{}})"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    environment |= {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "WANDB_BASE_URL": "http://127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    said = done.stderr.splitlines()[-1]
    assert said.startswith("ValueError: ") and ("pip install wandb" in said or "WANDB_MODE=offline" in said)
