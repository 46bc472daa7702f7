"""Nodes of a hostfile, asked through the real ssh where it exists and through a script in its place."""

import os
import shutil
from pathlib import Path

import pytest

from common.nodes import Node, main, read_hostfile

SSH = """#!/bin/sh
for last; do :; done
case "$*" in
  *worker-down*) echo "ssh: connect to host worker-down port 22: No route to host" >&2; exit 255;;
  *worker-blind*) exit 1;;
  *worker-poor*) echo sees; echo 2;;
  *worker-1*|*worker-2*) echo sees; echo 8;;
esac
"""


@pytest.fixture
def hostfile(tmp_path, monkeypatch):
    ssh = tmp_path / "bin" / "ssh"
    ssh.parent.mkdir()
    ssh.write_text(SSH)
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{ssh.parent}{os.pathsep}{os.environ['PATH']}")

    def write(*hosts: str) -> Path:
        path = tmp_path / "hostfile"
        path.write_text("# nodes\n\n" + "".join(f"{host} slots=8\n" for host in hosts))
        return path

    return write


def test_all_ready(hostfile, capsys):
    assert main([str(hostfile("worker-1", "worker-2"))]) == [Node("worker-1", 8), Node("worker-2", 8)]
    assert "all 2 nodes are ready for 16 processes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("host", "said"),
    [
        ("worker-down", "worker-down: cannot be reached by ssh without a password (ssh: connect to host"),
        ("worker-blind", "worker-blind: does not see the folder /"),
        ("worker-poor", "worker-poor: has 2 GPUs, not the 8 of its slots"),
    ],
)
def test_a_node_that_is_not_ready_is_named(host, said, hostfile, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([str(hostfile("worker-1", host))])
    captured = capsys.readouterr()
    assert stopped.value.code == 2 and said in captured.out
    assert captured.err == f"error: 1 of 2 nodes are not ready: {host}; mend them or take them out\n"


@pytest.mark.skipif(shutil.which("ssh") is None, reason="no ssh on this machine")
def test_the_real_ssh_says_that_a_name_does_not_exist(tmp_path, capsys):
    path = tmp_path / "hostfile"
    path.write_text("no-such-node.invalid slots=1\n")
    with pytest.raises(SystemExit):
        main([str(path), "--seconds", "2"])
    assert "cannot be reached by ssh" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "names no node"),
        ("worker-1\n", ":1 is not HOST slots=N: 'worker-1'"),
        ("worker-1 slots=0\n", ":1 is not HOST slots=N"),
        ("-oProxyCommand=x slots=1\n", ":1 is not HOST slots=N"),
        ("a slots=1\na slots=2\n", ":2 names a again"),
    ],
)
def test_a_bad_hostfile_is_named(text, said, tmp_path):
    path = tmp_path / "hostfile"
    path.write_text(text)
    with pytest.raises(ValueError, match=said):
        read_hostfile(path)


def test_the_example_is_read():
    path = Path(__file__).parents[2] / "configs" / "large" / "hostfile"
    assert sum(node.slots for node in read_hostfile(path)) == 64
