import base64
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from small_checkpoint import CAPTIONS, replace_weights

from common import compact
from common.files import sha256_file
from dalle.model import Dalle
from dalle.pipeline import TextToImage
from dalle.release import Card, main, push_to_hub, release
from vq.model import ImageTokenizer


@pytest.fixture
def run_dir(generator_dir, tmp_path) -> Path:
    """A run with a training state and metrics beside its checkpoint."""
    step = shutil.copytree(generator_dir, tmp_path / "run" / "step_00000007")
    (step / "training_state").mkdir()
    (step / "training_state" / "state.pt").write_bytes(b"x" * 1000)
    (step / "train_config.json").write_text('{"run_dir": "/home/somebody/secret"}')
    (tmp_path / "run" / "latest").symlink_to(step.name)
    rows = [{"kind": "val", "step": s, "image_bits": b} for s, b in ((3, 9.0), (7, 8.125), (9, 1.0))]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return tmp_path / "run"


def test_a_release_draws_and_holds_no_training_state(run_dir, tmp_path, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "grid.png")
    target = tmp_path / "released"
    flags = ["--card.title", "Goods", "--card.data", "Ours (CC0)", "--card.licence", "mit"]
    main([str(run_dir), str(target), *flags, "--card.grid", str(tmp_path / "grid.png")])
    names = {p.relative_to(target).as_posix() for p in target.rglob("*") if p.is_file()}
    assert {"README.md", "samples.png", "config.json", "model.safetensors"} <= names
    assert not any("training_state" in n or "train_config" in n for n in names)
    card = (target / "README.md").read_text("utf-8")
    for word in (
        "license: mit",
        "# Goods",
        "Ours (CC0)",
        "| image_bits | 8.125 |",
        "![samples](samples.png)",
    ):
        assert word in card, word
    assert "secret" not in card and "weights in float16" in capsys.readouterr().out
    images = TextToImage.from_pretrained(target, "cpu")(CAPTIONS[0], 2, cfg_scale=2.0)
    assert len(images) == 2


def test_the_runs_last_sample_grid_is_shown(run_dir, tmp_path):
    (run_dir / "samples").mkdir()
    for step, color in ((3, "red"), (7, "green"), (9, "blue")):
        Image.new("RGB", (8, 8), color).save(run_dir / "samples" / f"samples_{step:08d}.png")
    (run_dir / "latest" / "train_config.json").write_text('{"sample_texts": ["a shoe", "a cup"]}')
    target = release(run_dir, tmp_path / "released", Card())
    assert Image.open(target / "samples.png").getpixel((0, 0)) == (0, 128, 0), "that of the checkpoint's step"
    assert "A row a text: a shoe, a cup" in (target / "README.md").read_text("utf-8")


@pytest.mark.parametrize("precision", ["float16", "bfloat16", "float32"])
def test_weights_are_rounded_and_hashes_follow(generator_dir, tmp_path, precision):
    target = release(generator_dir, tmp_path / "released", Card(), precision)
    for folder in (".", "image_tokenizer"):
        before, after = (load_file(d / folder / "model.safetensors") for d in (generator_dir, target))
        dtype = getattr(torch, precision)
        assert all(torch.equal(after[n], t.to(dtype)) for n, t in before.items())
        config = json.loads((target / folder / "config.json").read_text())
        assert config["sha256"] == sha256_file(target / folder / "model.safetensors")


