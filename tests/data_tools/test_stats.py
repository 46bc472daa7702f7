"""The report: numbers against hand-made sources, one page that loads nothing, Chinese as text."""

import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from make_sources import encoded
from PIL import Image, ImageDraw
from test_dedup import photo, write_shards

from data_tools.images.decode import ImageLimits
from data_tools.ingest.records import Record
from data_tools.report import svg
from data_tools.report.facts import Facts, MeasureImage, ring_pixels, words_of
from data_tools.rules.lexicon import load_lexicon
from data_tools.shards.image_shards import ShardWriter
from data_tools.stats import main


def charts(page: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(text) for text in re.findall(r"<svg .*?</svg>", page, re.DOTALL)]


def product(colour: str, background: str = "white", size: tuple[int, int] = (200, 160)) -> bytes:
    image = Image.new("RGB", size, background)
    ImageDraw.Draw(image).ellipse((50, 40, size[0] - 50, size[1] - 40), colour)
    return encoded(image, "png")


@pytest.fixture
def report(tmp_path):
    """Two splits; a caption with markup, a repeated image across splits, a broken image, a blank one."""
    records = {
        "train": [
            ("a", product("red"), "一件红色连衣裙", {"label": "裙"}),
            ("b", product("blue", "black"), "蓝色T恤 <script>alert(1)</script>", {"label": "T恤"}),
            ("c", encoded(photo(1), "jpg", quality=95), "一件红色连衣裙", {"label": "T恤"}),
            ("d", product("red")[:90], "坏图片", {}),
            ("e", encoded(Image.new("RGB", (64, 64), "white"), "png"), "空白", {}),
        ],
        "val": [("v", encoded(photo(1), "webp", quality=95), "黑色皮鞋 牛皮", {"label": "鞋"})],
    }
    for split, rows in records.items():
        with ShardWriter(tmp_path / "in", split) as writer:
            for key, image, caption, meta in rows:
                suffix = {b"\x89P": "png", b"\xff\xd8": "jpg", b"RI": "webp"}[image[:2]]
                writer.write(Record(key, image, suffix, (caption,), meta))
    numbers = main([str(tmp_path / "in"), "--out", str(tmp_path / "stats.html"), "--workers", "0"])
    return numbers, (tmp_path / "stats.html").read_text("utf-8"), tmp_path


class TestReport:
    def test_numbers(self, report):
        numbers, _, folder = report
        train, val = numbers["splits"]["train"], numbers["splits"]["val"]
        assert (train["kept"], val["kept"]) == (4, 1)
        assert sum(train["dropped"].values()) == 1
        assert train["repeated_captions"] == 2
        assert train["white_grounds"] == 2 and train["pictures"] == 4
        assert train["attribute_unnamed_share"]["colour"] == pytest.approx(1 / 4)
        assert val["attribute_unnamed_share"]["material"] == 0
        assert train["caption_chars"]["min"] == 2 and val["caption_chars"]["max"] == 7
        assert numbers["near_pairs"] == numbers["pairs_across_splits"] == 1
        assert numbers["flags"]["near_constant"] == 1
        assert json.loads((folder / "stats.json").read_text("utf-8")) == numbers

    def test_one_page_that_loads_nothing(self, report):
        _, page, _ = report
        assert re.findall(r'(?:src|href)="(?!data:image/webp;base64,)', page) == []
        assert "http://" not in page and "https://" not in page and "@import" not in page
        assert "<script" not in page and "&lt;script&gt;" in page

    def test_chinese_is_text_inside_the_plots(self, report):
        _, page, _ = report
        texts = {text.text for chart in charts(page) for text in chart.iter("text")}
        assert {"红色", "连衣裙", "T恤"} <= texts
        assert all(chart.get("aria-label") for chart in charts(page))

    def test_shares_of_images_are_drawn_by_key(self, report):
        _, _, folder = report
        argv = [
            str(folder / "in"),
            "--out",
            str(folder / "part.html"),
            "--workers",
            "0",
            "--image-share",
            "0.5",
        ]
        part = main(argv)
        measured = sum(split["pictures"] for split in part["splits"].values())
        assert 0 < measured < 5
        assert part["splits"]["val"]["kept"] == 1, "captions are measured on all rows"
        assert main(argv) == part


def test_tokens(tmp_path, roberta):
    src = write_shards(
        tmp_path / "in", {"train": {"a": encoded(photo(1), "jpg"), "b": encoded(photo(2), "jpg")}}
    )
    argv = [
        "--tokenizer",
        str(roberta),
        "--max-text-len",
        "4",
        "--workers",
        "0",
        "--out",
        str(tmp_path / "s.html"),
    ]
    numbers = main([str(src), *argv])
    assert numbers["splits"]["train"]["caption_tokens"]["max"] == 3
    assert "2 captions (100.00%) have more than 2 tokens" in (tmp_path / "s.html").read_text("utf-8")


