"""Texts -> padded ids -> hidden states that the UNet's cross-attention reads.

Every text is padded to the base's `text_len`, in training and in inference, and no attention mask reaches the text
encoder: this is how diffusers' pipeline conditions, for CLIP and for Taiyi's BERT, and the UNet learns the hidden
states of padding too. A model that is trained at one length and used at another sees other hidden states.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def encode_texts(tokenizer: Any, texts: Sequence[str], text_len: int) -> Tensor:
    """(B, text_len) long on the CPU: begin mark, pieces, end mark, padding; what is too long is cut.

    "" gives the two marks alone: the null caption of classifier-free guidance.
    """
    encoded = tokenizer(
        list(texts), padding="max_length", max_length=text_len, truncation=True, return_tensors="pt"
    )
    return encoded.input_ids


def count_truncated(tokenizer: Any, texts: Sequence[str], text_len: int) -> int:
    """Texts with more pieces than `text_len` leaves room for."""
    pieces = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    return sum(len(found) > text_len - 2 for found in pieces)


def hidden_states(text_encoder: nn.Module, text_ids: Tensor) -> Tensor:
    """(B, T) long -> (B, T, D): the last hidden state, as StableDiffusionPipeline takes it (no mask, no clip skip)."""
    return text_encoder(text_ids.to(text_encoder.device), attention_mask=None)[0]


@torch.no_grad()
def text_conditions(text_encoder: nn.Module, tokenizer: Any, texts: Sequence[str], text_len: int) -> Tensor:
    """B texts -> (B, T, D) on the encoder's device, without gradients."""
    return hidden_states(text_encoder, encode_texts(tokenizer, texts, text_len))
