import json

import pytest
from PIL import Image
from tiny_gan import TEXTS

from common.outputs.label import open_labelled, read_labels, read_manifest
from diffusion.white_background import Whitener, WhitenOptions
from gan.generate import main
from gan.pipeline import TextToGan


def run(run_dir, out, text: str, count: str, *flags: str):
    return main([text, count, str(out), *flags, "--checkpoint", str(run_dir), "--device", "cpu"])


def test_writes_the_out_directory(run_dir, tmp_path):
    out = run(run_dir, tmp_path / "out", TEXTS[0], "3", "--seed", "4", "--psi", "0.8")
    assert sorted(p.name for p in out.glob("[!.]*")) == [
        "0000.png",
        "0001.png",
        "0002.png",
        "grid.png",
        "images.jsonl",
    ]
    lines = [json.loads(line) for line in (out / "images.jsonl").read_text("utf-8").splitlines()]
    assert [line["index"] for line in lines] == [0, 1, 2] and lines[0]["text"] == TEXTS[0]
    assert lines[0]["sampling"] == {"psi": 0.8, "category": ""} and lines[0]["seed"] == 4
    expected = TextToGan.from_pretrained(run_dir, "cpu")(TEXTS[0], 3, seed=4, psi=0.8)
    with Image.open(out / "0002.png") as image:
        assert image.size == (32, 32) and image.tobytes() == expected[2].tobytes()


def test_an_interpolation_is_a_strip(run_dir, tmp_path):
    out = run(run_dir, tmp_path / "out", TEXTS[0], "4", "--interpolate", TEXTS[4])
    with Image.open(out / "grid.png") as grid:
        assert grid.size == (4 * 34 - 2, 32)
    line = json.loads((out / "images.jsonl").read_text("utf-8").splitlines()[-1])
    assert line["interpolate"] == TEXTS[4] and line["index"] == 3


def test_whitened_images_are_the_plain_ones_put_on_white(run_dir, tmp_path):
    plain = run(run_dir, tmp_path / "plain", TEXTS[0], "2")
    white = run(run_dir, tmp_path / "white", TEXTS[0], "2", "--whiten", "--white.erode", "1")
    lines = [json.loads(line) for line in (white / "images.jsonl").read_text("utf-8").splitlines()]
    assert lines[0]["whiten"]["erode"] == 1 and lines[0]["index"] == 0
    whitener = Whitener.open(WhitenOptions(erode=1))
    for name in ("0000.png", "0001.png"):
        with Image.open(plain / name) as before, Image.open(white / name) as after:
            assert after.tobytes() == whitener(before).image.tobytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((TEXTS[0], "0"), "num_images must be at least 1"),
        ((TEXTS[0], "1", "--interpolate", TEXTS[1]), "an interpolation needs at least 2 images"),
        (("qwz", "2"), "holds only characters"),
        ((TEXTS[0], "2", "--psii", "1"), "--psii"),
        ((TEXTS[0], "2", "--white.erode", "1"), "need --whiten"),
        ((TEXTS[0], "2", "--category", "Boat"), "knows no category"),
    ],
)
def test_bad_input_ends_in_one_sentence_and_writes_nothing(run_dir, tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        run(run_dir, tmp_path / "out", *arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and len(error.strip().splitlines()) == 1
    assert not list((tmp_path / "out").glob("*.png"))


def test_labels(run_dir, tmp_path):
    out = run(run_dir, tmp_path / "out", TEXTS[0], "1", "--label", "implicit")
    with open_labelled(out / "0000.png") as image:
        assert read_labels(image) and read_manifest(image)["text"] == TEXTS[0]
