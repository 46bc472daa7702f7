"""Where shards go: one run at a time to a folder, and object stores that give the same files."""

import pytest
from make_sources import write_mixed, write_t2i

from data_tools import shard as module
from data_tools.shard import main
from data_tools.shards.targets import LocalTarget


def run(src, dst, *flags):
    return main([str(src), str(dst), "--workers", "0", "--size", "16", *flags])


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_two_runs_at_once_are_refused(tmp_path, capsys):
    holder = LocalTarget(tmp_path / "out")
    holder.lock()
    with pytest.raises(SystemExit):
        run(write_t2i(tmp_path / "src"), tmp_path / "out")
    assert "another command is writing" in capsys.readouterr().err
    holder.close()


@pytest.mark.parametrize(
    "name", ["report.json", "dropped.jsonl", "dataset.json", "train-00000.tar", "val-00007.tar"]
)
def test_the_users_files_are_refused_and_stay(tmp_path, name, capsys):
    out = tmp_path / "out"
    out.mkdir()
    for mine in (name, ".notes.tmp", "photo.tar"):
        (out / mine).write_text('{"mine": 1}')
    before = contents(out)
    with pytest.raises(SystemExit) as stopped:
        run(write_t2i(tmp_path / "src"), out)
    assert stopped.value.code == 2 and name in capsys.readouterr().err
    assert contents(out) == before


def test_hidden_files_of_the_users_stay(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".notes.tmp").write_text("mine")
    run(write_t2i(tmp_path / "src"), tmp_path / "out")
    assert (tmp_path / "out" / ".notes.tmp").read_text() == "mine"


def test_remote_target_equals_a_folder_also_after_a_crash(tmp_path, monkeypatch):
    import fsspec

    source = write_mixed(tmp_path / "src")
    flags = ["--samples-per-shard", "4", "--val-share", "0.2"]
    run(source, tmp_path / "local", *flags)
    with monkeypatch.context() as patch:
        uploads = []

        def failing(self, path):
            uploads.append(path.name)
            if len(uploads) == 4:
                raise OSError("the network is down")
            original(self, path)

        original = module.open_target("memory://x").put.__func__
        patch.setattr("data_tools.shards.targets.RemoteTarget.put", failing)
        with pytest.raises(SystemExit):
            run(source, "memory://bucket/shards", *flags)
    run(source, "memory://bucket/shards", *flags)
    memory = fsspec.filesystem("memory")
    found = {
        name.removeprefix("/bucket/shards/"): memory.cat_file(name) for name in memory.find("/bucket/shards")
    }
    assert found == contents(tmp_path / "local")
    with pytest.raises(SystemExit) as error:
        run(source, "nosuch://bucket/shards")
    assert error.value.code == 2
