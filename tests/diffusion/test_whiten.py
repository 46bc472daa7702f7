"""python -m diffusion.whiten: out directories, folders and single files; what is the user's stays."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from common.outputs.label import (
    LabelOptions,
    labelled,
    open_labelled,
    pixels_code,
    read_labels,
    read_manifest,
)
from diffusion.whiten import main


def product(index: int = 0) -> Image.Image:
    image = Image.new("RGB", (48, 48), (205, 206, 208))
    ImageDraw.Draw(image).ellipse((10 + index, 12, 34 + index, 36), fill=(180, 30, 40))
    return image


@pytest.fixture
def out(tmp_path) -> Path:
    """An out directory of two images, the second without a product."""
    folder = tmp_path / "out"
    folder.mkdir()
    product().save(folder / "0000.png")
    Image.new("RGB", (48, 48), (90, 90, 90)).save(folder / "0001.png")
    product(4).save(folder / "grid.png")  # not listed
    rows = [{"file": f"000{i}.png", "text": "盒子", "index": i} for i in range(2)]
    (folder / "images.jsonl").write_text(
        "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), "utf-8"
    )
    return folder


def test_an_out_directory(out, tmp_path, capsys):
    target = main([str(out), str(tmp_path / "white")])
    pixels = np.asarray(Image.open(target / "0000.png"))
    assert (pixels[:8] == 255).all() and tuple(pixels[24, 22]) == (180, 30, 40)
    assert (np.asarray(Image.open(target / "0001.png")) == 90).all()
    rows = [json.loads(line) for line in (target / "images.jsonl").read_text("utf-8").splitlines()]
    assert [row["text"] for row in rows] == ["盒子", "盒子"]
    assert rows[0]["whiten"]["note"] == "" and "no product" in rows[1]["whiten"]["note"]
    assert (target / "grid.png").is_file() and "1 of them left as they were" in capsys.readouterr().out
    again = main([str(out), str(tmp_path / "white"), "--erode", "1"])
    assert json.loads((again / "images.jsonl").read_text("utf-8").splitlines()[0])["whiten"]["erode"] == 1


def test_a_folder_and_a_damaged_image(tmp_path, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    product().save(folder / "a.jpg", quality=95)
    (folder / "b.png").write_text("no image")
    main([str(folder), str(tmp_path / "white")])
    assert sorted(p.name for p in (tmp_path / "white").glob("*.png")) == ["a.png", "grid.png"]
    said = capsys.readouterr()
    assert "1 unreadable" in said.out and "b.png" in said.out


def test_a_single_file(tmp_path):
    product().save(tmp_path / "a.png")
    found = main([str(tmp_path / "a.png"), str(tmp_path / "white.png"), "--threshold", "0.5"])
    assert (np.asarray(Image.open(found))[:8] == 255).all()


def test_the_users_files_stay(out, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    product().save(tmp_path / "mine/0000.png")
    before = (tmp_path / "mine/0000.png").read_bytes()
    for arguments, said in (
        ([str(out), str(tmp_path / "mine")], "0000.png"),
        ([str(out), str(out)], "another folder"),
        ([str(out / "0000.png"), str(tmp_path / "mine/0000.png")], "exists already"),
        ([str(out / "0000.png"), str(tmp_path / "a.jpg")], "PNG"),
        ([str(tmp_path / "nowhere"), str(tmp_path / "a")], "no image or folder"),
        ([str(out), str(tmp_path / "a"), "--method", "onnx"], "needs a file of weights"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2 and said in capsys.readouterr().err, arguments
    assert (tmp_path / "mine/0000.png").read_bytes() == before
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit):
        main([str(tmp_path / "empty"), str(tmp_path / "a")])
    assert "holds no images" in capsys.readouterr().err


def test_labels_and_visible_marks_are_kept(tmp_path):
    photo = product().resize((128, 128))
    for name, mode in (("a.png", "implicit"), ("b.webp", "both")):
        file_format, more = ("PNG", {}) if name == "a.png" else ("WEBP", {"lossless": True})
        image, arguments = labelled(photo, file_format, LabelOptions(mode, "shop"), {"seed": 1})
        (tmp_path / "in").mkdir(exist_ok=True)
        image.save(tmp_path / "in" / name, **more, **arguments)
    target = main([str(tmp_path / "in"), str(tmp_path / "white")])
    for name in ("a.png", "b.png", "grid.png"):
        with open_labelled(target / name) as image:
            assert read_labels(image)[0].label.ContentProducer == "shop"
    with open_labelled(target / "a.png") as image:
        assert read_manifest(image)["whiten"]["method"] == "border" and read_manifest(image)["seed"] == 1
        assert read_labels(image)[0].label.ReservedCode1 == pixels_code(image)
    pixels = np.asarray(Image.open(target / "b.png"))
    assert (pixels[-3:, -3:] < 200).all() and (
        pixels[:8] == 255
    ).all()  # the mark's dark box, white elsewhere
