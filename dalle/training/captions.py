"""What training does to captions: some are hidden, so that the model also learns to generate without text (Ho and
Salimans 2022, classifier-free guidance, algorithm 1), and some get a word that means nothing.

Each choice is a pure function of (seed, step, key), so it does not depend on how many processes share a batch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from data_tools.shards.captions import hides_caption, uniform


def drop_captions(
    text_ids: Tensor, keys: Sequence[str], pad_id: int, share: float, salt: tuple[int, int]
) -> Tensor:
    """Replace about `share` of the rows by null captions: (B, T) long -> (B, T) long.

    salt: (seed, step).
    """
    if share == 0:
        return text_ids
    hidden = torch.tensor([hides_caption(key, share, salt) for key in keys])
    return text_ids.masked_fill(hidden[:, None], pad_id)


def insert_unknown(
    text_ids: Tensor, keys: Sequence[str], pad_id: int, vocab_size: int, share: float, salt: tuple[int, int]
) -> Tensor:
    """Put a random piece between the marks of about `share` of the rows: (B, T) long -> (B, T) long.

    Rows that are full or empty stay as they are. salt: (seed, step).
    """
    if share == 0:
        return text_ids
    text_ids = text_ids.clone()
    for row, key in zip(text_ids, keys, strict=True):
        name = f"{salt[0]}/{salt[1]}/{key}/unknown"
        length = int((row != pad_id).sum())
        if uniform(name) >= share or not 2 <= length < len(row):
            continue
        position = 1 + int(uniform(name + "/place") * (length - 1))
        piece = int(uniform(name + "/piece") * (vocab_size - 1))
        row[position + 1 : length + 1] = row[position:length].clone()
        row[position] = piece + (piece >= pad_id)
    return text_ids


def keep_drawings(keys: Sequence[str], share: float, salt: tuple[int, int]) -> Tensor:
    """(B,) bool, False for about `share` of the drawings, whatever happens to their captions; salt: (seed, step)."""
    return torch.tensor([uniform(f"{salt[0]}/{salt[1]}/{key}/drawing") >= share for key in keys])
