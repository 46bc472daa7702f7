"""--lines: from scratch and from a generator without, exact resume, refusals; then --line, --like and --whiten."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from test_fine_tune import flags, refusal
from tiny_data import write_image_shards, write_image_tokenizer

import generate
import train_dalle
from common.checkpoint import read_config, read_weights
from common.distributed import start_world
from dalle.inpaint import keep_background
from dalle.model import KIND
from dalle.pipeline import TextToImage
from dalle.release import Card, release
from dalle.training.captions import keep_drawings
from vq.encode_shards import Options, encode_shards
from vq.enlarge import enlarged
from vq.model import ImageTokenizer

SIZES = ("--model.dim", "32", "--model.num-layers", "2", "--model.num-heads", "2", "--max-text-len", "24")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """images/, tokenizer/, tokens/ with drawings, plain_tokens/ without; plain/ and lines/: runs of 4 steps."""
    folder = tmp_path_factory.mktemp("made")
    write_image_shards(folder / "images")
    write_image_tokenizer(folder / "tokenizer")
    tokenizer = ImageTokenizer.from_pretrained(folder / "tokenizer")
    for name, lines in (("tokens", "mixed"), ("plain_tokens", "none")):
        options = Options("", str(folder / "images"), folder / name, views=2, check=0, lines=lines)
        encode_shards(tokenizer, options, start_world("cpu"))
    own = ("--image-tokenizer", str(folder / "tokenizer"), *SIZES)
    train_dalle.main(flags(folder, folder / "plain", *own))
    init = ("--init", str(folder / "plain"), "--lines", "--line-width", "16", "--loop.save-every", "2")
    train_dalle.main(flags(folder, folder / "lines", *init, "--sample-images", "1"))
    return folder


@pytest.fixture
def drawing(tmp_path) -> Path:
    image = Image.new("L", (64, 64), 255)
    ImageDraw.Draw(image).ellipse((12, 12, 52, 52), outline=0, width=3)
    image.save(tmp_path / "drawing.png")
    return tmp_path / "drawing.png"


def metrics(run: Path, name: str) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [row[name] for row in rows if name in row]


def test_a_generator_gets_an_encoder(made):
    config = read_config(made / "lines/latest", KIND)["model"]
    assert (config["line_factor"], config["line_width"], config["dim"]) == (4, 16, 32)
    weights = read_weights(made / "lines/latest")
    assert weights["line_encoder.out.weight"].abs().max() > 0  # it was trained
    assert np.isfinite(metrics(made / "lines", "line_gain_bits")).all() and metrics(
        made / "lines", "line_gain_bits"
    )
    assert any((made / "lines/samples").glob("samples_lines_*.png"))


def test_it_starts_as_the_generator_it_was(made, tmp_path):
    still = ("--optim.lr", "1e-12", "--ema-decay", "0", "--init", str(made / "plain"), "--lines")
    train_dalle.main(flags(made, tmp_path / "run", *still, steps=1))
    before, after = read_weights(made / "plain/latest"), read_weights(tmp_path / "run/latest")
    assert {n for n in after if n not in before} == {n for n in after if n.startswith("line_encoder.")}
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-6)


def test_without_lines_config_and_names_are_the_old_ones(made):
    assert not any("line" in name for name in read_config(made / "plain/latest", KIND)["model"])
    assert not any("line" in name for name in read_weights(made / "plain/latest"))
    state = torch.load(made / "plain/latest/training_state/state.pt", weights_only=True)
    assert "line_factor" not in json.dumps(
        state["task"]["config"] if "task" in state else state.get("config", {})
    )


def test_a_run_goes_on_exactly(made, tmp_path):
    run = tmp_path / "lines"
    shutil.copytree(made / "lines", run, symlinks=True)
    whole = read_weights(run / "step_00000004")
    shutil.rmtree(run / "step_00000004")
    init = ("--init", str(made / "plain"), "--lines", "--line-width", "16", "--loop.save-every", "2")
    train_dalle.main(flags(made, run, *init, "--sample-images", "1"))
    again = read_weights(run / "step_00000004")
    assert all(torch.equal(again[n], whole[n]) for n in whole)


def test_drawings_are_hidden_whatever_happens_to_captions():
    keys = [f"{i:05d}" for i in range(2000)]
    kept = keep_drawings(keys, 0.3, (0, 5))
    assert abs(kept.float().mean() - 0.7) < 0.05
    assert torch.equal(kept, keep_drawings(keys, 0.3, (0, 5)))
    assert not torch.equal(kept, keep_drawings(keys, 0.3, (0, 6)))
    assert keep_drawings(keys, 0.0, (0, 5)).all()


@pytest.mark.parametrize(
    ("data", "more", "said"),
    [
        ("plain_tokens", ("--init", "{made}/plain", "--lines"), "needs token shards with drawings"),
        ("images", ("--init", "{made}/plain", "--lines"), "needs token shards with drawings"),
        ("tokens", ("--init", "{made}/lines"), "train it with --lines"),
        ("tokens", ("--init", "{made}/plain", "--lines", "--line-width", "10"), "multiple of 8"),
        ("tokens", ("--lines", "--line-dropout", "1"), "line_dropout must lie in"),
    ],
)
def test_refusals(made, tmp_path, capsys, data, more, said):
    arguments = flags(made, tmp_path / "run", *(m.format(made=made) for m in more))
    arguments[1] = str(made / data)
    assert said in refusal(capsys, arguments)


def run(made, out: Path, *more: str, run_dir: str = "lines") -> list[dict]:
    arguments = ["红色的圆盘", "2", str(out), "--checkpoint", str(made / run_dir), "--device", "cpu", *more]
    generate.main([*arguments, "--fast.engine", "plain", "--fast.weights", "float32"])
    return [json.loads(line) for line in (out / "images.jsonl").read_text("utf-8").splitlines()]


def refused(capsys, made, out: Path, *more: str, run_dir: str = "lines") -> str:
    with pytest.raises(SystemExit) as stopped:
        run(made, out, *more, run_dir=run_dir)
    assert stopped.value.code == 2 and not (out / "images.jsonl").exists()
    return capsys.readouterr().err


class TestGenerate:
    def test_a_drawing_of_weight_0_is_none(self, made, tmp_path, drawing):
        plain = run(made, tmp_path / "a")
        none = run(made, tmp_path / "b", "--line", str(drawing), "--line-scale", "0")
        some = run(made, tmp_path / "c", "--line", str(drawing), "--line-cfg-scale", "3")
        assert plain[0]["source"] is None and "whiten" not in plain[0]
        assert none[0]["log_likelihood"] == plain[0]["log_likelihood"] != some[0]["log_likelihood"]
        assert some[0]["source"]["line"] == str(drawing) and some[0]["source"]["line_cfg_scale"] == "3.0"
        assert len(some[0]["source"]["line_sha256"]) == 64

    def test_a_decoder_of_larger_images_takes_the_same_drawings(self, made, tmp_path, drawing):
        tokenizer = ImageTokenizer.from_pretrained(made / "tokenizer")
        enlarged(tokenizer).save_pretrained(tmp_path / "large")
        release(made / "lines", tmp_path / "release", Card(), "float32", str(tmp_path / "large"))
        small = run(made, tmp_path / "a", "--line", str(drawing))
        large = run(made, tmp_path / "b", "--line", str(drawing), run_dir=str(tmp_path / "release"))
        assert [row["log_likelihood"] for row in large] == [row["log_likelihood"] for row in small]
        sizes = [Image.open(tmp_path / name / "0000.png").size for name in "ab"]
        assert sizes == [(tokenizer.image_size,) * 2, (2 * tokenizer.image_size,) * 2]

    def test_like_keeps_the_background(self, made, tmp_path):
        photo = Image.new("RGB", (64, 64), (240, 240, 240))
        ImageDraw.Draw(photo).ellipse((22, 22, 42, 42), fill=(30, 60, 200))
        photo.save(tmp_path / "photo.png")
        pipeline = TextToImage.from_pretrained(made / "lines")
        source = keep_background(pipeline.image_tokenizer, photo)
        kept = source.keep.view(4, 4)
        assert kept[0].all() and kept[:, 0].all() and not kept[1:3, 1:3].any()
        rows = run(made, tmp_path / "out", "--like", str(tmp_path / "photo.png"))
        assert rows[0]["source"]["like"].endswith("photo.png")
        assert keep_background(pipeline.image_tokenizer, Image.new("RGB", (64, 64), "white")) is None

    def test_whiten(self, made, tmp_path):
        rows = run(made, tmp_path / "out", "--whiten", "--white.threshold", "0.5")
        assert rows[0]["whiten"] == {"method": "border", "threshold": 0.5, "erode": 0, "feather": 0.0}

    def test_bad_input(self, made, tmp_path, capsys, drawing):
        empty = tmp_path / "empty.png"
        Image.new("L", (32, 32), 255).save(empty)
        (tmp_path / "text.png").write_text("no image")
        for more, said in (
            (("--line", str(tmp_path / "nowhere.png")), "no drawing"),
            (("--line", str(empty)), "the drawing is empty"),
            (("--line", str(tmp_path / "text.png")), "no readable image"),
            (("--line", str(drawing), "--line-scale", "11"), "line scale must lie in"),
            (("--line-scale", "1"), "needs --line or --like"),
            (("--line", str(drawing), "--like", str(drawing)), "leave --line out"),
            (("--white.erode", "1"), "need --whiten"),
            (("--whiten", "--white.method", "poolnet"), "needs a file of weights"),
        ):
            assert said in refused(capsys, made, tmp_path / "bad", *more), more
        assert "--lines" in refused(capsys, made, tmp_path / "bad", "--line", str(drawing), run_dir="plain")
