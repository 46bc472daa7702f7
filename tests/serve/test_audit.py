"""The audit log: a chain that shows every change, survives kills, rotates and forgets."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from serve.audit import AuditLog, main, verify


def filled(directory, count=5, **options):
    log = AuditLog(directory, **options)
    for i in range(count):
        log.append({"who": "a", "what": f"图{i}"})
    log.close()
    return log


def lines_of(directory):
    return [
        line
        for path in sorted(directory.glob("audit_*.jsonl"))
        for line in path.read_text("utf-8").split("\n")
        if line
    ]


def test_a_whole_chain_is_whole_and_goes_on(tmp_path):
    filled(tmp_path)
    filled(tmp_path)
    assert verify(tmp_path) == 10
    assert [json.loads(line)["number"] for line in lines_of(tmp_path)] == list(range(10))


def test_the_first_hash_is_the_one_computed_by_hand(tmp_path):
    import hashlib

    filled(tmp_path, 1)
    line = json.loads(lines_of(tmp_path)[0])
    body = json.dumps(line["record"], sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    assert line["hash"] == hashlib.sha256(("0" * 64 + "\n0\n" + body).encode()).hexdigest()


@pytest.mark.parametrize("change", ["edit", "remove", "swap", "cut"])
def test_every_change_is_found(tmp_path, change):
    filled(tmp_path)
    path = next(tmp_path.glob("audit_*.jsonl"))
    lines = path.read_text("utf-8").split("\n")[:-1]
    if change == "edit":
        lines[2] = lines[2].replace("图2", "图9")
    elif change == "remove":
        del lines[2]
    elif change == "swap":
        lines[1], lines[2] = lines[2], lines[1]
    else:
        del lines[-1]
    path.write_text("\n".join(lines) + "\n", "utf-8")
    with pytest.raises(ValueError, match="broken"):
        verify(tmp_path)


def test_a_half_written_line_is_cut_at_the_next_start(tmp_path):
    filled(tmp_path)
    path = next(tmp_path.glob("audit_*.jsonl"))
    with path.open("ab") as file:
        file.write(b'{"number": 5, "prev')
    with pytest.raises(ValueError, match="whole line"):
        verify(tmp_path)
    filled(tmp_path, 1)
    assert verify(tmp_path) == 6


def test_rotation_and_retention_keep_a_checkable_chain(tmp_path):
    log = AuditLog(tmp_path, max_bytes=600)
    for i in range(20):
        log.append({"i": i})
    assert len(list(tmp_path.glob("audit_*.jsonl"))) > 3 and verify(tmp_path) == 20
    assert log.forget_before(time.time() + 1) >= 3
    log.append({"i": 20})
    log.close()
    assert 0 < verify(tmp_path) < 20
    filled(tmp_path, 1)
    assert json.loads(lines_of(tmp_path)[-1])["number"] == 21


def test_a_clock_that_goes_backwards_breaks_no_chain_and_forgets_nothing_early(tmp_path, monkeypatch):
    log = AuditLog(tmp_path, max_bytes=400, keep_days=1)
    for now in (9e8, 9e8 - 3600, 9e8 - 40 * 86400, 9e8 + 60):
        monkeypatch.setattr(time, "time", lambda now=now: now)
        for _ in range(3):
            log.append({"who": "a"})
    log.close()
    times = [json.loads(line)["record"]["time"] for line in lines_of(tmp_path)]
    assert {9e8, 9e8 - 3600, 9e8 + 60} <= set(times)
    assert verify(tmp_path) == len(times)


def test_the_chain_is_whole_after_kills(tmp_path):
    code = (
        "import sys; from pathlib import Path; from serve.audit import AuditLog\n"
        "log = AuditLog(Path(sys.argv[1]), max_bytes=2000)\n"
        "while True: print(log.append({'x': 'y' * 50}), flush=True)"
    )
    answered = []
    for _ in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        answered += [process.stdout.readline().strip() for _ in range(20)]
        os.kill(process.pid, signal.SIGKILL)
        answered += [line.strip() for line in process.stdout if len(line.strip()) == 64]
        process.wait()
    AuditLog(tmp_path).close()
    assert verify(tmp_path) >= len(answered) >= 80
    stored = {json.loads(line)["hash"] for line in lines_of(tmp_path)}
    assert set(answered) <= stored


def test_the_command(tmp_path, capsys):
    filled(tmp_path)
    main(["verify", str(tmp_path)])
    assert "5 records, the chain is whole" in capsys.readouterr().out
    for argv in (["verify", str(tmp_path / "missing")], ["verify"]):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 2
