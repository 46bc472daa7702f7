"""Text -> word pieces, as BERT's tokenizer cuts them: by the package tokenizers alone where that gives the same ids.

Importing transformers takes longer than generating an image, and its BertTokenizer is a WordPiece model of the package
tokenizers with BERT's normaliser. `open_word_pieces` builds just that from a folder whose files say nothing else;
every other folder is left to transformers.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
CONFIG, WHOLE, VOCAB = "tokenizer_config.json", "tokenizer.json", "vocab.txt"
NORMALIZER = {"clean_text": True, "handle_chinese_chars": True, "strip_accents": None, "lowercase": True}
SETTINGS = {  # of tokenizer_config.json, and the value with which this file cuts as transformers does
    "tokenizer_class": ("BertTokenizer", "BertTokenizerFast"),
    "do_lower_case": (True,),
    "do_basic_tokenize": (True,),
    "tokenize_chinese_chars": (True,),
    "strip_accents": (None,),
    **{f"{name[1:-1].lower()}_token": (name,) for name in SPECIAL},
}
WITHOUT_EFFECT = {"backend", "is_local", "local_files_only", "model_max_length"}


class WordPieces:
    """A WordPiece vocabulary. `files`: what it was read from, so that `save` gives the same folder again."""

    def __init__(self, vocab: dict[str, int], files: dict[str, bytes]) -> None:
        from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
        from tokenizers.models import WordPiece

        self.files = files
        self.tokenizer = Tokenizer(WordPiece(vocab, unk_token="[UNK]"))
        self.tokenizer.normalizer = normalizers.BertNormalizer(**NORMALIZER)
        self.tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        self.tokenizer.decoder = decoders.WordPiece(prefix="##")
        self.tokenizer.add_special_tokens(list(SPECIAL))
        self.vocab_size = self.tokenizer.get_vocab_size()
        self.pad_id, self.unk_id, self.begin_id, self.end_id = (vocab[name] for name in SPECIAL[:4])

    def pieces(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without [CLS] and [SEP]."""
        return [found.ids for found in self.tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def save(self, directory: Path) -> None:
        for name, data in self.files.items():
            (directory / name).write_bytes(data)


class TransformersPieces:
    """Any tokenizer of transformers. Raises ValueError where it cannot pad or end a text."""

    def __init__(self, tokenizer: Any, name: str) -> None:
        self.tokenizer = t = tokenizer
        self.vocab_size = len(t)
        begin = t.cls_token_id if t.cls_token_id is not None else t.bos_token_id
        end = t.sep_token_id if t.sep_token_id is not None else t.eos_token_id
        self.begin_id = end if begin is None else begin
        self.end_id, self.pad_id = end, t.pad_token_id
        self.unk_id = -1 if t.unk_token_id is None else t.unk_token_id
        if None in (self.begin_id, self.end_id, self.pad_id):
            raise ValueError(f"the tokenizer {name} lacks a padding token or an end token: choose another")

    def pieces(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        return self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids)

    def save(self, directory: Path) -> None:
        self.tokenizer.save_pretrained(str(directory))


def open_word_pieces(directory: Path) -> WordPieces | None:
    """Of a folder with tokenizer_config.json beside tokenizer.json or vocab.txt; None where transformers alone can say
    how its texts are cut, and where the files are damaged, which transformers says."""
    files = {name: directory / name for name in (CONFIG, WHOLE, VOCAB)}
    files = {name: path.read_bytes() for name, path in files.items() if path.is_file()}
    others = [n for n in ("special_tokens_map.json", "added_tokens.json") if (directory / n).is_file()]
    try:
        config = json.loads(files[CONFIG])
        vocab = _whole_vocab(json.loads(files[WHOLE])) if WHOLE in files else _listed_vocab(files[VOCAB])
    except (KeyError, TypeError, ValueError):
        return None
    is_plain = not others and all(
        name in WITHOUT_EFFECT or value in SETTINGS.get(name, ()) for name, value in config.items()
    )
    if not is_plain or "tokenizer_class" not in config or any(name not in vocab for name in SPECIAL):
        return None
    return WordPieces(vocab, files)


def _listed_vocab(data: bytes) -> dict[str, int]:
    """A piece a line, LF or CR LF alone ending it."""
    lines = data.decode().replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return {piece: i for i, piece in enumerate(lines[:-1] if lines[-1] == "" else lines)}


def _whole_vocab(values: dict[str, Any]) -> dict[str, int]:
    """Raises ValueError for a tokenizer that is not BERT's as it comes."""
    model, normalizer = values["model"], values["normalizer"]
    as_it_comes = (
        (model["type"], model["unk_token"], model["continuing_subword_prefix"])
        == ("WordPiece", "[UNK]", "##")
        and model["max_input_chars_per_word"] == 100
        and normalizer == {"type": "BertNormalizer", **NORMALIZER}
        and values["pre_tokenizer"] == {"type": "BertPreTokenizer"}
        and {token["content"] for token in values["added_tokens"]} <= set(SPECIAL)
    )
    if not as_it_comes:
        raise ValueError("not BERT's tokenizer as it comes")
    return model["vocab"]
