"""Sources and targets by URL give what folders give: memory:// for object stores, a server for http(s)."""

import json
import shutil
import time
from pathlib import Path

import fsspec
import pytest
from make_sources import write_t2i
from web import Server

from data_tools.clean import main as clean
from data_tools.dedup import main as dedup
from data_tools.dedup import work_folder
from data_tools.download.run import main as download
from data_tools.ingest.records import Record
from data_tools.readers import elsewhere
from data_tools.readers.detect import open_source
from data_tools.shard import main as shard
from data_tools.stats import main as stats

ALONE = ["--workers", "0"]
BUCKET = "memory://elsewhere/images"


@pytest.fixture
def images(tmp_path):
    """Shards of both splits; the images of some are the same."""
    write_t2i(tmp_path / "t2i", 60)
    shard([str(tmp_path / "t2i"), str(tmp_path / "images"), "--samples-per-shard", "5", "--size", "32",
           "--val-share", "0.2", *ALONE])  # fmt: skip
    return tmp_path / "images"


@pytest.fixture
def bucket(images):
    memory = fsspec.filesystem("memory")
    memory.put(f"{images}/", "/elsewhere/images/", recursive=True)
    yield BUCKET
    memory.rm("/elsewhere", recursive=True)


def written(folder: str) -> dict[str, bytes]:
    """Name to bytes of a local folder or of one in memory."""
    system, root = fsspec.core.url_to_fs(folder)
    files = {name.removeprefix(f"{root.rstrip('/')}/"): system.cat_file(name) for name in system.find(root)}
    return {name: data for name, data in files.items() if not name.endswith(".lock")}


def without_job(files: dict[str, bytes]) -> dict[str, bytes]:
    """The job names the source's files, of a folder others than the tars too; the rest is the same to the byte."""
    report = json.loads(files["report.json"])
    return files | {"report.json": {k: v for k, v in report.items() if k != "job"}}


@pytest.mark.parametrize("command", [shard, clean, dedup])
def test_a_bucket_gives_the_bytes_of_a_folder(command, images, bucket, tmp_path):
    flags = ["--samples-per-shard", "7", *ALONE]
    command([str(images), str(tmp_path / "local"), *flags])
    command([bucket, "memory://elsewhere/out", *flags])
    found = written("memory://elsewhere/out")
    assert without_job(found) == without_job(written(str(tmp_path / "local")))
    assert len([name for name in found if name.endswith(".tar")]) >= 3
    before = written("memory://elsewhere/out")
    command([bucket, "memory://elsewhere/out", *flags])  # complete already
    assert written("memory://elsewhere/out") == before
    assert not work_folder("memory://elsewhere/out").exists()


def test_file_urls_are_folders(images, tmp_path):
    dedup([str(images), str(tmp_path / "a"), *ALONE])
    dedup([f"file://{images}", f"file://{tmp_path}/b", "--against", f"file://{images}/val-00000.tar", *ALONE])
    kept = [json.loads((tmp_path / name / "report.json").read_text())["kept"] for name in "ab"]
    assert kept[0] > kept[1] > 0


def test_http_gives_the_samples_of_a_folder(images, tmp_path):
    with Server(images) as server:
        for source, name in ((str(images), "local"), (server.url, "http")):
            shard([source, str(tmp_path / name), *ALONE])
            stats([source, "--out", str(tmp_path / f"{name}.html"), *ALONE])
        pattern = f"{server.url}/train-{{00000..00001}}.tar"
        shard([pattern, str(tmp_path / "two"), *ALONE])
    local, http = (without_job(written(str(tmp_path / name))) for name in ("local", "http"))
    assert http == local
    numbers = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("local", "http")]
    assert numbers[1] | {"source": ""} == numbers[0] | {"source": ""} and numbers[1]["source"].startswith(
        "http"
    )
    assert json.loads((tmp_path / "two" / "report.json").read_text())["splits"] == {"train": 10}


