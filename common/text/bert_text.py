"""Captions for a BERT text tower: its vocabulary, pruned to the word pieces that the captions use, and its tokens.

A table of all 21,128 pieces of the Chinese RoBERTa vocabulary would be most of a small model, and rows that no
caption touches never leave their random start. So the vocabulary is pruned to the pieces seen in training, in
their old order; everything else is [UNK], which training inserts at random places, so that the model learns to
read past unknown words. Without a vocabulary file the pieces are the characters of the captions. Rankers and the GAN
read their captions so.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from common.files import read_lines, write_json
from common.text.word_pieces import SPECIAL, TransformersPieces, open_word_pieces

TOKENIZER_CONFIG = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 512}


@dataclass(frozen=True)
class TextTowerConfig:
    """A BERT built from its config, with random weights."""

    width: int = 256
    """Width of the text tower."""
    layers: int = 3
    """Transformer layers."""
    heads: int = 4
    """Attention heads; must divide the width."""
    max_text_len: int = 48
    """Tokens a text, [CLS] and [SEP] included; longer texts are cut and counted."""
    dropout: float = 0.1
    """Dropout at training."""

    def __post_init__(self) -> None:
        if self.heads < 1 or self.width % self.heads:
            raise ValueError(f"text heads {self.heads} must divide the text width {self.width}")
        if not 4 <= self.max_text_len <= 512:
            raise ValueError(f"max_text_len must be 4 to 512, not {self.max_text_len}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"text dropout must lie in [0, 1), not {self.dropout}")


def write_text_tower(
    directory: Path, texts: Iterable[str], config: TextTowerConfig, vocab: Path | None
) -> None:
    """`config.json`, `vocab.txt`, `tokenizer_config.json`: what open_clip and transformers build the tower from.

    `vocab`: a BERT vocab.txt to prune, or the folder that holds it; None takes the characters of `texts`.
    """
    from transformers import BertConfig

    pieces = _characters(texts) if vocab is None else _pieces_seen(texts, _vocab_file(vocab))
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "vocab.txt").write_text("".join(f"{p}\n" for p in pieces), encoding="utf-8")
    write_json(directory / "tokenizer_config.json", TOKENIZER_CONFIG)
    bert = BertConfig(
        vocab_size=len(pieces),
        hidden_size=config.width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        intermediate_size=4 * config.width,
        max_position_embeddings=config.max_text_len,
        hidden_dropout_prob=config.dropout,
        attention_probs_dropout_prob=config.dropout,
        pad_token_id=pieces.index("[PAD]"),
    )
    write_json(directory / "config.json", bert.to_diff_dict())


def _vocab_file(vocab: Path) -> Path:
    file = vocab / "vocab.txt" if vocab.is_dir() else vocab
    if not file.is_file():
        raise FileNotFoundError(
            f"no BERT vocabulary {file}: give a vocab.txt, or none to use single characters"
        )
    return file


def _characters(texts: Iterable[str]) -> list[str]:
    seen = {c for text in texts for c in text.lower() if not c.isspace()}
    seen |= {f"##{c}" for c in seen if c.isascii() and c.isalnum()}  # Latin words are split inside
    return [*SPECIAL, *sorted(seen)]


def _pieces_seen(texts: Iterable[str], file: Path) -> list[str]:
    from transformers import BertTokenizer

    whole = read_lines(file)
    missing = [s for s in SPECIAL if s not in whole]
    if missing:
        raise ValueError(f"{file} is no BERT vocabulary: it lacks {', '.join(missing)}")
    tokenizer = BertTokenizer(vocab=str(file), do_lower_case=True)
    seen = {piece for text in sorted(set(texts)) for piece in tokenizer.tokenize(text)}
    return [*SPECIAL, *(piece for piece in whole if piece in seen and piece not in SPECIAL)]


class CaptionTokenizer:
    """Texts -> padded ids, from a folder with vocab.txt or tokenizer.json."""

    def __init__(self, directory: Path, max_text_len: int) -> None:
        if not any((directory / name).is_file() for name in ("vocab.txt", "tokenizer.json")):
            raise FileNotFoundError(f"{directory} holds no vocab.txt, the text tower's vocabulary")
        self.tokenizer = open_word_pieces(directory) or _by_transformers(directory)
        self.max_text_len = max_text_len
        self.pad_id, self.unk_id = self.tokenizer.pad_id, self.tokenizer.unk_id
        self.num_truncated = 0  # texts cut so far

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    def ids(self, text: str) -> list[int]:
        """[CLS] ... [SEP], cut to `max_text_len`; what was cut is counted in `num_truncated`."""
        pieces, room = self.tokenizer.pieces([text])[0], self.max_text_len - 2
        self.num_truncated += len(pieces) > room
        return [self.tokenizer.begin_id, *pieces[:room], self.tokenizer.end_id]

    def batch(self, texts: Sequence[str]) -> Tensor:
        """(B, T) long, padded to the longest."""
        return pad_rows([self.ids(text) for text in texts], self.pad_id)


def _by_transformers(directory: Path) -> TransformersPieces:
    from transformers import BertTokenizer

    return TransformersPieces(BertTokenizer.from_pretrained(str(directory)), str(directory))


def pad_rows(rows: Sequence[Sequence[int]], pad_id: int, length: int | None = None) -> Tensor:
    """(B, T) long, T the longest row or `length`."""
    length = max(len(row) for row in rows) if length is None else length
    return torch.tensor([[*row, *[pad_id] * (length - len(row))] for row in rows], dtype=torch.long)
