"""dalle-pytorch 1.6.6, the peer of train_speed.py and decode_speed.py, where it can be imported.

It needs old packages, so it gets a folder of its own:
    pip install --no-deps --target peers dalle-pytorch==1.6.6 axial_positional_embedding==0.3.12 \
        rotary-embedding-torch==0.9.1 g-mlp-pytorch==0.1.5 omegaconf antlr4-python3-runtime "setuptools<81"
    PYTHONPATH=peers python -m benchmarks.train_speed
"""

import importlib
import importlib.util
import sys
import types
from typing import Any

from torch import nn

from dalle.model import DalleConfig

STUB = ("taming", "taming.models", "taming.models.vqgan")


def is_installed() -> bool:
    return importlib.util.find_spec("dalle_pytorch") is not None


def _package() -> Any:
    """Its VQGAN alone needs taming, and no VQGAN takes part here: an empty module of that name will do."""
    if STUB[0] not in sys.modules and importlib.util.find_spec(STUB[0]) is None:
        sys.modules |= {name: types.ModuleType(name) for name in STUB}
        sys.modules[STUB[-1]].VQModel = sys.modules[STUB[-1]].GumbelVQ = nn.Module
    return importlib.import_module("dalle_pytorch")


def make_dalle(config: DalleConfig) -> nn.Module:
    """Its DALLE with our widths, depth and vocabularies, over an untrained image tokenizer of the same grid.

    Its cache is repaired: as published it drops the cache at a guidance scale of 1 and decodes 15 times slower.
    """
    package = _package()

    class Repaired(package.DALLE):
        def forward_with_cond_scale(self, *args, cond_scale=1, cache=None, **kwargs):
            if cond_scale == 1:
                return self(*args, cache=cache, **kwargs)
            return super().forward_with_cond_scale(*args, cond_scale=cond_scale, cache=cache, **kwargs)

    levels = 3
    vae = package.DiscreteVAE(
        image_size=config.grid_size * 2**levels,
        num_layers=levels,
        num_tokens=config.codebook_size,
        codebook_dim=8,
        hidden_dim=4,
    )
    return Repaired(
        dim=config.dim,
        vae=vae,
        num_text_tokens=config.text_vocab_size,
        text_seq_len=config.max_text_len,
        depth=config.num_layers,
        heads=config.num_heads,
        dim_head=config.head_dim,
    )
