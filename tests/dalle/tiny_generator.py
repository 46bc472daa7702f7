"""A generator small enough for tests, and texts and images as ids."""

import torch
from torch import Tensor

from dalle.model import Dalle, DalleConfig, ModelOptions

VOCAB, CODES, TEXT_LEN, GRID = 23, 19, 8, 4


def tiny_config(**options) -> DalleConfig:
    base = {"dim": 32, "num_layers": 3, "num_heads": 4, "text_embed_dim": 12}
    return ModelOptions(**(base | options)).config(VOCAB, 0, TEXT_LEN, CODES, GRID)


def tiny_model(seed: int = 0, **options) -> Dalle:
    """Weights large enough that every path moves the logits."""
    torch.manual_seed(seed)
    model = Dalle(tiny_config(**options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(0.3 * noise if parameter.ndim == 2 else 1 + 0.2 * noise)
    return model


def tiny_ids(batch_size: int = 3, seed: int = 1) -> tuple[Tensor, Tensor]:
    """text_ids (B, 8): row 0 full, row 1 padded, row 2 the null caption; image_ids (B, 16)."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(1, VOCAB, (batch_size, TEXT_LEN), generator=generator)
    image = torch.randint(0, CODES, (batch_size, GRID**2), generator=generator)
    if batch_size > 1:
        text[1, 5:] = 0
    if batch_size > 2:
        text[2] = 0
    return text, image
