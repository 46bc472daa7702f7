"""In an output directory only what was written there is touched, whatever the user has put beside or instead."""

import json
import os
from pathlib import Path

import pytest

from common.outputs.record import (
    RECORD,
    OutputDirectory,
    new_directory,
    require_replaceable,
    writing_file,
)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_what_was_written_is_replaced_and_removed(tmp_path):
    for text in ("one", "two"):
        with OutputDirectory(tmp_path / "out") as files:
            files.write_text("a.txt", text)
            files.write_text("sub/b.txt", text)
    assert (tmp_path / "out/a.txt").read_text() == (tmp_path / "out/sub/b.txt").read_text() == "two"
    with OutputDirectory(tmp_path / "out") as files:
        assert files.remove("a.txt") and not files.remove("a.txt") and not files.remove("none")
    assert set(contents(tmp_path / "out")) == {RECORD, "sub/b.txt"}


def users_file(path: Path) -> None:
    path.write_text("mine")


def users_other_bytes_of_the_same_size(path: Path) -> None:
    path.write_text("twO")


def users_link(path: Path) -> None:
    path.unlink(missing_ok=True)
    (path.parent / "elsewhere").write_text("two")
    path.symlink_to("elsewhere")


def users_dangling_link(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("nowhere")


def users_folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


@pytest.mark.parametrize("was_ours", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        users_file,
        users_other_bytes_of_the_same_size,
        users_link,
        users_dangling_link,
        users_folder,
    ],
)
def test_the_users_file_of_that_name_stays(tmp_path, change, was_ours):
    out = tmp_path / "out"
    with OutputDirectory(out) as files:
        files.write_text("b.txt", "two")
        if was_ours:
            files.write_text("a.txt", "two")
    change(out / "a.txt")
    before, listed = contents(out), sorted(os.listdir(out))
    with OutputDirectory(out) as files:
        assert files.foreign(["a.txt", "b.txt", "c.txt"]) == ["a.txt"]
        assert files.foreign([f"{i}.txt" for i in "abc"] + [f"x{i}" for i in range(100)]) == ["a.txt"]
        with pytest.raises(ValueError, match=r"holds a.txt, not written here or changed since: move it away"):
            files.write_text("a.txt", "new")
        with pytest.raises(ValueError, match=r"holds a.txt"):
            files.append("a.txt", "new")
        assert not files.remove("a.txt")
    assert contents(out) == before and sorted(os.listdir(out)) == listed


def test_a_file_that_came_while_ours_was_made_stays(tmp_path):
    theirs = pytest.raises(ValueError, match=r"a\.txt")
    with OutputDirectory(tmp_path) as files, theirs, files.writing("a.txt") as temporary:
        temporary.write_text("ours")
        (tmp_path / "a.txt").write_text("theirs")
    assert contents(tmp_path) == {"a.txt": b"theirs"}


def test_a_list_grows_and_may_end_in_half_a_line(tmp_path):
    with OutputDirectory(tmp_path) as files:
        for i in range(3):
            files.append("list.jsonl", json.dumps({"i": i}))
    with OutputDirectory(tmp_path) as files:
        files.append("list.jsonl", '{"i": 3}')
        assert (tmp_path / "list.jsonl").read_text() == "".join(f'{{"i": {i}}}\n' for i in range(4))
    whole = (tmp_path / "list.jsonl").read_bytes()
    for tail, is_ours in ((b"", True), (b'{"i": ', True), (b'{"i": 4}\n', False), (b"note", False)):
        (tmp_path / "list.jsonl").write_bytes(whole + tail)
        with OutputDirectory(tmp_path) as files:
            assert files.is_ours("list.jsonl") == is_ours, tail
    (tmp_path / "list.jsonl").write_bytes(whole.replace(b"2", b"7"))
    with OutputDirectory(tmp_path) as files, pytest.raises(ValueError, match=r"list\.jsonl"):
        files.append("list.jsonl", "{}")


def test_a_kill_between_record_and_file_loses_nothing(tmp_path, monkeypatch):
    """Noted before it takes its place: the old bytes and the new ones are both known then."""
    with OutputDirectory(tmp_path) as files:
        files.write_text("a.txt", "old")
    killed = OutputDirectory(tmp_path)
    with killed.writing("a.txt") as temporary:
        temporary.write_text("new")
    killed._lock.release()  # without close: the record is as a kill leaves it
    with (tmp_path / RECORD).open("a") as file:
        file.write('{"file": "b.t')
    for text in ("new", "old"):
        (tmp_path / "a.txt").write_text(text)
        with OutputDirectory(tmp_path) as files:
            assert files.is_ours("a.txt")
    with OutputDirectory(tmp_path) as files:
        files.write_text("c.txt", "c")
    with OutputDirectory(tmp_path) as files:
        assert files.is_ours("a.txt") and files.is_ours("c.txt")


def test_the_same_directory_has_the_same_record(tmp_path):
    with OutputDirectory(tmp_path) as files:
        files.write_text("a.txt", "a")
        files.write_text("b.txt", "b")
        files.append("l", "{}")
    before = contents(tmp_path)
    with OutputDirectory(tmp_path) as files:
        files.write_text("b.txt", "c")
        files.remove("a.txt")
    with OutputDirectory(tmp_path) as files:
        files.write_text("b.txt", "b")
        files.write_text("a.txt", "a")
    assert contents(tmp_path) == before


def test_another_record_is_not_taken_for_ours(tmp_path):
    (tmp_path / RECORD).write_text("a diary\nof mine\n")
    with pytest.raises(ValueError, match="is no record of ours"):
        OutputDirectory(tmp_path)
    assert contents(tmp_path) == {RECORD: b"a diary\nof mine\n"}


def test_a_new_directory_replaces_nothing(tmp_path):
    with new_directory(tmp_path / "deep" / "new") as temporary:
        (temporary / "a").write_text("a")
        with pytest.raises(ValueError, match="another command"), new_directory(tmp_path / "deep" / "new"):
            pass
    assert contents(tmp_path) == {"deep/new/a": b"a"}
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("deep/new", "deep/new/a", "link"):
        with pytest.raises(ValueError, match="exists already"), new_directory(tmp_path / name):
            pass
    assert contents(tmp_path) == {"deep/new/a": b"a"}


def test_single_files_are_replaced_only_where_they_are_ours(tmp_path):
    for text in ("one", "two"):
        require_replaceable(tmp_path / "page.html", tmp_path / "page.json")
        with writing_file(tmp_path / "page.html") as temporary:
            temporary.write_text(text)
    (tmp_path / "page.json").write_text("mine")
    with pytest.raises(ValueError, match=r"page\.json"):
        require_replaceable(tmp_path / "page.html", tmp_path / "page.json")
    with pytest.raises(ValueError, match=r"page\.json"), writing_file(tmp_path / "page.json") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "page.html").read_text() == "two" and (tmp_path / "page.json").read_text() == "mine"


def test_one_at_a_time_and_nothing_left_of_a_refusal(tmp_path):
    with OutputDirectory(tmp_path / "out"), pytest.raises(ValueError, match="another command is writing to"):
        OutputDirectory(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "kept").mkdir()
    with OutputDirectory(tmp_path / "kept"):
        pass
    assert list((tmp_path / "kept").iterdir()) == []
