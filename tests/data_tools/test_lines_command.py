"""Line drawings: methods against their definitions, drawings of every origin, pairs from every layout, resume."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from make_sources import encoded
from PIL import Image, ImageDraw

from data_tools.images.line_drawings import (
    canny,
    contour,
    decode_lines,
    encode_lines,
    extract,
    fit_lines,
    normalise,
    open_drawing,
    read_drawing,
    resize_lines,
    stroke_width,
    xdog,
)
from data_tools.ingest.records import Record
from data_tools.lines import LinesConfig, lines
from data_tools.lines import main as lines_main
from data_tools.readers.detect import open_source


def product(size: int = 96, colour=(200, 40, 40), background=(255, 255, 255)) -> Image.Image:
    image = Image.new("RGB", (size, size), background)
    ImageDraw.Draw(image).rectangle((size // 4, size // 4, 3 * size // 4, 3 * size // 4), fill=colour)
    return image


def drawing(size=(96, 96), paper="white", ink="black", mode="RGB", width=2) -> Image.Image:
    image = Image.new(mode, size, paper)
    corner = (size[0] // 4, size[1] // 4, 3 * size[0] // 4, 3 * size[1] // 4)
    ImageDraw.Draw(image).rectangle(corner, outline=ink, width=width)
    return image


def write_pairs(folder: Path, rows: list[tuple[str, Image.Image | None, Image.Image | None, str]]) -> Path:
    """JSONL in the published layout; None: the file is not there."""
    lists = []
    for key, line, photo, title in rows:
        for name, image in (("line", line), ("color", photo)):
            (folder / name).mkdir(parents=True, exist_ok=True)
            if image is not None:
                image.save(folder / name / f"{key}.png")
        lists.append(
            {
                "pd_line_drawing": f"line/{key}.png",
                "pd_realistic_drawing": f"color/{key}.png",
                "pd_title": title,
            }
        )
    (folder / "train_data.jsonl").write_text(
        "\n".join(json.dumps(r, ensure_ascii=False) for r in lists), "utf-8"
    )
    return folder


def records(folder: Path) -> dict[str, Record]:
    found = [item for item in open_source(folder) if isinstance(item, Record)]
    return {record.key: record for record in found}


def reasons(folder: Path) -> dict[str, int]:
    return json.loads((folder / "report.json").read_text("utf-8"))["reasons"]


class TestMethods:
    def test_canny_is_the_published_call(self):
        import cv2

        pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        assert np.array_equal(canny(pixels), cv2.Canny(pixels, 100, 200))

    def test_xdog_is_black_on_flat_regions_and_inks_the_dark_side_of_an_edge(self):
        grey = np.full((32, 32), 255, np.uint8)
        grey[:, 16:] = 60
        ink = xdog(grey)
        assert ink[:, :12].max() == 0 and ink[:, 20:].max() == 0
        assert ink[16, 16] > 200 and ink[16, 15] == 0

    def test_a_contour_is_the_outline_of_the_product(self):
        found = contour(product())
        assert found[24, 24:73].min() == 255 and found[24:73, 72].min() == 255  # its upper and right sides
        assert (found > 0).sum() == 4 * 48  # one pixel wide, and nothing else

    def test_a_contour_of_a_full_image_has_no_frame(self):
        noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
        assert contour(noise)[0].mean() < 255

    def test_an_unknown_method_is_named(self):
        with pytest.raises(ValueError, match="unknown method 'pencil'"):
            extract(product(), "pencil")


class TestGivenDrawings:
    @pytest.mark.parametrize(
        ("paper", "ink", "polarity"),
        [("white", "black", "dark_on_light"), ("black", "white", "light_on_dark")],
    )
    def test_both_polarities_give_the_same_lines(self, paper, ink, polarity):
        found = normalise(drawing(paper=paper, ink=ink))
        assert found.polarity == polarity and not found.is_coloured
        assert found.lines[24, 24] == 255 and found.lines[0, 0] == 0 and found.lines[48, 48] == 0

    @pytest.mark.parametrize(
        ("paper", "ink", "level"),
        [
            ("#ffeecc", "black", 255),  # cream
            ("#b4b4b4", "#000000", 255),  # a photograph of paper in the shade
            ("#fafafa", "#c8c8c8", 51),  # a pencil: 50 of 250 levels
            ("#1e3c96", "white", 255),  # blueprint
            ("#b4b4b4", "white", 255),  # chalk
            ("#ffeecc", "#cc2200", 204),  # red on cream: 204 of 255 levels of green
        ],
    )
    def test_paper_of_another_colour(self, paper, ink, level):
        plain, found = normalise(drawing()).lines, normalise(drawing(paper=paper, ink=ink)).lines
        assert np.array_equal(found, np.where(plain == 255, level, 0))

    def test_uneven_paper_keeps_its_strokes(self):
        shade = np.linspace(150, 190, 96)[None, :, None].repeat(96, 0).repeat(3, 2).astype(np.uint8)
        strokes = np.asarray(drawing().convert("L"))[..., None] == 0
        found = read_drawing(
            encoded(Image.fromarray(np.where(strokes, 20, shade).astype(np.uint8)), "png")
        ).lines
        assert found[strokes[..., 0]].min() > 200 and found[~strokes[..., 0]].max() < 40

    def test_a_coloured_stroke_is_full_ink(self):
        found = normalise(drawing(ink=(255, 230, 0)))  # yellow: hardly darker than paper
        assert found.is_coloured and found.lines.max() == 255

    @pytest.mark.parametrize("ink", [(0, 0, 0, 255), (255, 255, 255, 255)])
    def test_strokes_on_transparent_paper(self, ink):
        data = encoded(drawing(paper=(0, 0, 0, 0), ink=ink, mode="RGBA"), "png")
        assert (read_drawing(data).lines > 127).sum() == 4 * 2 * 47

    @pytest.mark.parametrize("paper", ["white", "black"])
    def test_an_empty_sheet_is_refused(self, paper):
        with pytest.raises(ValueError, match="empty"):
            read_drawing(encoded(Image.new("RGB", (32, 32), paper), "png"))

    def test_a_photograph_is_no_drawing(self):
        pixels = np.random.default_rng(0).integers(60, 256, (32, 32, 3), dtype=np.uint8)
        with pytest.raises(ValueError, match="no line drawing"):
            read_drawing(encoded(Image.fromarray(pixels), "png"))

    def test_thin_lines_of_a_huge_drawing_stay_visible(self):
        lines, note = open_drawing(encoded(drawing((4000, 4000), width=2), "png"), 128)
        assert lines.shape == (128, 128) and note == ""
        assert lines[32, 32:96].min() > 127 and lines[64, 64] == 0

    def test_another_aspect_gets_bars(self):
        lines, note = open_drawing(encoded(drawing((200, 100)), "png"), 64)
        assert "200 x 100" in note and lines[:16].max() == 0 and lines[48:].max() == 0
        assert lines[16:48].max() > 127

    def test_resizing_to_the_same_size_changes_nothing(self):
        lines = normalise(drawing()).lines
        assert resize_lines(lines, (96, 96)) is lines and np.array_equal(fit_lines(lines, 96), lines)

    def test_the_width_of_strokes(self):
        lines = np.zeros((64, 64), np.uint8)
        lines[20:26] = 255
        assert abs(stroke_width(lines) - 6) < 1.0

    def test_a_png_of_lines_keeps_them_and_is_one_bit_where_it_can_be(self):
        binary = normalise(drawing()).lines
        soft = resize_lines(binary, (50, 50))
        for found in (binary, soft):
            assert np.array_equal(decode_lines(encode_lines(found)), found)
        assert Image.open(io.BytesIO(encode_lines(binary))).mode == "1"

    def test_foreign_bytes_are_named(self):
        for data in (b"", b"\x89PNG\r\n\x1a\nxx", encoded(product(), "png")):
            with pytest.raises(ValueError, match=r"line\.png"):
                decode_lines(data)


class TestCommand:
    def test_pairs_of_the_published_layout(self, tmp_path):
        src = write_pairs(
            tmp_path / "src",
            [
                ("24806", drawing(), product(), "红色盒子"),
                ("24808", drawing(paper="black", ink="white"), product(), "盒子"),
                ("24809", None, product(), "没有线稿"),
                ("24810", drawing(), None, "没有图片"),
                ("24811", drawing(), product(), ""),
                ("24812", drawing((96, 48)), product(), "另一个比例"),
                ("24813", Image.new("RGB", (96, 96), "white"), product(), "空白"),
            ],
        )
        report = lines(LinesConfig(src, str(tmp_path / "out"), workers=0))
        assert report["kept"] == 2 and report["read"] == 7
        found = {r.meta["id"]: r for r in records(tmp_path / "out").values()}
        assert set(found) == {"color/24806", "color/24808"}  # not contiguous, and not renumbered
        assert found["color/24806"].meta["line"]["polarity"] == "dark_on_light"
        assert found["color/24808"].meta["line"]["polarity"] == "light_on_dark"
        first, second = (decode_lines(r.extra["line.png"]) for r in found.values())
        assert np.array_equal(first, second) and first.shape == (96, 96) and first[24, 24] == 255
        expected = {"missing_file": 2, "no_caption": 1, "other_aspect": 1, "not_a_drawing": 1}
        assert reasons(tmp_path / "out") == expected

    def test_a_stretched_and_a_cropped_drawing(self, tmp_path):
        src = write_pairs(tmp_path / "src", [("1", drawing((192, 96)), product(), "盒子")])
        lines(LinesConfig(src, str(tmp_path / "out"), fit="stretch", size=48, workers=0))
        (record,) = records(tmp_path / "out").values()
        found = decode_lines(record.extra["line.png"])
        assert found.shape == (48, 48) and found[12, 24] > 127 and found[24, 24] == 0

    def test_parquet_whose_paths_do_not_exist(self, tmp_path, capsys):
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = {"pd_line_drawing": ["a/1.png"], "pd_realistic_drawing": ["b/1.png"], "pd_title": ["盒子"]}
        pq.write_table(pa.table(table), tmp_path / "train_data.parquet")
        with pytest.raises(SystemExit) as stop:
            lines_main([str(tmp_path / "train_data.parquet"), str(tmp_path / "out"), "--workers", "0"])
        assert stop.value.code == 2
        said = capsys.readouterr().err
        assert "1 x missing_file" in said and "no row" in said

    def test_images_without_drawings(self, tmp_path):
        folder = tmp_path / "src"
        folder.mkdir()
        for name, image in (("a", product()), ("b", Image.new("RGB", (64, 64), "white"))):
            image.save(folder / f"{name}.png")
            (folder / f"{name}.txt").write_text("盒子", "utf-8")
        lines(LinesConfig(folder, str(tmp_path / "out"), method="canny", workers=0))
        (record,) = records(tmp_path / "out").values()
        expected = canny(np.asarray(product()))
        assert np.array_equal(decode_lines(record.extra["line.png"]), expected)
        assert record.image == (folder / "a.png").read_bytes()  # untouched
        assert reasons(tmp_path / "out") == {"no_lines": 1}
        lines(LinesConfig(folder, str(tmp_path / "none"), method="given", workers=0))
        assert reasons(tmp_path / "none") == {"no_drawing": 2}

    def test_the_same_command_again_does_nothing_and_other_options_are_refused(self, tmp_path):
        src = write_pairs(tmp_path / "src", [("1", drawing(), product(), "盒子")])
        config = LinesConfig(src, str(tmp_path / "out"), workers=0)
        first = lines(config)
        before = (tmp_path / "out/train-00000.tar").read_bytes()
        assert lines(config) == first and (tmp_path / "out/train-00000.tar").read_bytes() == before
        with pytest.raises(ValueError, match="other options"):
            lines(LinesConfig(src, str(tmp_path / "out"), method="canny", workers=0))

    def test_folders_by_split(self, tmp_path):
        for split in ("train", "val"):
            write_pairs(tmp_path / "src" / split, [(f"{split}1", drawing(), product(), "盒子")])
        report = lines(LinesConfig(tmp_path / "src", str(tmp_path / "out"), workers=0))
        assert report["splits"] == {"train": 1, "val": 1}
