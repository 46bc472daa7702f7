"""Files of prompts: forms, names of texts, and what is said of a bad line."""

import json

import pytest

from data_tools.prompts import Prompt, count_prompts, read_prompts


def test_a_text_a_line(tmp_path):
    path = tmp_path / "p.txt"
    path.write_bytes("\ufeff鞋\r\n\n  红色 的\t鞋 \n   \n杯子".encode())
    assert list(read_prompts(path)) == [Prompt("鞋"), Prompt("红色 的\t鞋"), Prompt("杯子")]
    assert count_prompts(path) == 3


def test_ids_stay_names(tmp_path):
    path = tmp_path / "T2I_test.text.tsv"
    path.write_text("0007\t一双鞋\textra\nab\t \n", "utf-8")
    assert list(read_prompts(path)) == [Prompt("一双鞋", "0007"), Prompt("", "ab")]


def test_jsonl(tmp_path):
    path = tmp_path / "p.jsonl"
    rows = [{"text": "鞋", "key": "a"}, {"caption": "杯", "id": 7, "more": []}, {"text": "裤"}]
    path.write_text("\n".join(json.dumps(row) for row in rows), "utf-8")
    assert list(read_prompts(path)) == [Prompt("鞋", "a"), Prompt("杯", "7"), Prompt("裤")]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.tsv", b"a\tx\nno tab\n", "p.tsv:2 is not id<TAB>text"),
        ("p.tsv", b"\tx\n", "p.tsv:1: the id is empty"),
        ("p.tsv", b"a\tx\na\ty\n", "the id 'a' comes twice"),
        ("p.jsonl", b'{"text": "x"}\n{"text": 3}\n', 'p.jsonl:2 needs "text"'),
        ("p.jsonl", b"[1]\n", 'p.jsonl:1 needs "text"'),
        ("p.jsonl", b"{\n", "p.jsonl:1 is not valid JSON"),
        ("p.txt", b"ok\n\xff\xfe\n", "p.txt:2 is not valid UTF-8"),
        ("p.txt", b"a\0b\n", "p.txt:1 is no text"),
    ],
)
def test_a_bad_line_is_named(name, content, said, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=said.replace("[", r"\[")):
        count_prompts(tmp_path / name)
