"""Facts of pairs against hand-made ones."""

from array import array
from pathlib import Path

import pytest
from make_sources import encoded
from PIL import Image, ImageDraw

from data_tools.images.decode import ImageLimits
from data_tools.ingest.records import Record
from data_tools.report.pair_facts import NO_DRAWING, NOT_A_DRAWING, drawing_density, missing_ids, number_of
from data_tools.shards.image_shards import ShardWriter
from data_tools.stats import main


def drawing(paper: str, ink: str) -> bytes:
    image = Image.new("L", (20, 20), paper)
    ImageDraw.Draw(image).rectangle((5, 0, 8, 19), fill=ink)  # 4 of 20 columns
    return encoded(image, "png")


def photo() -> bytes:
    image = Image.new("RGB", (20, 20), "white")
    ImageDraw.Draw(image).rectangle((0, 0, 4, 19), fill="red")  # a quarter
    return encoded(image, "png")


@pytest.mark.parametrize(("paper", "ink"), [("white", "black"), ("black", "white")])
def test_density_in_either_polarity(paper, ink):
    record = Record("a", photo(), "png", (), extra={"line.png": drawing(paper, ink)})
    assert drawing_density(record, ImageLimits()) == pytest.approx(0.2)


def test_missing_and_damaged_drawings():
    assert drawing_density(Record("a", b"", "", ()), ImageLimits()) == NO_DRAWING
    for data in (b"no image", drawing("white", "white")):
        record = Record("a", b"", "", (), extra={"drawing.png": data})
        assert drawing_density(record, ImageLimits()) == NOT_A_DRAWING


def test_ids():
    assert number_of(Record("x", b"", "", (), {"id": "Realistic Drawing/20007"})) == 20007
    assert number_of(Record("000012", b"", "", ())) == 12 and number_of(Record("abc", b"", "", ())) == -1
    found = missing_ids(array("q", [20000, 20004, 20001]))
    assert found == {"first": 20000, "last": 20004, "missing": 2, "missing_first": [20002, 20003]}
    assert missing_ids(array("q", [0, 10**9]))["missing"] == 10**9 - 1
    assert missing_ids(array("q", [1, -1])) is None and missing_ids(array("q", [1, 1])) is None
    assert missing_ids(array("q")) is None


def test_the_report(tmp_path: Path):
    with ShardWriter(tmp_path / "in", "train") as writer:
        for number in (20000, 20001, 20003):
            extra = {"line.png": drawing("black", "white")} if number != 20001 else {}
            writer.write(Record(f"{number}", photo(), "png", ("盒子",), {}, "test", extra))
    numbers = main([str(tmp_path / "in"), "--out", str(tmp_path / "s.html"), "--workers", "0"])["splits"][
        "train"
    ]
    assert numbers["drawings"]["count"] == 2 and numbers["drawings"]["unreadable"] == 0
    assert numbers["drawings"]["line_density"]["median"] == pytest.approx(0.2, abs=1e-3)
    assert numbers["white_area"]["median"] == pytest.approx(0.75, abs=1e-3)
    assert numbers["ids"]["missing_first"] == [20002]
    page = (tmp_path / "s.html").read_text("utf-8")
    assert "20000 to 20003, 1 (20002)" in page and "20.0% / 20.0%" in page
