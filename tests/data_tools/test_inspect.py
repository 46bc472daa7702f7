"""The inspection page: complete, safe, and the same findings as the readers'."""

import re
from html.parser import HTMLParser

import pytest
from make_sources import SOURCES, some_image, write_folder, write_t2i

from data_tools.inspect import main


class Page(HTMLParser):
    """Counts tags and fails on tags that are not closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.count, self.text, self.sources = [], {}, [], []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.count[tag] = self.count.get(tag, 0) + 1
        self.sources += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def inspect(path, out, *flags):
    found = main([str(path), "--out", str(out), *flags])
    return found, Page(out.read_text("utf-8"))


@pytest.mark.parametrize("name", SOURCES)
def test_every_format_has_a_page_with_ten_rows(name, tmp_path, capsys):
    source = SOURCES[name](tmp_path / "src", 14)
    (findings,), page = inspect(source, tmp_path / "page.html")
    assert findings.read == findings.kept == 14 and not findings.reasons
    images = {"csv": 0, "line_drawing": 20}.get(name, 10)
    assert page.count.get("img", 0) == images and len(findings.shown) == 10
    assert all(source.startswith("data:image/webp;base64,") for source in page.sources)  # nothing is fetched
    assert "Nothing wrong was found." in page.text and "红色连衣裙" in "".join(page.text)
    assert f": {name}" in capsys.readouterr().err


def test_problems_are_listed_with_hints(tmp_path, capsys):
    source = write_t2i(tmp_path / "src", 4)
    with (source / "T2I_train.img.tsv").open("a") as file:
        file.write("a\t***\nb\t\nb\t\n")
    (findings,), page = inspect(source, tmp_path / "page.html")
    text = " ".join(page.text)
    assert findings.reasons == {"bad_base64": 1, "empty_image": 2} and findings.read == 7
    assert "T2I_train.img.tsv:5" in text and "the image field is empty" in text
    assert "2 x empty_image, first T2I_train.img.tsv:6" in capsys.readouterr().err


def test_undecodable_images_are_found(tmp_path):
    source = write_folder(tmp_path / "src", 3)
    (source / "001.jpg").write_bytes(some_image(1)[:300])
    (findings,), _ = inspect(source, tmp_path / "page.html")
    assert findings.kept == 2 and sum(findings.reasons.values()) == 1


def test_text_of_the_source_cannot_become_markup(tmp_path):
    source = write_folder(tmp_path / "src", 1)
    (source / "more" / "000.txt").write_text('<script>alert(1)</script><img src="http://evil/x">')
    _, page = inspect(source, tmp_path / "page.html")
    assert "script" not in page.count and page.count["img"] == 1 and "http://evil/x" not in page.sources
    assert "<script>alert(1)" in "".join(page.text)


def test_limit_and_rows(tmp_path):
    source = write_folder(tmp_path / "src", 12)
    (findings,), page = inspect(source, tmp_path / "page.html", "--limit", "5", "--rows", "2")
    assert findings.read == 5 and not findings.complete and page.count["img"] == 2
    assert re.search("more rows follow", " ".join(page.text))
    (findings,), _ = inspect(source, tmp_path / "page.html", "--limit", "0")
    assert findings.read == 12 and findings.complete


def test_mistakes_end_in_one_sentence(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for arguments in (
        [str(tmp_path / "nothing")],
        [str(tmp_path / "empty")],
        [str(tmp_path), "--rows", "-1"],
    ):
        with pytest.raises(SystemExit) as error:
            main([*arguments, "--out", str(tmp_path / "page.html")])
        assert error.value.code == 2 and "Traceback" not in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()
