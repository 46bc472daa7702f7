"""How many tokens a caption has, and how many of them the tokenizer does not know."""

from collections.abc import Callable
from pathlib import Path

from common.console.terminal import first_line

CountTokens = Callable[[str], tuple[int, int]]
"""Caption -> (tokens, unknown tokens); begin and end marks are not counted."""
_SENTENCEPIECE = ("sentencepiece.model", "spiece.model", "tokenizer.model")


def token_counter(name: str | Path) -> CountTokens:
    """A counter for a SentencePiece model (file, or folder with one), a tokenizer folder of transformers, or a hub id.

    Raises FileNotFoundError if there is none.
    """
    path = Path(name)
    models = [path] if path.is_file() else [path / file for file in _SENTENCEPIECE if (path / file).is_file()]
    if models:
        return _sentencepiece_counter(models[0])
    if path.is_dir() and not any(
        (path / f).is_file() for f in ("vocab.txt", "tokenizer.json", "tokenizer_config.json")
    ):
        raise FileNotFoundError(
            f"{path} holds no text tokenizer: neither vocab.txt nor tokenizer.json nor a .model file"
        )
    return _transformers_counter(str(name))


def _sentencepiece_counter(path: Path) -> CountTokens:
    import sentencepiece

    try:
        processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{path} is no SentencePiece model: {error}") from error
    unknown = processor.unk_id()

    def count(caption: str) -> tuple[int, int]:
        ids = processor.encode(caption)
        return len(ids), ids.count(unknown)

    return count


def _transformers_counter(name: str) -> CountTokens:
    from transformers import AutoTokenizer, BertTokenizer

    path = Path(name)
    try:
        if path.is_dir() and not any(
            (path / f).is_file() for f in ("tokenizer.json", "tokenizer_config.json")
        ):
            tokenizer = BertTokenizer(vocab=str(path / "vocab.txt"), do_lower_case=True)
        else:
            tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{name} is no text tokenizer, neither a folder nor a hub id within reach: {first_line(error)}"
        ) from error
    unknown = tokenizer.unk_token_id

    def count(caption: str) -> tuple[int, int]:
        ids = tokenizer(caption, add_special_tokens=False, verbose=False)["input_ids"]
        return len(ids), ids.count(unknown)

    return count