@pytest.mark.parametrize("argv", [["--image-share", "0"], ["--max-text-len", "2"], ["--no-such-flag", "1"]])
def test_bad_options_exit_2(tmp_path, argv):
    with pytest.raises(SystemExit) as exit_:
        main([str(tmp_path), *argv])
    assert exit_.value.code == 2


def test_an_empty_source_is_one_sentence(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    with pytest.raises(SystemExit) as exit_:
        main([str(tmp_path / "in"), "--out", str(tmp_path / "s.html")])
    assert exit_.value.code == 2 and capsys.readouterr().err.startswith("error: ")
    assert not (tmp_path / "s.html").exists()


class TestMeasure:
    def test_background_and_mean(self):
        from data_tools.report.facts import IMAGE

        record = Record("k", product("red", "#f5f5f5"), "png", ("x",), {})
        found = np.frombuffer(MeasureImage(ImageLimits()).one(record), IMAGE)[0]
        assert found["background"].tolist() == [245, 245, 245] and found["white"] == 1
        assert (found["width"], found["height"], found["bytes"]) == (200, 160, len(record.image))
        area = np.pi * 50 * 40 / (200 * 160)
        assert found["mean"][0] == pytest.approx(245 + 10 * area, abs=0.5)
        assert found["mean"][1] == pytest.approx(245 * (1 - area), abs=2)

    def test_ring(self):
        pixels = np.zeros((100, 50, 3), np.uint8)
        pixels[3:-3, 3:-3] = 9
        assert len(ring_pixels(pixels)) == 100 * 50 - 94 * 44 and ring_pixels(pixels).max() == 0

    def test_words(self):
        assert words_of("金锚牌 红色连衣裙，abc!", load_lexicon()) == ["金锚牌", "红色", "连衣裙", "abc"]

    def test_memory_of_rare_words_is_bounded(self, monkeypatch):
        monkeypatch.setattr("data_tools.report.facts.MOST_WORDS", 100)
        facts = Facts("train")
        for i in range(1000):
            facts.add_record(Record(f"{i}", b"", "", (f"裙子 w{i:06d}",), {}), load_lexicon(), None, ())
        assert len(facts.words) <= 101 and facts.words["裙子"] == 1000


class TestSvg:
    def heights(self, chart: str) -> list[float]:
        return [float(rect.get("height")) for rect in ElementTree.fromstring(chart).iter("rect")]

    def test_histogram_of_whole_numbers_has_whole_bins(self):
        values = np.array([3, 3, 3, 5, 6, 6])
        chart = ElementTree.fromstring(svg.histogram(values, "x"))
        assert [title.text for title in chart.iter("title")] == ["3: 3", "4: 0", "5: 1", "6: 2"]
        heights = self.heights(svg.histogram(values, "x"))
        assert heights[0] == pytest.approx(3 * heights[2], abs=0.2) and heights[1] == 0

    def test_histogram_counts_everything_once(self):
        values = np.random.default_rng(0).normal(0, 1, 5000)
        chart = ElementTree.fromstring(svg.histogram(values, "x", limits=(-1, 1), mark=0.5))
        counts = [int(title.text.rpartition(": ")[2]) for title in chart.iter("title")]
        assert sum(counts) == 5000 and counts[0] > 700

    @pytest.mark.parametrize("values", [[5], [0.25], [0.0, 0.0], [7, 7, 7], [-1e-9, 1e9]])
    def test_odd_values(self, values):
        ElementTree.fromstring(svg.histogram(np.array(values), "x"))

    def test_bars_are_proportional_and_escaped(self):
        chart = svg.bars([("<b>红</b>", 10), ("蓝 & 白", 5)], "a & b")
        widths = [float(rect.get("width")) for rect in ElementTree.fromstring(chart).iter("rect")]
        assert widths[0] == pytest.approx(2 * widths[1], abs=0.2)
        assert next(t.text for t in ElementTree.fromstring(chart).iter("text")) == "<b>红</b>"

    def test_nothing_to_draw(self):
        assert svg.bars([], "x") == svg.histogram(np.zeros(0), "x") == svg.strip([], "x") == ""
        assert svg.scatter(np.zeros(0), np.zeros(0), "x", "y") == ""

    def test_numbers(self):
        assert [svg.short(v) for v in (0, 0.25, 950, 12000, 3_400_000)] == ["0", "0.25", "950", "12k", "3.4M"]


@pytest.mark.parametrize("split", ["val", pytest.param("", marks=pytest.mark.slow)])
def test_the_goods(goods, tmp_path, split):
    """The real set has no near images across its splits, as its maker says."""
    argv = [str(goods), "--out", str(tmp_path / "s.html"), "--workers", "0", "--split", split]
    numbers = main([*argv, "--image-share", "0.2" if split else "1", "--watermarks", "False"])
    assert {name: found["kept"] for name, found in numbers["splits"].items()} == (
        {"val": 637} if split else {"train": 8896, "val": 637}
    )
    assert numbers["pairs_across_splits"] == 0
    assert Path(tmp_path / "s.html").stat().st_size < 1 << 20
