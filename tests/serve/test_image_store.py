"""Images kept for a while: names, time, clocks."""

import os
import time

import pytest

from serve.image_store import ImageStore


def test_an_image_is_kept_for_its_time_under_its_name_alone(tmp_path):
    store = ImageStore(tmp_path / "served", 1.0)
    name = store.put(b"image", "png")
    assert store.get(name) == b"image"
    assert store.get("../" + name) is None and store.get(name + "/") is None and store.get("a.png") is None
    old = time.time() - 61
    os.utime(tmp_path / "served" / name, (old, old))
    assert store.get(name) is None


def test_what_is_old_is_removed_and_what_is_not_ours_stays(tmp_path):
    store = ImageStore(tmp_path, 1.0)
    name = store.put(b"image", "png")
    left = tmp_path / f".{name}.123.tmp"
    left.write_bytes(b"ima")  # of a process that was killed
    (tmp_path / "notes.txt").write_text("mine")
    for path in tmp_path.iterdir():
        os.utime(path, (1, 1))
    ImageStore(tmp_path, 1.0).put(b"other", "webp")
    assert not (tmp_path / name).exists() and not left.exists() and (tmp_path / "notes.txt").exists()


def test_a_clock_that_is_put_back_loses_no_image_and_stops_no_sweeping(tmp_path, monkeypatch):
    store, real, passed = ImageStore(tmp_path, 1.0), time.time(), time.monotonic()
    first = store.put(b"image", "png")
    monkeypatch.setattr(time, "time", lambda: real - 7 * 86400)
    assert store.get(first) == b"image"
    monkeypatch.setattr(time, "monotonic", lambda: passed + 61)
    os.utime(tmp_path / first, (1, 1))
    store.put(b"other", "png")
    assert not (tmp_path / first).exists()


def test_a_place_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file"):
        ImageStore(tmp_path / "file", 1.0)
