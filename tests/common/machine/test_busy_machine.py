"""Threads of a training beside other processes."""

import os
import subprocess
import sys
import time

import pytest
import torch

from common.machine import busy_machine
from common.machine.busy_machine import BusyMachine, Usage, read_usage


@pytest.fixture
def two_threads(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def following(monkeypatch, *others: float) -> BusyMachine:
    """Of readings ten seconds apart in which others use so many CPUs and this process 1.5."""
    now = time.monotonic() - 1000
    readings = [Usage(now, 0.0, 0.0)]
    for each in others:
        clock, machine, own = readings[-1]
        readings.append(Usage(clock + 10, machine + 10 * (each + 1.5), own + 15))
    return BusyMachine(read=iter(readings).__next__)


def test_threads_follow_what_others_use(two_threads, monkeypatch):
    machine = following(monkeypatch, 0.1, 1.0, 0.4, 0.2, 2.0, 0.0)
    found = []
    for _ in range(6):
        said = machine.follow()
        found.append((torch.get_num_threads(), "computes with" in said))
    assert found == [(2, False), (1, True), (1, False), (2, True), (1, True), (2, True)]


def test_the_number_comes_back_at_the_end(two_threads, monkeypatch):
    machine = following(monkeypatch, 2.0)
    machine.follow()
    assert torch.get_num_threads() == 1
    machine.restore()
    assert torch.get_num_threads() == 2


def test_a_number_that_was_set_stays(two_threads, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    machine = following(monkeypatch, 2.0)
    assert machine.follow() == "" and torch.get_num_threads() == 2


def test_processes_of_one_training_share_the_machine_otherwise(two_threads, monkeypatch):
    now = time.monotonic() - 1000
    readings = iter([Usage(now, 0.0, 0.0), Usage(now + 10, 20.0, 0.0)])
    assert BusyMachine(alone=False, read=readings.__next__).follow() == ""


def test_between_looks_nothing_is_read(two_threads):
    readings = iter([Usage(time.monotonic(), 0.0, 0.0)])
    assert BusyMachine(read=readings.__next__).follow() == ""


@pytest.mark.parametrize(
    ("cpus", "most", "present", "others", "expected"),
    [
        (8, 8, 8, 3.0, 5),
        (8, 4, 4, 3.0, 4),  # enough are free
        (8, 8, 5, 2.4, 5),  # not clearly six
        (8, 8, 5, 2.2, 6),
        (2, 2, 2, 0.45, 2),
        (2, 2, 2, 7.0, 1),
    ],
)
def test_how_many(two_threads, monkeypatch, cpus, most, present, others, expected):
    machine = following(monkeypatch)
    machine.cpus, machine.most = cpus, most
    assert machine.threads(present, others) == expected


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_own_time_is_that_of_the_whole_tree():
    spin = "import time\nend = time.process_time() + 0.4\nwhile time.process_time() < end: pass\n"
    nested = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {spin!r}])"
    before = read_usage()
    subprocess.run([sys.executable, "-c", nested], check=True)
    after = read_usage()
    assert 0.4 <= after.own - before.own < 5 and after.machine - before.machine >= 0.35
    assert after.machine - before.machine >= 0.4


def test_no_linux_no_reading(tmp_path):
    assert read_usage(proc=tmp_path) is None
    assert busy_machine.BusyMachine(read=lambda: None).follow() == ""
