"""Writes dalle_pytorch_1_6_6.npz: weight listings and logits of the published package, for test_convert.py.

Run where dalle-pytorch 1.6.6 is installed (its VQGAN import is stubbed here, since only the transformer is wanted):
    python tests/dalle/data/make_dalle_pytorch_golden.py
"""

import json
import sys
import types
import zlib
from pathlib import Path

import numpy as np
import torch

BASE = dict(
    num_text_tokens=23,
    text_seq_len=6,
    dim=32,
    depth=3,
    heads=4,
    dim_head=18,
    shift_tokens=False,
    rotary_emb=False,
)
VARIANTS = {
    "plain": {},
    "rotary": dict(rotary_emb=True),
    "shift": dict(shift_tokens=True),
    "rotary_shift": dict(rotary_emb=True, shift_tokens=True),
    "reversible": dict(reversible=True, rotary_emb=True, shift_tokens=True),
    "shared_embeddings": dict(share_input_output_emb=True),
    "stable_sandwich": dict(stable=True, sandwich_norm=True),
    "axial": dict(attn_types=("axial_row", "axial_col", "full"), shift_tokens=True),
    "conv_like": dict(attn_types=("conv_like", "full"), rotary_emb=True),
    "shared_layers": dict(shared_attn_ids=(0, 1, 0), shared_ff_ids=(0, 0, 1)),
}


def values(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The stand-in weight of that name: around one for scales and norms, else around zero."""
    noise = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    is_gain = name.endswith("scale") or (
        ("norm" in name or "to_logits.0" in name) and name.endswith("weight")
    )
    return 1 + 0.2 * noise if is_gain else 0.25 * noise


def inputs() -> tuple[np.ndarray, np.ndarray]:
    """text_ids (2, 6) with pads and image_ids (2, 64)."""
    random = np.random.RandomState(5)
    text = random.randint(1, 23, (2, 6))
    text[0, 4:] = 0
    return text, random.randint(0, 11, (2, 64))


def main() -> None:
    for name in ("taming", "taming.models", "taming.models.vqgan"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["taming.models.vqgan"].VQModel = sys.modules["taming.models.vqgan"].GumbelVQ = None
    from dalle_pytorch import DALLE, DiscreteVAE

    vae_options = dict(
        image_size=32, num_layers=2, num_tokens=11, codebook_dim=8, hidden_dim=8, num_resnet_blocks=1
    )
    arrays, listing = {}, {}
    for variant, changes in VARIANTS.items():
        hparams = {**BASE, **changes}
        model = DALLE(vae=DiscreteVAE(**vae_options), **hparams).eval()
        state = model.state_dict()
        shapes = {n: list(t.shape) for n, t in state.items() if n != "transformer.pos_emb"}
        first: dict[int, str] = {}
        shared = {
            n: first.setdefault(state[n].data_ptr(), n) for n in shapes
        }  # tied tensors by their first name
        model.load_state_dict(
            {n: torch.from_numpy(values(shared[n], s)) for n, s in shapes.items()}, strict=False
        )
        text, image = map(torch.from_numpy, inputs())
        with torch.no_grad():
            logits = model(text.clone(), image)
        listing[variant] = {"hparams": hparams, "vae_params": vae_options, "shapes": shapes}
        listing[variant]["shared"] = {n: to for n, to in shared.items() if n != to}
        if "transformer.pos_emb" in state:
            arrays[f"{variant}.pos_emb"] = state["transformer.pos_emb"].numpy()
        arrays[f"{variant}.logits"] = logits.masked_fill(logits < -1e30, 0)[:1, ::3].numpy()
    path = Path(__file__).with_name("dalle_pytorch_1_6_6.npz")
    np.savez_compressed(path, listing=json.dumps(listing), **arrays)
    print(path, path.stat().st_size)


if __name__ == "__main__":
    main()