def test_eight_bits_draw_too_and_can_be_released_again(generator_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(compact, "LARGE", 64)
    target = release(generator_dir, tmp_path / "released", Card(), "int8")
    assert torch.int8 in {t.dtype for t in load_file(target / "model.safetensors").values()}
    images = TextToImage.from_pretrained(target, "cpu")(CAPTIONS[0], 1)
    assert len(images) == 1
    release(target, tmp_path / "wider", Card(), "float16")
    assert TextToImage.from_pretrained(tmp_path / "wider", "cpu")(CAPTIONS[0], 1)[0].size == images[0].size


def test_what_cannot_be_released_says_why(generator_dir, tmp_path, capsys):
    copy = shutil.copytree(generator_dir, tmp_path / "copy")
    replace_weights(copy, lambda w: w["norm.weight"][:1].fill_(1e6))
    lost = shutil.copytree(generator_dir, tmp_path / "lost")
    replace_weights(lost, lambda w: w["norm.weight"][:1].fill_(float("nan")))
    short = shutil.copytree(generator_dir, tmp_path / "short")
    (short / "model.safetensors").write_bytes((short / "model.safetensors").read_bytes()[:-9])
    (tmp_path / "grid.txt").write_text("no image")
    for arguments, message in (
        (
            [str(copy), str(tmp_path / "a")],
            "the checkpoint cannot be released: norm.weight does not fit into torch",
        ),
        ([str(lost), str(tmp_path / "a")], "norm.weight holds numbers that are not finite"),
        ([str(short), str(tmp_path / "a")], "short/model.safetensors is not the file that was saved"),
        (
            [str(generator_dir), str(tmp_path / "a"), "--card.grid", str(tmp_path / "grid.txt")],
            "is no image",
        ),
        ([str(generator_dir), str(tmp_path)], "exists already"),
        ([str(tmp_path / "nowhere"), str(tmp_path / "a")], "nowhere"),
        (
            [str(generator_dir), str(tmp_path / "a"), "--card.grid", "nowhere.png"],
            "no sample grid nowhere.png",
        ),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2 and message in capsys.readouterr().err
        assert not (tmp_path / "a").exists()


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as an upload of small files needs."""

    def do_POST(self) -> None:
        size = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(size)
        if self.path == "/api/repos/create":
            self.server.created = json.loads(body)
            self.reply({"url": f"{self.server.address}/me/goods"})
        elif "/preupload/" in self.path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            self.reply({"files": files})
        elif "/commit/" in self.path:
            for row in map(json.loads, body.splitlines()):
                if row["key"] == "file":
                    self.server.files[row["value"]["path"]] = base64.b64decode(row["value"]["content"])
            self.reply(
                {"commitUrl": f"{self.server.address}/me/goods/commit/1", "commitOid": "1", "hookOutput": ""}
            )
        else:
            self.reply({})

    def do_GET(self) -> None:
        self.reply({"id": "me/goods", "siblings": [], "sha": "0"})

    def reply(self, content: dict) -> None:
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.created = {}, {}
    server.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.address)
    monkeypatch.setenv("HF_TOKEN", "hf_for_this_test_alone")
    yield server
    server.shutdown()
    server.server_close()


def test_push_to_hub_uploads_the_release(hub, generator_dir):
    pipeline = TextToImage.from_pretrained(generator_dir, "cpu")
    address = pipeline.push_to_hub("me/goods", Card(title="Goods", licence="mit"))
    assert address == f"{hub.address}/me/goods/commit/1" and hub.created["visibility"] == "private"
    assert {"README.md", "config.json", "model.safetensors", "image_tokenizer/config.json"} <= set(hub.files)
    assert b"# Goods" in hub.files["README.md"] and "training_state/state.pt" not in hub.files
    assert len(hub.files["model.safetensors"]) < 0.6 * (generator_dir / "model.safetensors").stat().st_size


def test_a_release_goes_up_as_it_is(hub, generator_dir, tmp_path):
    card = Card(title="Ours", data="Our catalogue", licence="mit")
    released = release(generator_dir, tmp_path / "released", card, "int8")
    TextToImage.from_pretrained(released, "cpu").push_to_hub("me/goods")
    for name in ("README.md", "model.safetensors", "image_tokenizer/model.safetensors"):
        assert hub.files[name] == (released / name).read_bytes()


def test_push_refuses_what_is_no_release(run_dir, generator_dir, pipeline):
    for directory in (generator_dir, run_dir / "latest"):
        with pytest.raises(ValueError, match="is no release"):
            push_to_hub(directory, "me/goods")
    alone = TextToImage(
        Dalle.from_pretrained(generator_dir), pipeline.image_tokenizer, pipeline.text_tokenizer
    )
    with pytest.raises(ValueError, match="loaded from a checkpoint directory"):
        alone.push_to_hub("me/goods")


def test_push_says_why_the_hub_refused(generator_dir, tmp_path, monkeypatch):
    released = release(generator_dir, tmp_path / "released", Card())
    with pytest.raises(ValueError, match="cannot push to a/b/c"):
        push_to_hub(released, "a/b/c")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match="cannot push to me/goods"):
        push_to_hub(released, "me/goods")


def test_a_decoder_tuned_since_draws_the_same_codes(generator_dir, tmp_path):
    tuned = ImageTokenizer.from_pretrained(generator_dir / "image_tokenizer")
    with torch.no_grad():
        for parameter in tuned.decoder.parameters():
            parameter.mul_(0.9)
    for name, tokenizer in (("tuned", tuned), ("other", ImageTokenizer(tuned.config))):
        (tmp_path / name).mkdir()
        tokenizer.write(tmp_path / name, 0)
    target = release(generator_dir, tmp_path / "released", Card(), "float32", str(tmp_path / "tuned"))
    before, after = (TextToImage.from_pretrained(path, "cpu") for path in (generator_dir, target))
    ids = [next(iter(p.generate(CAPTIONS[:1], 1))).ids.tolist() for p in (before, after)]
    assert ids[0] == ids[1]
    assert before.image_tokenizer.sha256 != after.image_tokenizer.sha256
    with pytest.raises(ValueError, match="other codes than the tokenizer that"):
        release(generator_dir, tmp_path / "no", Card(), image_tokenizer=str(tmp_path / "other"))
    with pytest.raises(ValueError, match="leave --image-tokenizer out"):
        release(tmp_path / "tuned", tmp_path / "no", Card(), image_tokenizer=str(tmp_path / "tuned"))
