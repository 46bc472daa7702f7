"""Image shards -> token shards: the codes are the tokenizer's, runs go on, tokenizers never mix."""

import contextlib
import functools
import http.server
import io
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from common.checkpoint import new_step_directory
from data_tools.ingest.records import Record
from data_tools.shards.image_shards import ShardWriter
from data_tools.shards.index import ShardIndex
from data_tools.shards.loader import DecodeImage, eval_batches
from vq.autoencoder import FastConfig
from vq.encode_shards import main
from vq.model import ImageTokenizer, TokenizerConfig


def tiny_tokenizer(run_dir, seed=0):
    torch.manual_seed(seed)
    fast = FastConfig(haar_levels=1, channels=(32, 32), encoder_blocks=(1, 1), decoder_blocks=(1, 1))
    tokenizer = ImageTokenizer(TokenizerConfig(image_size=16, fast=fast, codebook_size=32)).eval()
    with new_step_directory(run_dir, 1) as directory:
        tokenizer.write(directory, 1)
    return tokenizer


@pytest.fixture
def world(tmp_path):
    """A run with a tokenizer, and image shards of 9 + 2 images, one of them corrupt."""
    tiny_tokenizer(tmp_path / "run")
    rng = np.random.default_rng(0)
    for split, count in (("train", 9), ("val", 2)):
        with ShardWriter(tmp_path / "images", split, samples_per_shard=4) as writer:
            for i in range(count):
                buffer = io.BytesIO()
                Image.fromarray(rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(buffer, "PNG")
                data = b"no image" if (split, i) == ("train", 5) else buffer.getvalue()
                writer.write(Record(f"{split}{i}", data, "png", (f"caption {i}",), {"label": i}))
    return tmp_path


@pytest.mark.parametrize("name", ["train-00000.tar", "roundtrip.png", "dataset.json"])
def test_the_users_files_are_refused_and_stay(world, name, capsys):
    (world / "tokens").mkdir()
    (world / "tokens" / name).write_bytes(b"mine")
    with pytest.raises(SystemExit):
        encode(world)
    assert f"holds {name}, not written here" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in (world / "tokens").iterdir()} == {name: b"mine"}


def test_a_changed_roundtrip_stays(world, capsys):
    encode(world)
    encode(world)
    (world / "tokens" / "roundtrip.png").write_bytes(b"mine")
    with pytest.raises(SystemExit):
        encode(world)
    assert "roundtrip.png" in capsys.readouterr().err
    assert (world / "tokens" / "roundtrip.png").read_bytes() == b"mine"


def encode(world, *flags, run="run", target="tokens"):
    return main([str(world / run), str(world / "images"), str(world / target), "--precision", "fp32", *flags])


def test_view_zero_is_the_plain_image(world, capsys):
    counts = encode(world, "--views", "3")
    assert counts == {"images": 10, "skipped": 1, "shards_kept": 0}
    assert "train5" in capsys.readouterr().out
    tokenizer = ImageTokenizer.from_pretrained(world / "run")
    expected = {}
    for split in ("train", "val"):
        for batch in eval_batches(ShardIndex.open(world / "images", split), DecodeImage(16, None, True), 3):
            expected |= dict(zip(batch["key"], tokenizer.encode_ids(batch["image"]), strict=True))
    for split, views in (("train", 3), ("val", 1)):
        tokens = ShardIndex.open(world / "tokens", split).require("ids.npy")
        for i, sample in enumerate(tokens.samples):
            members = tokens.read(i)
            ids = np.load(io.BytesIO(members["ids.npy"]))
            assert ids.dtype == np.uint16 and ids.shape == (views, 16)
            assert ids[0].tolist() == expected[sample.key].tolist()
            assert members["txt"].decode() == f"caption {sample.key[-1]}"
            assert b'"label"' in members["json"]
    assert (world / "tokens" / "roundtrip.png").is_file()


def test_going_on_gives_the_same_bytes(world):
    encode(world)
    names = [p.name for p in sorted((world / "tokens").glob("*.tar"))]
    whole = {name: (world / "tokens" / name).read_bytes() for name in names}
    (world / "tokens" / names[1]).unlink()
    counts = encode(world)
    assert counts["shards_kept"] == len(names) - 1
    assert {name: (world / "tokens" / name).read_bytes() for name in names} == whole


def test_tokenizers_never_mix(world, capsys):
    encode(world)
    tiny_tokenizer(world / "other", seed=1)
    with pytest.raises(SystemExit) as stop:
        encode(world, run="other")
    assert stop.value.code == 2 and "were made by the tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "source", "said"),
    [
        (("--views", "0"), "images", "views"),
        ((), "nowhere", "no data folder"),
        ((), "run", "no train-"),
    ],
)
def test_bad_input(world, capsys, flags, source, said):
    with pytest.raises(SystemExit) as stop:
        main([str(world / "run"), str(world / source), str(world / "out"), *flags])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


def test_remote_shards_give_the_same_bytes(world, monkeypatch):
    monkeypatch.setenv("SHARD_CACHE", str(world / "cache"))
    encode(world)
    with serve(world / "images") as url:
        main([str(world / "run"), url, str(world / "other"), "--precision", "fp32"])
    for path in (world / "tokens").glob("*.tar"):
        assert path.read_bytes() == (world / "other" / path.name).read_bytes()


@contextlib.contextmanager
def serve(folder):
    handler = functools.partial(QuietHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass
