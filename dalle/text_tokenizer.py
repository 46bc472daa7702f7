"""Captions -> text ids: a Hugging Face tokenizer (Chinese RoBERTa) or a SentencePiece model trained on the captions.

Both become [begin] pieces [end] padding. A caption without any piece becomes padding alone, which the generator
takes as the null caption.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from common.console.terminal import first_line
from common.text.word_pieces import TransformersPieces, open_word_pieces

SENTENCEPIECE_FILE = "sentencepiece.model"
SENTENCEPIECE_NAMES = (SENTENCEPIECE_FILE, "spiece.model", "tokenizer.model")


@dataclass(frozen=True)
class EncodedText:
    """Ids of a list of captions, and what did not go smoothly."""

    ids: Tensor  # (B, T) long, padded on the right
    num_pieces: int  # before truncation
    num_unknown: int  # pieces that are not in the vocabulary
    num_truncated: int  # captions that were cut

    @property
    def unknown_share(self) -> float:
        return self.num_unknown / max(1, self.num_pieces)


class _Backend(Protocol):
    vocab_size: int
    pad_id: int
    begin_id: int
    end_id: int
    unk_id: int

    def pieces(self, texts: Sequence[str]) -> list[list[int]]: ...

    def decode(self, ids: list[int]) -> str: ...

    def save(self, directory: Path) -> None: ...


class TextTokenizer:
    """`encode_batch(texts, max_len)` -> long (B, T). Make one with `from_pretrained` or `train`."""

    def __init__(self, backend: _Backend) -> None:
        self.backend = backend
        self.vocab_size = backend.vocab_size
        self.pad_id, self.unk_id = backend.pad_id, backend.unk_id
        self.begin_id, self.end_id = backend.begin_id, backend.end_id

    @classmethod
    def from_pretrained(cls, name: str | Path) -> "TextTokenizer":
        """A SentencePiece model (file, or a folder holding one), a folder of tokenizer files, or a hub id.

        Raises FileNotFoundError when there is no such thing, ValueError when it cannot serve.
        """
        path = Path(name)
        if path.is_file():
            return cls(SentencePieceBackend(path.read_bytes(), str(path)))
        for file in SENTENCEPIECE_NAMES:
            if (path / file).is_file():
                return cls(SentencePieceBackend((path / file).read_bytes(), str(path / file)))
        return cls(_hugging_face(str(name)))

    @classmethod
    def train(
        cls,
        captions: Iterable[str],
        vocab_size: int = 1000,
        model_type: Literal["unigram", "bpe", "char"] = "unigram",
        character_coverage: float = 0.9999,
    ) -> "TextTokenizer":
        """Train SentencePiece on captions (Kudo and Richardson 2018). `vocab_size` is an upper bound.

        Deterministic. Raises ValueError when there is no text to learn from.
        """
        import io

        import sentencepiece

        if vocab_size < 8 or not 0.98 <= character_coverage <= 1:
            raise ValueError(
                f"vocab_size must be at least 8 and character_coverage lie in [0.98, 1], not {vocab_size} and "
                f"{character_coverage}"
            )
        texts = [text for caption in captions if (text := caption.strip())]
        if not texts:
            raise ValueError("no captions to train a text tokenizer on: all of them are empty")
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(texts),
                model_writer=model,
                vocab_size=vocab_size,
                model_type=model_type,
                character_coverage=character_coverage,
                hard_vocab_limit=False,
                pad_id=0,
                unk_id=1,
                bos_id=2,
                eos_id=3,
                num_threads=1,
                add_dummy_prefix=False,
                minloglevel=2,
            )
        except RuntimeError as error:
            raise ValueError(
                f"SentencePiece cannot train {vocab_size} pieces on {len(texts)} captions: "
                + str(error).rpartition("] ")[2]
            ) from error
        return cls(SentencePieceBackend(model.getvalue(), "the trained model"))

    def encode(self, texts: Sequence[str], max_len: int) -> EncodedText:
        """Ids (B, max_len) and counts; a caption that is too long keeps its beginning and the end mark."""
        if max_len < 3:
            raise ValueError(f"max_len must be at least 3 (begin, a piece, end), not {max_len}")
        # no text of max_len pieces needs more characters than this; a prompt of a million costs nothing
        pieces = self.backend.pieces([text[: 64 * max_len] for text in texts])
        ids = torch.full((len(texts), max_len), self.pad_id, dtype=torch.long)
        truncated = 0
        for row, found in zip(ids, pieces, strict=True):
            if found:
                truncated += len(found) > max_len - 2
                whole = [self.begin_id, *found[: max_len - 2], self.end_id]
                row[: len(whole)] = torch.tensor(whole)
        unknown = sum(piece == self.unk_id for found in pieces for piece in found)
        return EncodedText(ids, sum(map(len, pieces)), unknown, truncated)

    def encode_batch(self, texts: Sequence[str], max_len: int) -> Tensor:
        """(B, max_len) long."""
        return self.encode(texts, max_len).ids

    def decode(self, ids: Tensor | Sequence[int]) -> str:
        """Text of one row of ids, without the marks."""
        marks = {self.pad_id, self.begin_id, self.end_id}
        return self.backend.decode([int(i) for i in ids if int(i) not in marks])

    def save(self, directory: Path) -> None:
        """The tokenizer's own files into an existing directory; `from_pretrained(directory)` reads them back."""
        self.backend.save(directory)


def _hugging_face(name: str) -> _Backend:
    """By tokenizers alone where that gives the same, else by transformers; a folder may hold a BERT vocab.txt alone."""
    return open_word_pieces(Path(name)) or TransformersPieces(_load_transformers(name), name)


def _load_transformers(name: str) -> Any:
    from transformers import AutoTokenizer, BertTokenizer

    path = Path(name)
    if path.is_dir():
        has = {f for f in ("tokenizer.json", "tokenizer_config.json", "vocab.txt") if (path / f).is_file()}
        if not has:
            raise FileNotFoundError(
                f"{path} holds no text tokenizer: neither vocab.txt nor tokenizer.json nor a SentencePiece model"
            )
        if has == {"vocab.txt"}:
            return BertTokenizer(vocab=str(path / "vocab.txt"), do_lower_case=True)
    elif name.startswith((".", "/")) or name.count("/") > 1:
        raise FileNotFoundError(f"no text tokenizer folder {name}")
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if path.is_dir():
            raise ValueError(f"{path} holds a damaged text tokenizer: {first_line(error)}") from error
        raise FileNotFoundError(
            f"{name} is neither a folder with a text tokenizer nor a hub repository that can be reached"
        ) from error


class SentencePieceBackend:
    """A SentencePiece model; padding, begin and end must be among its pieces."""

    def __init__(self, model: bytes, where: str) -> None:
        import sentencepiece

        self.model = model
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ValueError(f"{where} is no SentencePiece model") from error
        p = self.processor
        self.vocab_size = p.get_piece_size()
        self.pad_id, self.unk_id, self.begin_id, self.end_id = p.pad_id(), p.unk_id(), p.bos_id(), p.eos_id()
        if min(self.pad_id, self.begin_id, self.end_id) < 0:
            raise ValueError(
                f"{where} lacks pad, bos or eos: train it with `python -m dalle.train_tokenizer`, or with "
                "--pad_id=0 --unk_id=1 --bos_id=2 --eos_id=3"
            )

    def pieces(self, texts: Sequence[str]) -> list[list[int]]:
        return self.processor.encode(list(texts)) if texts else []

    def decode(self, ids: list[int]) -> str:
        return self.processor.decode(ids)

    def save(self, directory: Path) -> None:
        (directory / SENTENCEPIECE_FILE).write_bytes(self.model)
