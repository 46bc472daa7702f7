"""Files of prompts: forms, names of texts, and what is said of a bad line."""

import json

import pytest
from small_checkpoint import CAPTIONS
from test_generate import lines, pictures, run

from data_tools.prompts import Prompt, count_prompts, read_prompts
from data_tools.submit import main as submit


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


def test_a_bad_line_is_found_before_anything_is_drawn(generator_dir, tmp_path, capsys):
    path = tmp_path / "p.tsv"
    path.write_text(f"a\t{CAPTIONS[0]}\nb {CAPTIONS[1]}\n", "utf-8")
    with pytest.raises(SystemExit) as stopped:
        run(generator_dir, tmp_path / "out", "", "1", "--prompts-file", str(path))
    assert stopped.value.code == 2 and "p.tsv:2 is not id<TAB>text" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_pictures_are_found_again_by_their_ids(generator_dir, tmp_path, capsys):
    """From the file of texts to a submission."""
    path = tmp_path / "T2I_test.text.tsv"
    path.write_text("".join(f"id{i}\t{text}\n" for i, text in enumerate(CAPTIONS)), "utf-8")
    out = run(generator_dir, tmp_path / "out", "", "2", "--prompts-file", str(path))
    assert [(x["key"], x["index"]) for x in lines(out)] == [(f"id{i}", n) for i in range(5) for n in range(2)]
    submit([str(out), str(path), "--to", str(tmp_path / "result.tsv")])
    rows = (tmp_path / "result.tsv").read_text("utf-8").splitlines()
    assert [row.split("\t")[0] for row in rows] == [f"id{i}" for i in range(5)]
    plain = tmp_path / "plain.txt"
    plain.write_text("\n".join(CAPTIONS), "utf-8")
    without = run(generator_dir, tmp_path / "without", "", "2", "--prompts-file", str(plain))
    assert pictures(without) == pictures(out) and "key" not in lines(without)[0]


def test_other_ids_start_anew(generator_dir, tmp_path, capsys):
    for first in ("a", "b"):
        path = tmp_path / f"{first}.tsv"
        path.write_text(f"{first}\t{CAPTIONS[0]}\n", "utf-8")
        out = run(generator_dir, tmp_path / "out", "", "1", "--prompts-file", str(path))
        assert "going on" not in capsys.readouterr().out and [x["key"] for x in lines(out)] == [first]
    run(generator_dir, out, "", "1", "--prompts-file", str(path))
    assert "1 pictures stand" in capsys.readouterr().out


def test_texts_that_were_cut_or_skipped_are_counted(generator_dir, tmp_path, capsys):
    path = tmp_path / "p.txt"
    path.write_text(f"{'红色的鞋' * 2500}\nqwz\n{CAPTIONS[0]}\n", "utf-8")
    run(generator_dir, tmp_path / "out", "", "1", "--prompts-file", str(path))
    said = capsys.readouterr().out
    assert "skipped 1 of the texts" in said and "note: 1 of the texts" in said and "'qwz'" in said
