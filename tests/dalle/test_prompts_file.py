"""Files of prompts through generate.py: names of texts, and what is said of a bad line."""

import pytest
from small_checkpoint import CAPTIONS
from test_generate import lines, run, some_images

from data_tools.submit import main as submit


def test_a_bad_line_is_found_before_anything_is_drawn(generator_dir, tmp_path, capsys):
    path = tmp_path / "p.tsv"
    path.write_text(f"a\t{CAPTIONS[0]}\nb {CAPTIONS[1]}\n", "utf-8")
    with pytest.raises(SystemExit) as stopped:
        run(generator_dir, tmp_path / "out", "", "1", "--prompts-file", str(path))
    assert stopped.value.code == 2 and "p.tsv:2 is not id<TAB>text" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_images_are_found_again_by_their_ids(generator_dir, tmp_path, capsys):
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
    assert some_images(without) == some_images(out) and "key" not in lines(without)[0]


def test_other_ids_start_anew(generator_dir, tmp_path, capsys):
    for first in ("a", "b"):
        path = tmp_path / f"{first}.tsv"
        path.write_text(f"{first}\t{CAPTIONS[0]}\n", "utf-8")
        out = run(generator_dir, tmp_path / "out", "", "1", "--prompts-file", str(path))
        assert "going on" not in capsys.readouterr().out and [x["key"] for x in lines(out)] == [first]
    run(generator_dir, out, "", "1", "--prompts-file", str(path))
    assert "1 images stand" in capsys.readouterr().out


def test_texts_that_were_cut_or_skipped_are_counted(generator_dir, tmp_path, capsys):
    path = tmp_path / "p.txt"
    path.write_text(f"{'红色的鞋' * 2500}\nqwz\n{CAPTIONS[0]}\n", "utf-8")
    run(generator_dir, tmp_path / "out", "", "1", "--prompts-file", str(path))
    said = capsys.readouterr().out
    assert "skipped 1 of the texts" in said and "note: 1 of the texts" in said and "'qwz'" in said
