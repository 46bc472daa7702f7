"""Run directories on every file system: without links, without renames over files, and copied in any way."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from common import checkpoint, files, run_dir
from common.checkpoint import write_model
from common.files import replace


def save(directory: Path, *steps: int) -> Path:
    for step in steps:
        with checkpoint.new_step_directory(directory, step) as made:
            write_model(made, "toy", {}, {"w": torch.tensor(float(step))}, step)
    return directory


def step_of(name: Path | str) -> int:
    return json.loads((checkpoint.resolve(name) / "config.json").read_text())["step"]


def no_links(monkeypatch) -> None:
    def refuse(source, target, *_, **__):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP), source, None, target)

    monkeypatch.setattr(os, "symlink", refuse)
    monkeypatch.setattr(os, "link", refuse)


def no_replacing(monkeypatch, code: int = errno.EEXIST) -> None:
    """Renames onto nothing alone."""
    for name in ("replace", "rename"):
        real = getattr(os, name)

        def onto_nothing(source, target, *rest, real=real, **more):
            if os.path.lexists(target):
                raise OSError(code, os.strerror(code), source, None, target)
            real(source, target, *rest, **more)

        monkeypatch.setattr(os, name, onto_nothing)


@pytest.mark.parametrize("system", ["links", "no links", "no replacing", "neither", "denied"])
def test_latest_is_the_newest_on_every_file_system(tmp_path, monkeypatch, system):
    if system in ("no links", "neither"):
        no_links(monkeypatch)
    if system in ("no replacing", "neither", "denied"):
        no_replacing(monkeypatch, errno.EACCES if system == "denied" else errno.EEXIST)
    save(tmp_path / "runs/a", 2, 10)
    run_dir.clean(tmp_path / "runs/a")
    assert step_of(tmp_path / "runs/a") == step_of(tmp_path / "runs/a/latest") == 10
    save(tmp_path / "runs/a", 300)
    checkpoint.prune(tmp_path / "runs/a", keep_last=1)
    assert step_of(tmp_path / "runs/a") == 300
    assert checkpoint.newest_run("toy", tmp_path / "runs") == (tmp_path / "runs/a/step_00000300").resolve()
    assert [d.name for d in checkpoint.step_directories(tmp_path / "runs/a")] == ["step_00000300"]
    assert sorted(p.name for p in (tmp_path / "runs/a").iterdir()) == ["latest", "step_00000300"]


@pytest.mark.parametrize(
    "state", ["gone", "dangling link", "stale name", "empty", "junk", "unreadable", "folder"]
)
def test_without_a_pointer_the_newest_whole_step_counts(tmp_path, state):
    save(tmp_path / "run", 2, 10)
    latest = tmp_path / "run/latest"
    latest.unlink()
    (tmp_path / "run/step_00000011").mkdir()  # copied half
    if state == "dangling link":
        latest.symlink_to("step_00000400")
    elif state == "folder":
        latest.mkdir()
    elif state != "gone":
        text = {"stale name": b"step_00000400", "empty": b"", "junk": b"../x", "unreadable": b"\xff\xfe"}
        latest.write_bytes(text[state])
    assert step_of(tmp_path / "run") == step_of(tmp_path / "run/latest") == 10
    assert checkpoint.newest_run("toy", tmp_path).name == "step_00000010"
    save(tmp_path / "run", 12)
    assert step_of(tmp_path / "run") == 12


def test_the_pointer_of_either_release_is_read(tmp_path):
    save(tmp_path / "run", 2, 10)
    (tmp_path / "run/latest").unlink()
    for write in (
        lambda: (tmp_path / "run/latest").symlink_to("step_00000002"),
        lambda: (tmp_path / "run/latest").symlink_to((tmp_path / "run/step_00000002").resolve()),
        lambda: (tmp_path / "run/latest").write_text("step_00000002\r\n"),
    ):
        write()
        assert step_of(tmp_path / "run") == step_of(tmp_path / "run/latest") == 2
        (tmp_path / "run/latest").unlink()


def test_copies_of_checkpoints_are_never_deleted(tmp_path):
    """step_00000002_best, and one put under the name of another step."""
    save(tmp_path, 2)
    shutil.copytree(tmp_path / "step_00000002", tmp_path / "step_00000002_best")
    shutil.copytree(tmp_path / "step_00000002", tmp_path / "step_00000001")
    save(tmp_path, 3, 4)
    checkpoint.prune(tmp_path, keep_last=1)
    kept = ["latest", "step_00000001", "step_00000002_best", "step_00000004"]
    assert sorted(p.name for p in tmp_path.iterdir()) == kept


def test_a_checkpoint_that_is_read_is_deleted_later(tmp_path, monkeypatch):
    save(tmp_path, 2, 3)
    with monkeypatch.context() as patch:

        def busy(*_):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

        patch.setattr(os, "replace", busy)
        patch.setattr(Path, "unlink", busy)
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        checkpoint.prune(tmp_path, keep_last=1)
    assert len(checkpoint.step_directories(tmp_path)) == 2
    checkpoint.prune(tmp_path, keep_last=1)
    assert len(checkpoint.step_directories(tmp_path)) == 1


def test_hidden_files_of_the_users_stay(tmp_path):
    save(tmp_path, 2)
    for name in (".notes.tmp", ".latest.txt", ".step_x.tmp"):
        (tmp_path / name).write_text("mine")
    run_dir.clean(tmp_path)
    assert all((tmp_path / name).is_file() for name in (".notes.tmp", ".latest.txt", ".step_x.tmp"))


@pytest.mark.parametrize(
    "name", ["options.json", "metrics.jsonl", "samples", "image_tokenizer", "latest", "step_00000001"]
)
def test_a_folder_of_the_users_is_no_run_directory(tmp_path, name):
    if "." in name:
        (tmp_path / name).write_text('{"mine": 1}\n')
    else:
        (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=f"holds {name}, which no training of ours has put there"):
        run_dir.claim(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_runs_of_ours_are_known(tmp_path):
    run_dir.claim(tmp_path / "new")
    (tmp_path / "new" / "samples").mkdir()
    run_dir.claim(tmp_path / "new")
    for name, text in (("options.json", '{"loop": {}}'), ("metrics.jsonl", '{"step": 1, "kind": "train"}\n')):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text(text)
        (tmp_path / name / "samples").mkdir()
        run_dir.claim(tmp_path / name)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    run_dir.claim(tmp_path / "mine")


@pytest.mark.parametrize("held", [False, True])
def test_a_file_takes_its_place_where_renames_do_not_replace(tmp_path, monkeypatch, held):
    """`held`: not even the old file can be moved, since another process has it open."""
    if held:

        def refuse(source, target, *_, **__):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES), source, None, target)

        monkeypatch.setattr(os, "replace", refuse)
    else:
        no_replacing(monkeypatch)
    (tmp_path / "a").write_text("old")
    (tmp_path / "b").write_text("new")
    replace(tmp_path / "b", tmp_path / "a")
    assert (tmp_path / "a").read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["a"]


def test_folders_that_cannot_be_synced(tmp_path, monkeypatch):
    def refuse(_: int) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(files.os, "fsync", refuse)
    assert step_of(save(tmp_path, 5)) == 5


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_best_names_a_checkpoint_and_a_copy_of_the_users_stays(tmp_path, monkeypatch, links):
    if not links:
        no_links(monkeypatch)
    run = save(tmp_path / "run", 1, 2, 3)
    assert run_dir.best_step(run) is None
    for name in ("step_00000001", "step_00000002"):
        run_dir.point_best(run, name)
        assert run_dir.best_step(run) == (run / name).resolve()
    shutil.rmtree(run / "step_00000002")
    assert run_dir.best_step(run) is None
    run_dir.point_best(run, "step_00000003")
    assert run_dir.best_step(run).name == "step_00000003" and step_of(run) == 3
    (run / "best").unlink()
    shutil.copytree(run / "step_00000001", run / "best")
    run_dir.point_best(run, "step_00000003")
    assert run_dir.best_step(run) == (run / "best").resolve() and (run / "best").is_dir()
