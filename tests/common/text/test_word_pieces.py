"""Word pieces by tokenizers alone, against transformers' BertTokenizer."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import BertTokenizer

from common.text.bert_text import CaptionTokenizer, TextTowerConfig, write_text_tower
from common.text.word_pieces import CONFIG, open_word_pieces
from dalle.text_tokenizer import TextTokenizer

SHIPPED = Path(__file__).parents[3] / "pretrained" / "goods-128"
TEXTS = [
    "一件红色的连衣裙",
    "Nike 运动鞋, size 42.5!  (黑/白)",
    "[SEP] 红色 [MASK]x",
    "café 红\u3000色\tT恤\u200b",
    "ＡＢＣ　全角，标点。",
    "𠮷野家 emoji \U0001f457",
    "x" * 300,
    "",
    "   ",
]


@pytest.mark.parametrize("folder", ["generator", "ranker/towers"])
def test_ids_are_those_of_transformers(folder):
    ours, theirs = open_word_pieces(SHIPPED / folder), BertTokenizer.from_pretrained(str(SHIPPED / folder))
    assert ours is not None and ours.vocab_size == len(theirs)
    assert (ours.begin_id, ours.end_id) == (theirs.cls_token_id, theirs.sep_token_id)
    assert (ours.pad_id, ours.unk_id) == (theirs.pad_token_id, theirs.unk_token_id)
    expected = [theirs(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    assert ours.pieces(TEXTS) == expected
    assert [ours.decode(ids) for ids in expected] == [theirs.decode(ids) for ids in expected]


def test_captions_are_cut_as_transformers_cuts_them(tmp_path):
    write_text_tower(tmp_path, TEXTS, TextTowerConfig(32, 1, 2, 8), None)
    theirs = BertTokenizer.from_pretrained(str(tmp_path))
    ours = CaptionTokenizer(tmp_path, 8)
    for text in TEXTS:
        assert ours.ids(text) == theirs(text, truncation=True, max_length=8)["input_ids"], text


@pytest.mark.parametrize(
    "changed",
    [
        {"do_lower_case": False},
        {"tokenizer_class": "XLMRobertaTokenizer"},
        {"strip_accents": True},
        {"added_tokens_decoder": {}},
        {"unk_token": "<unk>"},
    ],
)
def test_whatever_else_a_folder_says_is_left_to_transformers(tmp_path, changed):
    shutil.copytree(SHIPPED / "ranker/towers", tmp_path / "towers")
    path = tmp_path / "towers" / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changed), encoding="utf-8")
    assert open_word_pieces(tmp_path / "towers") is None


def test_damaged_or_bare_folders_are_left_to_transformers(tmp_path):
    assert open_word_pieces(tmp_path) is None
    shutil.copyfile(SHIPPED / "ranker/towers/vocab.txt", tmp_path / "vocab.txt")
    assert open_word_pieces(tmp_path) is None
    (tmp_path / CONFIG).write_text("{", encoding="utf-8")
    assert open_word_pieces(tmp_path) is None


def test_saved_and_read_again_it_cuts_the_same(tmp_path):
    first = TextTokenizer.from_pretrained(SHIPPED / "generator")
    first.save(tmp_path)
    again = TextTokenizer.from_pretrained(tmp_path)
    assert first.encode(TEXTS, 16).ids.tolist() == again.encode(TEXTS, 16).ids.tolist()
    assert (tmp_path / "tokenizer.json").read_bytes() == (SHIPPED / "generator/tokenizer.json").read_bytes()
