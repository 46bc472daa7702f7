"""Templates: escaped, strict, found from anywhere, and each of them rendered by somebody."""

import subprocess
from pathlib import Path

import pytest
from jinja2 import UndefinedError

from common.console.html import ROOT, environment, macros, render
from common.text.language import Words

ENGLISH = Words({}, "en")


def test_what_a_template_is_filled_with_is_escaped(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # templates are found from any working directory
    values = {"about": ["<b>"], "headings": ["<b>"], "rows": [("missed", ["<b>"] * 5)]}
    page = render("benchmarks/templates/gpu_report.html", ENGLISH, **values)
    assert page.startswith("<!doctype html>") and '<html lang="en">' in page
    assert page.count("&lt;b&gt;") == 7 and "<b>" not in page


def test_what_a_macro_returns_is_markup_and_a_string_is_not():
    parts = macros("evaluation/templates/parts.html")
    assert parts.note(parts.note("<b>")) == '<p class="note"><p class="note">&lt;b&gt;</p>\n</p>\n'
    assert parts.note("<i>" + "<b>").count("&lt;") == 2


def test_a_missing_value_is_an_error():
    with pytest.raises(UndefinedError, match="title"):
        render("vq/templates/evaluate.html", ENGLISH, metrics=[], rows=[], url=None)


def test_every_template_compiles_and_is_used():
    listed = subprocess.run(["git", "ls-files", "*/templates/*"], cwd=ROOT, capture_output=True, text=True)
    names = listed.stdout.split()
    assert len(names) >= 7
    sources = [p.read_text("utf-8") for name in ("*.py", "*.html") for p in _tracked(name)]
    for name in names:
        environment().get_template(name)
        assert any(f'"{name}"' in source for source in sources), name


def _tracked(pattern: str) -> list[Path]:
    listed = subprocess.run(["git", "ls-files", pattern], cwd=ROOT, capture_output=True, text=True).stdout
    return [ROOT / name for name in listed.split() if not name.startswith("tests/")]
