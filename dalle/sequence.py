"""Where everything stands in the sequence: the one file that does arithmetic on positions and vocabularies.

    input     text_0 ... text_{T-1}   BOI        image_0 ... image_{N-2}            L = T + N inputs
    predicts  text_1 ... (none)       image_0    image_1 ... image_{N-1}

Text and image have vocabularies, embeddings and heads of their own, so no id is ever shifted. Text is padded on the
right; nothing attends to padding, so a batch may be trimmed to its longest text without changing any result.
A caption of padding alone is the null caption, the unconditional side of classifier-free guidance: its first
position stays visible and carries the padding embedding, which is used nowhere else and so is learned for this.
"""

import torch
from torch import Tensor


def text_mask(text_ids: Tensor, pad_id: int) -> Tensor:
    """Visible text positions: real tokens and the first position. (B, T) long -> (B, T) bool"""
    visible = text_ids != pad_id
    visible[:, 0] = True
    return visible


def null_captions(batch_size: int, text_len: int, pad_id: int, device: torch.device | str = "cpu") -> Tensor:
    """The caption that says nothing: (B, T) long."""
    return torch.full((batch_size, text_len), pad_id, dtype=torch.long, device=device)


def trim(text_ids: Tensor, pad_id: int) -> Tensor:
    """Drop the columns that are padding in every row: (B, T) -> (B, T') with T' at least 1."""
    longest = int((text_ids != pad_id).sum(1).max())  # padding stands on the right
    return text_ids[:, : max(1, longest)]


def text_target_mask(text_ids: Tensor, pad_id: int) -> Tensor:
    """Positions whose next token is text to predict: (B, T) long -> (B, T) bool, the last column False."""
    mask = torch.zeros_like(text_ids, dtype=torch.bool)
    mask[:, :-1] = text_ids[:, 1:] != pad_id
    return mask


def text_targets(text_ids: Tensor, pad_id: int) -> Tensor:
    """The tokens that `text_target_mask` asks for, row by row: (M,) long."""
    following = text_ids[:, 1:]
    return following[following != pad_id]


def attention_bias(visible: Tensor, num_image: int, dtype: torch.dtype) -> Tensor | None:
    """Causal attention without padding, as a bias to add to the scores; None when plain causality says it all.

    visible: (B, T) bool; num_image: inputs after the text, BOI included. -> (B, 1, L, L) with 0 or -inf
    """
    if bool(visible.all()):
        return None
    keys = visible_keys(visible, num_image)  # (B, L)
    causal = torch.ones(keys.shape[1], keys.shape[1], dtype=torch.bool, device=keys.device).tril()
    seen = causal & keys[:, None, :]  # (B, L, L); no row is empty, for the first position is always visible
    return _bias(seen, dtype)[:, None]  # (B, 1, L, L)


def key_bias(visible: Tensor, num_image: int, dtype: torch.dtype) -> Tensor:
    """The same for one query that follows all keys: (B, T) bool -> (B, 1, 1, L)"""
    return _bias(visible_keys(visible, num_image), dtype)[:, None, None]


def visible_keys(visible: Tensor, num_image: int) -> Tensor:
    """(B, T) bool -> (B, L) bool: image inputs are always visible."""
    return torch.nn.functional.pad(visible, (0, num_image), value=True)


def _bias(seen: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))


def positions(max_text_len: int, grid_size: int) -> Tensor:
    """(row, column) of every input, BOI included: (max_text_len + 1 + N, 2) long.

    Text runs along the diagonal (t, t), which makes its rotary position one-dimensional; the image's own origin
    follows it. A trimmed text leaves the image where it is.
    """
    text = torch.arange(max_text_len + 1)  # the text, then BOI
    rows = torch.arange(grid_size).repeat_interleave(grid_size)
    columns = torch.arange(grid_size).repeat(grid_size)
    image = torch.stack([rows, columns], 1) + max_text_len + 1
    return torch.cat([text[:, None].expand(-1, 2), image])


def input_rows(text_len: int, max_text_len: int, num_image: int) -> tuple[slice, slice]:
    """Rows of a `positions` table for `text_len` text inputs and `num_image` inputs from BOI on."""
    return slice(0, text_len), slice(max_text_len, max_text_len + num_image)
