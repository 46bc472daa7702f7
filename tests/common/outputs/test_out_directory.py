"""images.jsonl and its images: the user's stay, also in directories of releases that kept no record."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.config import to_mapping
from common.outputs.earlier_out import earlier_files
from common.outputs.label import LabelOptions, open_labelled, read_labels, read_manifest
from common.outputs.out_directory import OutDirectory, Request
from common.outputs.record import RECORD

ORIGIN = {"checkpoint": "c", "seed": 0, "sampling": {"top_k": 3}}


@dataclass
class Toy:
    image: Image.Image
    text: str
    index: int
    seconds: float = 0.1
    key: str | None = None


def toy(text: str, index: int) -> Toy:
    pixels = np.random.default_rng([index, *text.encode()]).integers(0, 256, (8, 8, 3), np.uint8)
    return Toy(Image.fromarray(pixels), text, index)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def make(path: Path, text: str = "a", count: int = 3) -> Path:
    with OutDirectory(path, ORIGIN) as out:
        out.require_ours(count)
        for i in range(count):
            out.add(toy(text, i))
        out.forget_leftovers()
        out.write_grid()
    return path


def make_earlier(path: Path, ranking: bool = True) -> Path:
    """As releases before the record left it, ranked."""
    make(path)
    (path / RECORD).unlink()
    if ranking:
        shutil.copyfile(path / "0001.png", path / "rank00.png")
        Image.new("RGB", (30, 10)).save(path / "ranked.png")
        row = {"rank": 0, "file": "0001.png", "copy": "rank00.png"}
        texts = [{"text": "a", "pictures": [row, {"rank": 1, "file": "0000.png", "copy": None}]}]
        keys = ("ranker", "encoders", "calibration", "top_k", "min_percentile")
        (path / "ranking.json").write_text(json.dumps(dict.fromkeys(keys, 1) | {"texts": texts}))
    return path


@pytest.mark.parametrize("name", ["0000.png", "0002.png", "grid.png", "images.jsonl", "ranking.json"])
@pytest.mark.parametrize("was_ours", [False, True])
def test_a_file_of_the_users_is_refused_and_stays(tmp_path, name, was_ours):
    out = make(tmp_path / "out") if was_ours else tmp_path / "out"
    out.mkdir(exist_ok=True)
    (out / name).write_bytes(b'{"file": "0000.png", "text": "mine"}\n')
    before = contents(out)
    with pytest.raises(ValueError, match=f"holds {name}, not written here or changed since"):
        make(out, "b")
    assert contents(out) == before


def make_two(folder: Path, mode: str, **origin) -> int:
    """Images of two texts that stood already in a directory that goes on."""
    label = LabelOptions(mode, "shop")
    with OutDirectory(folder, ORIGIN | origin, label) as out:
        left = list(out.continue_from(iter([Request("a", 0), Request("b", 0)])))
        for request in left:
            out.add(toy(request.text, request.index))
        out.write_grid()
    return 2 - len(left)


def test_files_and_grid_carry_the_label_and_how_they_were_made(tmp_path):
    make_two(tmp_path, "implicit", source={"prime": "/home/me/photo.png", "prime_sha256": "d"})
    with open_labelled(tmp_path / "0001.png") as image:
        assert {f.label.ContentProducer for f in read_labels(image)} == {"shop"}
        assert read_manifest(image) == {
            "model": "c",
            "seed": 0,
            "sampling": {"top_k": 3},
            "source": {"prime": "photo.png", "prime_sha256": "d"},
            "text": "b",
            "index": 0,
        }
        assert image.tobytes() == toy("b", 0).image.tobytes()
    with open_labelled(tmp_path / "grid.png") as grid:
        assert len(read_labels(grid)) == 2
    line = json.loads((tmp_path / "images.jsonl").read_text("utf-8").splitlines()[0])
    assert line["label"] == to_mapping(LabelOptions("implicit", "shop"))


def test_another_label_makes_the_images_anew(tmp_path):
    assert make_two(tmp_path, "off") == 0 and make_two(tmp_path, "off") == 2
    assert "label" not in (tmp_path / "images.jsonl").read_text("utf-8")
    assert make_two(tmp_path, "implicit") == 0 and make_two(tmp_path, "implicit") == 2
    assert make_two(tmp_path, "off") == 0
    with open_labelled(tmp_path / "0000.png") as image:
        assert read_labels(image) == []


def test_an_image_too_small_for_the_mark_is_refused_and_nothing_is_lost(tmp_path):
    make_two(tmp_path, "off")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="the visible label needs"):
        make_two(tmp_path, "both")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_what_is_beside_stays(tmp_path):
    out = make(tmp_path / "out")
    names = ("0003.png", "rank1_backup.png", "ranked.png", "rank00.png", "mine.png", ".x.tmp", "grid.png.bak")
    for name in names:
        (out / name).write_bytes(b"mine")
    make(out, "b", 2)
    assert {n: d for n, d in contents(out).items() if n in names} == dict.fromkeys(names, b"mine")
    assert "0002.png" not in contents(out)


def test_an_image_that_was_changed_stays_when_fewer_are_made(tmp_path):
    out = make(tmp_path / "out")
    (out / "0002.png").write_bytes(b"retouched")
    make(out, "b", 2)
    assert (out / "0002.png").read_bytes() == b"retouched"
    assert len((out / "images.jsonl").read_text().splitlines()) == 2


def test_going_on_over_a_changed_image_is_refused(tmp_path):
    out = make(tmp_path / "out")
    (out / "0001.png").write_bytes((out / "0000.png").read_bytes())
    with OutDirectory(out, ORIGIN) as directory, pytest.raises(ValueError, match=r"0001\.png"):
        directory.require_ours(5)


def test_a_hard_link_of_the_list_keeps_its_lines(tmp_path):
    out = make(tmp_path / "out")
    os.link(out / "images.jsonl", tmp_path / "kept.jsonl")
    before = (tmp_path / "kept.jsonl").read_bytes()
    make(out, "b")
    assert (tmp_path / "kept.jsonl").read_bytes() == before


class TestEarlierReleases:
    def test_their_files_are_known_and_replaced(self, tmp_path):
        out = make_earlier(tmp_path / "out")
        images = ["0000.png", "0001.png", "0002.png"]
        copies = ["ranking.json", "ranked.png", "rank00.png"]
        assert earlier_files(out) == ["images.jsonl", *images, "grid.png", *copies]
        make(out, "b", 2)
        assert sorted(contents(out)) == [RECORD, "0000.png", "0001.png", "grid.png", "images.jsonl"]
        new = make(tmp_path / "new", "b", 2)
        assert contents(out) == contents(new)

    def test_they_go_on(self, tmp_path):
        out = make_earlier(tmp_path / "out", ranking=False)
        (out / "grid.png").unlink()
        with (out / "images.jsonl").open("a") as file:
            file.write('{"checkpoint": "c", "fi')  # killed
        shutil.copyfile(out / "0001.png", out / "0003.png")
        with OutDirectory(out, ORIGIN) as directory:
            directory.require_ours(4)
            left = list(directory.continue_from(iter([Request("a", i) for i in range(4)])))
            assert [r.index for r in left] == [3]
            directory.add(toy("a", 3))
        assert contents(out)["images.jsonl"] == contents(make(tmp_path / "whole", count=4))["images.jsonl"]

    @pytest.mark.parametrize(
        ("change", "refused"),
        [
            ("newer image", r"0001\.png"),
            ("other pixels", r"grid\.png"),
            ("text in the image", r"0001\.png"),
            ("other size", r"0001\.png"),
            ("other line", r"images\.jsonl"),
            ("other order", r"images\.jsonl"),
            ("a note", r"images\.jsonl"),
            ("other grid", r"grid\.png"),
            ("image without a line", r"0003\.png"),
            ("link", r"0001\.png"),
            ("other ranking", r"ranking\.json"),
        ],
    )
    def test_what_is_not_surely_theirs_is_the_users(self, tmp_path, change, refused):
        out = make_earlier(tmp_path / "out", ranking=change == "other ranking")
        listed = (out / "images.jsonl").stat()
        lines = (out / "images.jsonl").read_text().splitlines(keepends=True)
        image = Image.new("RGB", (9, 9) if change == "other size" else (8, 8))
        if change == "newer image":
            (out / "grid.png").unlink()
            image.save(out / "0001.png")
            os.utime(out / "0001.png", (listed.st_mtime + 60, listed.st_mtime + 60))
        elif change in ("other pixels", "other size"):
            image.save(out / "0001.png")
            os.utime(out / "0001.png", (listed.st_mtime, listed.st_mtime))
        elif change == "text in the image":
            image.info["dpi"] = (72, 72)
            image.save(out / "0001.png", dpi=(72, 72))
        elif change == "other line":
            (out / "images.jsonl").write_text('{"file": "0000.png", "text": "mine"}\n')
        elif change == "other order":
            (out / "images.jsonl").write_text("".join(reversed(lines)))
        elif change == "a note":
            (out / "images.jsonl").write_text("".join(lines) + "nice!")
        elif change == "other grid":
            image.save(out / "grid.png")
        elif change == "image without a line":
            shutil.copyfile(out / "0001.png", out / "0003.png")
        elif change == "link":
            (out / "grid.png").unlink()
            shutil.move(out / "0001.png", out / "x.png")
            (out / "0001.png").symlink_to("x.png")
        else:
            (out / "ranking.json").write_text('{"ranker": "mine"}')
        before = contents(out)
        with pytest.raises(ValueError, match=refused):
            make(out, "b", 4)
        assert contents(out) == before
