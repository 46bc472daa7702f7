"""Words of pages: every key of chinese.json stands in its page's source, and every finding of the doctor is known."""

import ast
import json
import re
from pathlib import Path

import pytest
from jinja2 import nodes

from common.console.html import environment, render
from common.text.language import CHINESE, Words, is_chinese_locale, words_of
from data_tools.ingest.records import HINTS
from data_tools.rules.lexicon import load_lexicon

ROOT = Path(__file__).parents[3]
SOURCES = {
    "demo": ["evaluation/demo.py"],
    "inspect": ["data_tools/inspect.py", "data_tools/ingest/records.py", "data_tools/templates/inspect.html"],
    "stats": ["data_tools/report/stats_page.py", "data_tools/templates/stats.html"],
    "evaluation": ["evaluation/report.py", "evaluation/metrics/compute.py"],
    "human": ["evaluation/templates/human.html"],
}
HAN = re.compile(r"[\u4e00-\u9fff]")


@pytest.mark.parametrize(
    ("env", "chinese"),
    [({"LANG": "zh_CN.UTF-8"}, True), ({"LANG": "C"}, False), ({"LANG": "C", "LC_ALL": "zh_TW"}, True),
     ({"LANG": "zh_CN.UTF-8", "LC_ALL": "en_US.UTF-8"}, False)],
)  # fmt: skip
def test_auto_follows_the_locale(monkeypatch, env, chinese):
    for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert is_chinese_locale() is chinese
    assert words_of("auto", "inspect")("good") == ("可用" if chinese else "good")
    assert words_of("zh", "inspect").tag == "zh" and words_of("en", "inspect")("good") == "good"


def strings(path: str) -> set[str]:
    """String constants of a file, those inside f-strings included, or of the expressions of a template."""
    text = (ROOT / path).read_text("utf-8")
    if path.endswith(".html"):
        return {node.value for node in environment().parse(text).find_all(nodes.Const)}
    tree = ast.parse(text)
    return {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }


@pytest.mark.parametrize("page", list(SOURCES))
def test_every_key_stands_in_its_page(page):
    table = json.loads(CHINESE.read_text("utf-8"))[page]
    known = set().union(*(strings(path) for path in SOURCES[page]))
    by_sentence = {key for key in table if "{w}" in key or "{s}" in key}  # of size_text
    lexicon = set(load_lexicon().classes)
    assert set(table) - known - by_sentence - lexicon == set()
    for key, chinese in table.items():
        assert set(re.findall(r"{\w+}", key)) == set(re.findall(r"{\w+}", chinese)), key


def rendered(node: ast.AST, names: dict[str, str]) -> str:
    """A string of the source with 7 for what is not known."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(rendered(part, names) for part in node.values)
    if isinstance(node, ast.FormattedValue) and isinstance(node.value, ast.Name):
        return names.get(node.value.id, "7")
    return names.get(node.id, "7") if isinstance(node, ast.Name) else "7"


def doctor_sentences() -> set[str]:
    """Of every Finding in checks.py, with the strings that its function assigned before."""
    found = set()
    for function in ast.walk(ast.parse((ROOT / "data_tools/report/checks.py").read_text("utf-8"))):
        if not isinstance(function, ast.FunctionDef):
            continue
        names: dict[str, str] = {}
        for node in sorted(
            (n for n in ast.walk(function) if hasattr(n, "lineno")), key=lambda n: (n.lineno, -n.col_offset)
        ):
            if isinstance(node, ast.Assign) and isinstance(node.value, (ast.JoinedStr, ast.Constant)):
                names |= {t.id: rendered(node.value, names) for t in node.targets if isinstance(t, ast.Name)}
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Finding":
                found |= {rendered(argument, names) for argument in node.args[1:]}
    return found - {"7"}


def test_every_finding_of_the_doctor_is_known_in_chinese():
    words = words_of("zh", "doctor")
    sentences = {text for text in doctor_sentences() if not text.endswith("images are 7")}
    sentences |= {
        f"7 (7.0%) images are {text}" for text in ("blank", "blurred or enlarged", "patterned all over")
    }
    assert len(sentences) > 40
    bare = re.compile(r"python -m [\w.]+( [A-Z0-9]+| --[\w.-]+ [\w.]+)*")  # a command and nothing else
    commands = {text for text in sentences if bare.fullmatch(text)}
    unknown = {text for text in sentences - commands if not HAN.search(words.sentence(text))}
    assert not unknown, unknown
    assert all(HAN.search(words.sentence(hint)) for hint in HINTS.values())


def test_a_sentence_keeps_its_values_and_an_unknown_one_stays():
    words = words_of("zh", "doctor")
    assert words.sentence("12 (3.4 %) samples have no caption") == "12 (3.4 %) 个样本没有标题"
    assert words.sentence("nobody wrote this") == "nobody wrote this"
    assert Words({}, "en")("{count} samples", count=3) == "3 samples"


def test_the_human_page_is_in_one_language():
    chinese, english = (
        render("evaluation/templates/human.html", words_of(tag, "human")) for tag in ("zh", "en")
    )
    assert '<html lang="zh">' in chinese and "哪一张更好" in chinese and "Start" not in chinese
    assert '<html lang="en">' in english and not HAN.search(english)
