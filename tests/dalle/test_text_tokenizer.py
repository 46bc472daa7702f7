"""Both kinds of text tokenizer: marks, padding, cuts, unknown pieces, round trips, clear refusals."""

import pytest
import torch

from dalle.text_tokenizer import TextTokenizer

CAPTIONS = ["一件红色的T恤", "一条蓝色牛仔裤", "一双黑色的鞋", "一件红色的连衣裙"] * 5


@pytest.fixture(scope="module")
def characters() -> TextTokenizer:
    return TextTokenizer.train(CAPTIONS, vocab_size=100, model_type="char", character_coverage=1.0)


@pytest.fixture
def bert(tmp_path) -> TextTokenizer:
    """A folder with a vocab.txt alone, as the hub's older models have."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"一件红色的裙", "t", "恤"]
    (tmp_path / "vocab.txt").write_text("\n".join(pieces), "utf-8")
    return TextTokenizer.from_pretrained(tmp_path)


def test_begin_pieces_end_padding(bert):
    assert bert.encode_batch(["一件T恤", ""], 8).tolist() == [[2, 5, 6, 11, 12, 3, 0, 0], [0] * 8]


def test_a_long_caption_keeps_its_beginning_and_the_end_mark(bert):
    encoded = bert.encode(["一件红色的裙", "一件"], 5)
    assert encoded.ids.tolist() == [[2, 5, 6, 7, 3], [2, 5, 6, 3, 0]]
    assert (encoded.num_truncated, encoded.num_pieces) == (1, 8)


def test_unknown_pieces_are_counted(bert):
    encoded = bert.encode(["一件绿裙"], 8)
    assert encoded.num_unknown == 1 and encoded.unknown_share == 0.25
    assert encoded.ids[0, 3] == bert.unk_id


@pytest.mark.parametrize("text", ["", "   ", "\n\t", "\u3000"])
def test_text_of_spaces_alone_is_the_null_caption(text, bert, characters):
    for tokenizer in (bert, characters):
        assert tokenizer.encode_batch([text], 8).eq(tokenizer.pad_id).all()


def test_a_huge_prompt_is_cut(bert, characters):
    for tokenizer in (bert, characters):
        encoded = tokenizer.encode(["红色" * 500_000], 16)
        assert encoded.num_truncated == 1 and encoded.ids.shape == (1, 16)


def test_characters_are_learned_from_captions(characters):
    encoded = characters.encode(CAPTIONS, 16)
    assert encoded.num_unknown == 0 and encoded.num_truncated == 0
    assert encoded.num_pieces == sum(map(len, CAPTIONS))
    assert characters.decode(encoded.ids[3]) == CAPTIONS[3]
    assert characters.encode(["绿"], 16).num_unknown == 1


def test_training_is_deterministic():
    first, second = (TextTokenizer.train(CAPTIONS, 60, "unigram") for _ in range(2))
    assert first.backend.model == second.backend.model


def test_a_small_vocabulary_knows_only_so_much():
    assert TextTokenizer.train(CAPTIONS, 12, "char", 1.0).encode(CAPTIONS, 16).num_unknown == 35


@pytest.mark.parametrize(
    "vocab_size, coverage, said", [(12, 1.0, "12 pieces"), (4, 1.0, "at least 8"), (12, 0.5, "0.5")]
)
def test_impossible_vocabularies_are_named(vocab_size, coverage, said):
    with pytest.raises(ValueError, match=said):
        TextTokenizer.train(CAPTIONS, vocab_size, "unigram", coverage)


@pytest.mark.parametrize("kind", ["bert", "characters"])
def test_round_trip(kind, tmp_path, request):
    tokenizer = request.getfixturevalue(kind)
    (tmp_path / "saved").mkdir()
    tokenizer.save(tmp_path / "saved")
    again = TextTokenizer.from_pretrained(tmp_path / "saved")
    assert again.vocab_size == tokenizer.vocab_size and again.pad_id == tokenizer.pad_id
    assert torch.equal(again.encode_batch(CAPTIONS, 16), tokenizer.encode_batch(CAPTIONS, 16))


def test_the_real_vocabulary(roberta):
    tokenizer = TextTokenizer.from_pretrained(roberta)
    assert tokenizer.vocab_size == 21128 and tokenizer.pad_id == 0
    encoded = tokenizer.encode(["一件红色的T恤", "金冠苹果"], 16)
    assert encoded.ids[0, :9].tolist() == [101, 671, 816, 5273, 5682, 4638, 162, 2614, 102]
    assert encoded.num_unknown == 0


def test_clear_refusals(tmp_path):
    (tmp_path / "bad.model").write_bytes(b"no model")
    with pytest.raises(ValueError, match="no SentencePiece model"):
        TextTokenizer.from_pretrained(tmp_path / "bad.model")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="neither vocab"):
        TextTokenizer.from_pretrained(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="no text tokenizer folder"):
        TextTokenizer.from_pretrained(tmp_path / "missing")
    with pytest.raises(ValueError, match="all of them are empty"):
        TextTokenizer.train(["", "  "])
    (tmp_path / "empty" / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="damaged"):
        TextTokenizer.from_pretrained(tmp_path / "empty")
