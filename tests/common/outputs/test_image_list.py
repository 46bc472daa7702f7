"""The readers of images.jsonl and ranking.json."""

import json

import pytest

from common.outputs.image_list import LIST, RANKING, read_list, read_ranking, whole_lines


def test_whole_lines_end_at_a_cut_or_damaged_one(tmp_path):
    lines = [json.dumps({"file": f"{i:04d}.png"}) + "\n" for i in range(3)]
    assert list(whole_lines(tmp_path)) == []
    for rest in (lines[0][:-1], "{damaged\n" + lines[0], "[]\n"):
        (tmp_path / LIST).write_text("".join(lines) + rest)
        found = list(whole_lines(tmp_path))
        assert [line["file"] for line, _ in found] == ["0000.png", "0001.png", "0002.png"]
        assert [end for _, end in found] == [21, 42, 63]
        assert [end for _, end in whole_lines(tmp_path, start=42)] == [63]


def test_the_list_is_read_whole_or_names_its_damage(tmp_path):
    (tmp_path / LIST).write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n{"a": "\xe2\x80\xa8"}')
    assert read_list(tmp_path) == [
        (f"{tmp_path / LIST}:1", {"a": 1}),
        (f"{tmp_path / LIST}:3", {"a": "\u2028"}),
    ]
    for damaged, said in (('{"a": 1}\n{', ":2 is not valid JSON"), ("[]", ":1 is no JSON object")):
        (tmp_path / LIST).write_text(damaged)
        with pytest.raises(ValueError, match=said):
            read_list(tmp_path)


def test_what_is_no_ranking_is_refused(tmp_path):
    assert read_ranking(tmp_path) == {}
    row = {"file": "0000.png", "rank": 0, "score": 1.5}
    ranking = {"ranker": "r", "texts": [{"text": "x", "pictures": [row]}]}
    (tmp_path / RANKING).write_text(json.dumps(ranking))
    assert read_ranking(tmp_path) == ranking
    for wrong in ([], {}, {"texts": []}, {"ranker": "r", "texts": [{"pictures": [{"file": "0000.png"}]}]}):
        (tmp_path / RANKING).write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match="is no ranking"):
            read_ranking(tmp_path)
