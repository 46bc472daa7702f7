"""Remote shards against a real HTTP server that fails, stalls and cuts; pipes; fsspec; cache; exact resume."""

import io
import itertools
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from web import Handler, Server

from common.distributed import World
from data_tools.ingest.records import Record
from data_tools.shards import index as index_module
from data_tools.shards.image_shards import ShardWriter
from data_tools.shards.index import ShardIndex
from data_tools.shards.loader import DecodeImage, DecodeTokens, Order, eval_batches, order_of, train_batches
from data_tools.shards.remote import RemoteOptions

SHARDS, EACH = 6, 5


def world(rank=0, size=1):
    return World(rank, size, rank, torch.device("cpu"), "none")


def write_shards(folder, split="train", shards=SHARDS):
    with ShardWriter(folder, split, samples_per_shard=EACH) as writer:
        for i in range(shards * EACH):
            buffer = io.BytesIO()
            pixels = np.random.default_rng(i).integers(0, 255, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(buffer, "PNG")
            writer.write(Record(f"{split}{i:03d}", buffer.getvalue(), "png", (f"caption {i}",)))


class FaultyHandler(Handler):
    """`server.faults`: path -> (kind of fault, how many requests have it)."""

    def do_GET(self):
        kind, times = self.server.faults.get(self.path, ("", 0))
        with self.server.lock:
            self.server.faults[self.path] = (kind, times - 1)
        if not kind or times < 1:
            return super().do_GET()
        self.server.requests[self.path] += 1
        data = (self.server.folder / self.path.strip("/")).read_bytes()
        if kind == "busy":
            return self.answer(503)
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2])
        self.wfile.flush()
        if kind == "stall":
            time.sleep(1.5)
        self.close_connection = True


@pytest.fixture
def site(tmp_path):
    folder = tmp_path / "site"
    write_shards(folder)
    write_shards(folder, "val", 1)
    with Server(folder) as server:
        server.faults = {}
        server.RequestHandlerClass = FaultyHandler
        yield server


def options(tmp_path, **changes):
    given = {"window_shards": 2, "backoff_s": 0.01, "stall_s": 5.0, "retry_cooldown_s": 60.0} | changes
    return RemoteOptions(cache=str(tmp_path / "cache"), **given)


def opened(site, tmp_path, split="train", source="", **changes):
    return ShardIndex.open(source or site.url, split, options(tmp_path, **changes)).require("png")


def keys(index, start, count, batch, ranks=1, workers=0):
    """Keys of `count` global batches from global counter `start`, the ranks' shares put together again."""
    streams = [
        train_batches(index, DecodeImage(16), batch, world(r, ranks), 5, start, workers) for r in range(ranks)
    ]
    return [[k for stream in streams for k in next(stream)["key"]] for _ in range(count)]


def test_same_order_on_any_ranks_workers_and_after_any_resume(site, tmp_path):
    index = opened(site, tmp_path)
    whole = keys(index, 0, 30, 4)  # four epochs
    flat = list(itertools.chain(*whole))
    for epoch in range(4):
        part = flat[epoch * 30 : (epoch + 1) * 30]
        assert sorted(part) == [f"train{i:03d}" for i in range(30)]
    assert flat[:30] != flat[30:60]
    assert keys(index, 7 * 4, 5, 4) == whole[7:12]
    assert keys(index, 0, 10, 4, ranks=2) == whole[:10]
    assert keys(index, 8, 3, 4, ranks=4) == whole[2:5]
    assert keys(opened(site, tmp_path / "other"), 0, 8, 4, workers=2) == whole[:8]


def test_images_are_those_of_the_local_shards(site, tmp_path):
    local, remote = ShardIndex.open(site.folder, "val"), opened(site, tmp_path, "val")
    one, two = (list(eval_batches(index, DecodeImage(16), 3)) for index in (local, remote))
    assert [b["key"] for b in one] == [b["key"] for b in two]
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(one, two, strict=True))


