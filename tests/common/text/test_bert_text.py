from pathlib import Path

import pytest
import torch

from common.text.bert_text import SPECIAL, CaptionTokenizer, TextTowerConfig, write_text_tower

TEXTS = ["一件红色T恤", "可口可乐 Cola 500ml 瓶装", "一件红色T恤"]
VOCAB = Path("../shared/models/chinese-roberta-wwm-ext")


def vocabulary(folder: Path) -> list[str]:
    return (folder / "vocab.txt").read_text("utf-8").splitlines()


def test_characters_are_the_vocabulary_where_there_is_none(tmp_path):
    write_text_tower(tmp_path, TEXTS, TextTowerConfig(32, 1, 2, 24), None)
    pieces = vocabulary(tmp_path)
    assert tuple(pieces[:5]) == SPECIAL and len(pieces) == len(set(pieces))
    assert {"红", "恤", "t", "##l"} <= set(pieces) and "T" not in pieces
    tokenizer = CaptionTokenizer(tmp_path, 24)
    for text in TEXTS:
        assert tokenizer.unk_id not in tokenizer.ids(text)
    assert tokenizer.ids("绿色")[1] == tokenizer.unk_id


@pytest.mark.skipif(not VOCAB.is_dir(), reason="needs ../shared/models")
def test_the_pruned_vocabulary_cuts_seen_texts_as_the_whole_one_does(tmp_path):
    from transformers import BertTokenizer

    write_text_tower(tmp_path, TEXTS, TextTowerConfig(32, 1, 2, 24), VOCAB)
    pieces = vocabulary(tmp_path)
    assert len(pieces) < 40
    whole = BertTokenizer.from_pretrained(str(VOCAB))
    tokenizer = CaptionTokenizer(tmp_path, 24)
    for text in TEXTS:
        assert [pieces[i] for i in tokenizer.ids(text)] == whole.convert_ids_to_tokens(
            whole(text)["input_ids"]
        )


def test_long_texts_are_cut_and_counted(tmp_path):
    write_text_tower(tmp_path, TEXTS, TextTowerConfig(32, 1, 2, 8), None)
    tokenizer = CaptionTokenizer(tmp_path, 8)
    ids = tokenizer.ids("红" * 10_000)
    assert len(ids) == 8 and tokenizer.num_truncated == 1
    assert (ids[0], ids[-1]) == (tokenizer.tokenizer.begin_id, tokenizer.tokenizer.end_id)
    exact = tokenizer.ids("红" * 6)
    assert len(exact) == 8 and tokenizer.num_truncated == 1
    batch = tokenizer.batch(["红色", "红"])
    assert batch.dtype == torch.long and batch.shape == (2, 4) and batch[1, -1] == tokenizer.pad_id


def test_bad_options_and_files(tmp_path):
    with pytest.raises(ValueError, match="must divide"):
        TextTowerConfig(width=30, heads=4)
    with pytest.raises(ValueError, match="max_text_len"):
        TextTowerConfig(max_text_len=2)
    with pytest.raises(FileNotFoundError, match="no BERT vocabulary"):
        write_text_tower(tmp_path, TEXTS, TextTowerConfig(), tmp_path / "none.txt")
    (tmp_path / "words.txt").write_text("a\nb\n")
    with pytest.raises(ValueError, match="lacks"):
        write_text_tower(tmp_path, TEXTS, TextTowerConfig(), tmp_path / "words.txt")
    with pytest.raises(FileNotFoundError, match=r"no vocab\.txt"):
        CaptionTokenizer(tmp_path, 8)
