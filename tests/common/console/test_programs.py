"""Commands that start commands."""

import os
import signal
import subprocess
import sys
import time

from common.console.programs import run_program

PARENT = """
import sys
from common.console.programs import run_program
raise SystemExit(run_program(["-c", sys.argv[1]]))
"""
SAVES = """
import signal, sys, time
from pathlib import Path
def stop(number, frame):
    time.sleep(0.6)  # longer than subprocess.run would wait
    Path("saved").write_text(signal.Signals(number).name)
    sys.exit(130)
signal.signal(signal.SIGINT, stop)
signal.signal(signal.SIGTERM, stop)
Path("ready").touch()
time.sleep(60)
"""


def test_the_exit_code_is_the_programs():
    assert run_program(["-c", "raise SystemExit(7)"]) == 7
    assert run_program(["-c", "pass"]) == 0


def stopped(tmp_path, send) -> int:
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, SAVES], cwd=tmp_path, env=environment, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < deadline and parent.poll() is None
        time.sleep(0.02)
    send(parent)
    return parent.wait(60)


def test_ctrl_c_lets_the_program_save(tmp_path):
    code = stopped(tmp_path, lambda parent: os.killpg(parent.pid, signal.SIGINT))
    assert code == 130 and (tmp_path / "saved").read_text() == "SIGINT"


def test_sigterm_is_handed_on(tmp_path):
    code = stopped(tmp_path, lambda parent: parent.terminate())
    assert code == 130 and (tmp_path / "saved").read_text() == "SIGTERM"