def test_a_list_by_url(tmp_path):
    with Server() as server:
        lines = ["url,caption", *(f"{server.url}/good/{i},text {i}" for i in range(6))]
        (tmp_path / "list.csv").write_text("\n".join(lines) + "\n", "utf-8")
        fsspec.filesystem("memory").put_file(str(tmp_path / "list.csv"), "/lists/list.csv")
        for source, name in ((str(tmp_path / "list.csv"), "local"), ("memory://lists/list.csv", "memory")):
            download([source, str(tmp_path / name), "--allow-private", "--min-success", "0"])
    assert written(str(tmp_path / "memory")) == written(str(tmp_path / "local"))


def on_disk(folder: str) -> list[Path]:
    return list(Path(folder).rglob("*.tar"))


def test_two_shards_are_on_the_disk_and_none_afterwards(bucket, monkeypatch):
    folders, most = [], 0
    made = elsewhere.tempfile.mkdtemp
    monkeypatch.setattr(elsewhere.tempfile, "mkdtemp", lambda **k: folders.append(made(**k)) or folders[-1])
    source, keys = open_source(bucket), []
    for item in source:
        assert isinstance(item, Record)
        keys.append(item.key)
        while len(keys) == 1 and len(on_disk(folders[0])) < 2:  # the second comes while the first is read
            time.sleep(0.01)
        most = max(most, len(on_disk(folders[0])))
    assert len(keys) == 60 and most == 2
    assert not on_disk(folders[0])
    del source, item
    assert not Path(folders[0]).exists()


def test_a_shard_that_is_gone_ends_the_command_and_the_same_command_goes_on(images, bucket, tmp_path, capsys):
    flags = ["--samples-per-shard", "3", *ALONE]
    shard([str(images), str(tmp_path / "local"), *flags])
    whole = elsewhere.ShardCache._fetch

    def failing(self, at):
        if at.path.name == "train-00005.tar":
            raise elsewhere.ShardUnavailable(at.url, "gone")
        whole(self, at)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(elsewhere.ShardCache, "_fetch", failing)
        with pytest.raises(SystemExit) as stop:
            shard([bucket, str(tmp_path / "out"), *flags])
    assert stop.value.code == 2 and "train-00005.tar" in capsys.readouterr().err
    shard([bucket, str(tmp_path / "out"), *flags])
    assert "continuing after" in capsys.readouterr().err
    assert without_job(written(str(tmp_path / "out"))) == without_job(written(str(tmp_path / "local")))


@pytest.mark.parametrize(
    ("source", "flags", "said"),
    [
        ("memory://nothing/here", [], "holds neither dataset.json nor any .tar"),
        ("nonsense://bucket/x", [], "cannot open nonsense://"),
        ("memory://nothing/list.csv", [], "cannot read memory://nothing/list.csv"),
        (BUCKET, ["--format", "jsonl"], "webdataset alone is read by URL"),
        (BUCKET, ["--split", "test"], "has no split 'test'"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(bucket, tmp_path, capsys, source, flags, said):
    with pytest.raises(SystemExit) as stop:
        shard([source, str(tmp_path / "out"), *flags, *ALONE])
    assert stop.value.code == 2 and said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_users_groups_in_a_bucket_stay(bucket, capsys):
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/elsewhere/mine/groups.tsv", b"mine")
    with pytest.raises(SystemExit) as stop:
        dedup([bucket, "memory://elsewhere/mine", *ALONE])
    assert stop.value.code == 2 and "was not written here" in capsys.readouterr().err
    assert memory.cat_file("/elsewhere/mine/groups.tsv") == b"mine"


def test_a_killed_dedup_of_a_bucket_goes_on(images, bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    flags = ["--samples-per-shard", "7", *ALONE]
    dedup([str(images), str(tmp_path / "local"), *flags])
    with monkeypatch.context() as patch:
        patch.setattr("data_tools.dedup.make_plan", lambda *_: (_ for _ in ()).throw(OSError("killed")))
        with pytest.raises(SystemExit):
            dedup([bucket, "memory://elsewhere/out", *flags])
    work = work_folder("memory://elsewhere/out")
    assert (work / "0.bin").stat().st_size > 0 and work.is_relative_to(tmp_path / "home")
    dedup([bucket, "memory://elsewhere/out", *flags])
    found, local = (written(at) for at in ("memory://elsewhere/out", str(tmp_path / "local")))
    assert without_job(found) == without_job(local) and not work.exists()
    shutil.rmtree(tmp_path / "home")