def test_a_window_holds_its_shards_alone_and_order_is_pinned():
    order = Order(30, 3, (EACH,) * SHARDS, 2)
    permutation = order.permutation(1)
    assert sorted(permutation) == list(range(30))
    for number, shards in enumerate(order.windows(1)):
        assert set(permutation[number * 10 : number * 10 + 10] // EACH) == set(shards)
    assert permutation[:6].tolist() == Order(30, 3, (EACH,) * SHARDS, 2).permutation(1)[:6].tolist()
    assert not np.array_equal(permutation, order.permutation(2))


def test_training_starts_after_its_first_shards_and_fetches_one_window_ahead(site, tmp_path):
    index = opened(site, tmp_path)
    order = order_of(index, 5)
    stream = train_batches(index, DecodeImage(16), 2, world(), 5, 0)
    next(stream)
    deadline = time.monotonic() + 10
    first_two = {f"/train-{s:05d}.tar" for window in order.windows(0)[:2] for s in window}
    looked_at = {"/train-00000.tar"}  # by `require`
    while time.monotonic() < deadline and not first_two <= set(site.requests):
        time.sleep(0.02)
    time.sleep(0.2)
    tars = {path for path in site.requests if path.endswith(".tar")}
    assert tars == first_two | looked_at
    stream.close()


def test_the_headers_of_few_shards_stay_in_memory(site, tmp_path, monkeypatch):
    """A hundred thousand shards have more headers than a machine has memory."""
    whole = keys(opened(site, tmp_path), 0, 15, 4)
    monkeypatch.setattr(index_module, "MOST_SCANNED", 1)
    index = opened(site, tmp_path, window_shards=1)
    keys(index, 0, 15, 4)
    assert len(index.remote._scanned) == 2
    assert keys(opened(site, tmp_path), 0, 15, 4) == whole


@pytest.mark.parametrize("connections", [1, 3])
def test_so_many_shards_are_fetched_at_a_time(site, tmp_path, connections):
    running, most = set(), []

    class Counting(Handler):
        def do_GET(self):
            running.add(self)
            most.append(len(running))
            time.sleep(0.1)
            super().do_GET()
            running.discard(self)

    index = opened(site, tmp_path, window_shards=3, connections=connections)
    local = opened(site, tmp_path / "one", connections=1, window_shards=3)
    site.RequestHandlerClass = Counting
    assert keys(index, 0, 8, 4) == keys(local, 0, 8, 4)
    assert max(most) <= connections + 1  # the training itself fetches what it needs at once
    assert connections == 1 or max(most) >= 2


def test_every_shard_is_fetched_once_and_never_again(site, tmp_path):
    keys(opened(site, tmp_path), 0, 20, 4, ranks=2, workers=2)
    tars = {path: n for path, n in site.requests.items() if path.endswith(".tar")}
    assert len(tars) == SHARDS and set(tars.values()) == {1}
    site.requests.clear()
    assert len(keys(opened(site, tmp_path), 0, 8, 4)) == 8
    assert not [path for path in site.requests if path.endswith(".tar")]


@pytest.mark.parametrize("kind", ["busy", "cut", "stall"])
def test_what_fails_is_tried_again(site, tmp_path, kind):
    whole = keys(opened(site, tmp_path / "sound"), 0, 8, 4)
    site.faults = {f"/train-{s:05d}.tar": (kind, 1) for s in (0, 3)}
    site.requests.clear()
    assert keys(opened(site, tmp_path, stall_s=0.5), 0, 8, 4) == whole
    assert site.requests["/train-00003.tar"] == 2


def test_a_dead_shard_is_replaced_counted_and_has_a_budget(site, tmp_path, capsys):
    whole = keys(opened(site, tmp_path / "sound"), 0, 15, 4)
    site.faults = {"/train-00002.tar": ("busy", 10**9)}
    site.requests.clear()
    lossy = keys(opened(site, tmp_path, max_failed_share=0.5, retries=1), 0, 15, 4)
    own = {f"train{i:03d}" for i in range(10, 15)}
    for before, after in zip(whole, lossy, strict=True):
        assert all(a == b for a, b in zip(before, after, strict=True) if a not in own)
    assert not own & set(itertools.chain(*lossy))
    said = capsys.readouterr().out
    assert said.count("skipped a shard that cannot be had (1 of 6 so far)") == 1 and "HTTP 503" in said
    assert site.requests["/train-00002.tar"] == 2, "one try and one retry, then it rests"
    with pytest.raises(ValueError, match=r"1 of 6 shards cannot be had.*max_failed_share 0.1.*HTTP 503"):
        keys(opened(site, tmp_path / "strict", retries=0), 0, 15, 4)
    index = opened(site, tmp_path / "eval", retries=0)
    assert sum(len(b["key"]) for b in eval_batches(index, DecodeImage(16), 4)) == 25
    assert "left out 5 samples of shards that cannot be had" in capsys.readouterr().out


def test_a_shard_that_is_gone_is_not_asked_for_again(site, tmp_path):
    (site.folder / "train-00004.tar").unlink()
    keys(opened(site, tmp_path, max_failed_share=0.5), 0, 15, 4)
    assert site.requests["/train-00004.tar"] == 1, "404: no retries"


def test_a_shard_with_fewer_samples_than_announced(site, tmp_path, capsys):
    whole = (site.folder / "train-00001.tar").read_bytes()
    (site.folder / "train-00001.tar").write_bytes(whole[: len(whole) // 2])
    seen = set(itertools.chain(*keys(opened(site, tmp_path), 0, 7, 4)))
    assert "train005" in seen and "train009" not in seen
    assert "skipped a corrupt sample" in capsys.readouterr().out


def test_the_cache_keeps_to_its_limit_at_every_moment(site, tmp_path, monkeypatch):
    whole = keys(opened(site, tmp_path / "sound"), 0, 30, 4)
    size = (site.folder / "train-00000.tar").stat().st_size
    held = []

    def replace_and_count(source, target, replace=os.replace):
        replace(source, target)
        held.append(len(list((tmp_path / "cache").glob("*/*.tar"))))

    monkeypatch.setattr(os, "replace", replace_and_count)
    index = opened(site, tmp_path, cache_gib=4.5 * size / 2**30)
    assert keys(index, 0, 30, 4) == whole
    assert max(held) == 4


def test_processes_share_the_cache(site, tmp_path):
    site.delay = 0.1
    program = (
        "import sys\n"
        "from data_tools.shards.index import ShardIndex\nfrom data_tools.shards.remote import RemoteOptions\n"
        "index = ShardIndex.open(sys.argv[1], 'train', RemoteOptions(sys.argv[2], window_shards=2))\n"
        "print(*sorted(index.samples[i].key for i in range(len(index))))"
    )
    command = [sys.executable, "-c", program, site.url, str(tmp_path / "cache")]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    found = [process.communicate(timeout=100)[0].split() for process in running]
    assert found[0] == found[1] and len(found[0]) == 30
    assert all(n == 1 for path, n in site.requests.items() if path.endswith(".tar"))


def test_pipes_and_local_shards_side_by_side(site, tmp_path):
    write_shards(tmp_path / "here", shards=2)
    source = f"{tmp_path / 'here'}::pipe:cat {site.folder}/train-{{00003..00004}}.tar"
    index = opened(site, tmp_path, source=source)
    names = {index.samples[i].key for i in range(len(index))}
    assert names == {f"train{i:03d}" for i in (*range(10), *range(15, 25))}
    assert set(itertools.chain(*keys(index, 0, 5, 4))) == names
    with pytest.raises(ValueError, match=r"1 of 1 shards cannot be had.*exit code 1.*No such file"):
        opened(site, tmp_path / "x", source="pipe:cat /nowhere/train-00000.tar", retries=0)
    with pytest.raises(ValueError, match=r"nothing came for 0.3 s"):
        opened(site, tmp_path / "y", source="pipe:sleep 30", retries=0, stall_s=0.3)


def test_any_fsspec_file_system(site, tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    for path in site.folder.glob("*"):
        memory.pipe_file(f"/bucket/{path.name}", path.read_bytes())
    whole = keys(opened(site, tmp_path / "sound"), 0, 8, 4)
    assert keys(opened(site, tmp_path, source="memory://bucket"), 0, 8, 4) == whole
    memory.rm("/bucket/dataset.json")
    index = opened(site, tmp_path / "listed", source="memory://bucket")
    assert len(index) == 30, "tars are listed and fetched where dataset.json is missing"
    memory.rm("/bucket", recursive=True)


def test_brace_patterns_choose_the_split(site, tmp_path):
    pattern = f"{site.url}/{{train-{{00000..00001}},val-00000}}.tar"
    assert len(opened(site, tmp_path, source=pattern)) == 10
    assert opened(site, tmp_path, "val", source=pattern).samples[0].key == "val000"
    local = f"{site.folder}/{{train-{{00000..00001}},val-00000}}.tar"
    assert len(ShardIndex.open(local)) == 10 and len(ShardIndex.open(local, "val")) == 5
    with pytest.raises(FileNotFoundError, match=r"no val-\*.tar among the 2 shards"):
        ShardIndex.open(f"{site.folder}/train-{{00000..00001}}.tar", "val")


def test_codes_bring_the_identity_of_their_tokenizer(tmp_path):
    buffer = io.BytesIO()
    np.save(buffer, np.arange(4, dtype=np.uint16).reshape(1, 4))
    with ShardWriter(tmp_path / "site", "train") as writer:
        writer.write(Record("a", b"", "", ("text",), extra={"ids.npy": buffer.getvalue()}))
    (tmp_path / "site" / "tokenizer.json").write_text('{"sha256": "abc"}')
    with Server(tmp_path / "site") as site:
        index = ShardIndex.open(site.url, "train", options(tmp_path)).require("ids.npy")
        assert next(eval_batches(index, DecodeTokens(), 1))["image_ids"].tolist() == [[0, 1, 2, 3]]
        assert (index.paths[0].parent / "tokenizer.json").is_file()
        with pytest.raises(ValueError, match="has no png"):
            index.require("png")


def test_mistakes_are_one_sentence(site, tmp_path):
    with pytest.raises(
        ValueError, match=r"has no dataset.json, and http cannot list a folder: name the shards"
    ):
        opened(site, tmp_path, source=f"{site.url}/nowhere")
    with pytest.raises(ValueError, match=r"cannot reach http://127\.0\.0\.1:9"):
        opened(site, tmp_path, source="http://127.0.0.1:9/shards", retries=0)
    with pytest.raises(ValueError, match="cannot open nonsense://"):
        opened(site, tmp_path, source="nonsense://bucket/shards")
    with pytest.raises(FileNotFoundError, match=r"no test-\*.tar among"):
        opened(site, tmp_path, "test")
    with pytest.raises(ValueError, match="window_shards must be at least 1"):
        RemoteOptions(window_shards=0)


def test_many_local_shards_stay_under_the_limit_of_open_files(tmp_path):
    with ShardWriter(tmp_path, "train", samples_per_shard=1) as writer:
        for i in range(300):
            writer.write(Record(f"k{i:03d}", b"", "", (f"caption {i}",)))
    program = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))\n"
        "from data_tools.shards.index import ShardIndex\n"
        "index = ShardIndex.open(sys.argv[1])\n"
        "order = [*range(300), *range(299, -1, -1)]\n"
        "assert all(index.read(i)['txt'] == b'caption %d' % i for i in order)"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)
