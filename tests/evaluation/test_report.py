import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
from drawn_images import write_out_dir
from PIL import Image

from data_tools.report import svg
from evaluation import report
from evaluation.metrics.statistics import Interval
from evaluation.sets import SampleSet

EVIL = '<script>alert("x")</script> & 红'


class Reader(HTMLParser):
    """Tags that a page holds, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def test_a_page_is_one_file_and_escapes_what_it_is_given(tmp_path):
    path = write_out_dir(tmp_path / "out", [EVIL, "b" * 500], 2)
    found = SampleSet.from_out_dir(path, EVIL)
    sections = [
        report.section(EVIL, report.facts({EVIL: EVIL}), report.note(EVIL)),
        report.prompt_grids([found], found.texts, 2, {found.samples[0].path: EVIL}),
        report.captioned(Image.new("L", (300, 90)), EVIL) + report.captioned(Image.new("RGB", (8, 8)), EVIL),
        report.section("nothing", "", ""),
    ]
    text = report.write_page(tmp_path / "page.html", EVIL, sections, report.ENGLISH).read_text("utf-8")
    seen = Reader(text)
    names = [tag for tag, _ in seen.tags]
    assert "script" not in names and "nothing" not in seen.text
    assert seen.text.count("alert") == 12 and "红" in seen.text and "(500 characters)" in seen.text
    sources = [attrs["src"] for tag, attrs in seen.tags if tag == "img"]
    assert len(sources) == 6 and all(s.startswith("data:image/webp;base64,") for s in sources)
    assert not re.findall(r'(?:href|src)="(?!data:)', text)
    widths = [(attrs["width"], attrs["height"]) for tag, attrs in seen.tags if tag == "img"]
    assert ("128", "38") in widths, "a long image keeps its shape"


def test_numbers_as_people_write_them():
    assert [report.number(v) for v in (0, 12, 0.81234, 12.3456, 1234.5, 123456.7, float("nan"))] == [
        "0",
        "12",
        "0.8123",
        "12.35",
        "1234",
        "123457",
        "-",
    ]


def test_a_difference_is_sure_only_where_its_interval_leaves_out_zero():
    def kind(low, high, higher):
        return re.search('class="(.*?)"', report.difference(Interval((low + high) / 2, low, high), higher))[1]

    assert kind(0.1, 0.3, True) == "sure" and kind(-0.3, -0.1, False) == "sure"
    assert kind(-0.1, 0.3, True) == kind(-0.1, 0.3, False) == "unsure"
    assert kind(0.1, 0.3, False) == kind(-0.3, -0.1, True) == "worse"
    assert kind(0.1, 0.3, None) == "unsure", "no direction, no merit"


CURVES = [
    ("红 <a>", [(1, 0.5, 0.4, 0.6), (4, 0.6, 0.5, 0.7), (16, 0.8, 0.7, 0.9)]),
    ("b", [(4, 0.4, 0.4, 0.4)]),
]


class TestCurves:
    def parts(self, **options):
        chart = ElementTree.fromstring(svg.curves(CURVES, "n", "share", **options))
        circles = [(float(c.get("cx")), float(c.get("cy")), c[0].text) for c in chart.iter("circle")]
        return chart, circles

    def test_points_stand_where_their_numbers_say(self):
        chart, circles = self.parts(log_x=True)
        (x1, y1, tip), (x4, y4, _), (x16, y16, _), (xb, yb, _) = circles
        assert abs((x4 - x1) - (x16 - x4)) < 0.2, "equal ratios, equal steps"
        assert abs((y1 - y4) * 2 - (y4 - y16)) < 0.3, "0.1 and 0.2 higher"
        assert xb == x4 and yb > y1 and tip == "红 <a>, 1: 0.5 [0.4, 0.6]"
        assert {"n", "share", "红 <a>", "b", "1", "4", "16"} <= {t.text for t in chart.iter("text")}
        linear = self.parts()[1]
        assert abs((linear[2][0] - linear[1][0]) - 4 * (linear[1][0] - linear[0][0])) < 0.3

    def test_few_and_flat_points_are_drawn_too(self):
        assert svg.curves([], "x", "y") == svg.curves([("a", [])], "x", "y") == ""
        one = ElementTree.fromstring(svg.curves([("a", [(3, 0.0, 0.0, 0.0)])], "x", "y", log_x=True))
        numbers = [c.get("cx") for c in one.iter("circle")] + [c.get("cy") for c in one.iter("circle")]
        assert np.isfinite([float(n) for n in numbers]).all()
