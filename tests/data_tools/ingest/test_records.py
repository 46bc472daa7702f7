"""Keys and problems."""

import ast
from pathlib import Path

import pytest

from data_tools.ingest.records import HINTS, MAX_KEY_BYTES, encode_key, one_line, problem, validate_key


@pytest.mark.parametrize(
    "key", ["000176", "ea10fcc70df78e73c9fbab69aeb8e164", "红色-连衣裙_1", "a b", "100%25"]
)
def test_good_keys_stay(key):
    assert validate_key(key) == key


@pytest.mark.parametrize(
    "key",
    [
        "",
        " ",
        "\u3000",
        "a.b",
        "../x",
        "a/b",
        "a\\b",
        "a\nb",
        "a\0b",
        "\x85",
        "\ud800",
        "x" * (MAX_KEY_BYTES + 1),
    ],
)
def test_bad_keys_are_refused(key):
    with pytest.raises(ValueError, match="key"):
        validate_key(key)


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "a.b.c", "shoes/red.1", "%2E", "a\tb", "裙" * 200, "\ud800x"]
)
def test_any_visible_identifier_has_a_key(name):
    key = encode_key(name)
    assert encode_key(key) == key
    assert validate_key(key) == key and len(key.encode()) <= MAX_KEY_BYTES


def test_encoding_keeps_different_ids_apart():
    names = ["a/b", "a.b", "a\\b", "a%b", "a_b", "裙" * 100, "裙" * 101, "x" * 300, "x" * 301]
    assert len({encode_key(name) for name in names}) == len(names)


def test_an_invisible_identifier_is_refused():
    with pytest.raises(ValueError, match="empty key"):
        encode_key(" \u3000 ")


def test_caption_on_one_line():
    assert one_line(" 红色\r\n连衣裙 \u2028\x85裙\n") == "红色 连衣裙 \u2028\x85裙"
    assert one_line("两个  空格") == "两个  空格"


def test_problem_has_hint_and_can_be_written():
    item = problem("a.tsv:3", "k\ud800", "bad_base64", "odd \udc80")
    assert HINTS["bad_base64"] in item.detail
    assert item.to_json() == {"where": "a.tsv:3", "key": "k?", "reason": "bad_base64", "detail": item.detail}
    str(item.to_json()).encode()


def test_every_reason_in_the_code_has_a_hint():
    used = set()
    for path in (Path(__file__).parents[3] / "data_tools").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                place = {"problem": 2, "BadImage": 0}.get(node.func.id)
                constants = ast.walk(node.args[place]) if place is not None else ()
                used |= {c.value for c in constants if isinstance(c, ast.Constant) and "_" in str(c.value)}
    assert {"bad_base64", "missing_id", "unsafe_name", "aspect_ratio"} <= used
    assert used <= set(HINTS)
