"""Import a generator trained with lucidrains' DALLE-pytorch 1.x (`dalle.pt`).

    python -m dalle.convert dalle.pt runs/imported --text-tokenizer hfl/chinese-roberta-wwm-ext
    python -m dalle.convert dalle.pt runs/imported --text-tokenizer DIR --image-tokenizer runs/vqgan-imported

The file is read with `weights_only=True`. What its options say and what its weights say can differ (defaults changed
between releases): the weights win, and every such override is printed. Leftover weights are an error.
"""

import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dalle.dalle_pytorch import DallePytorch, DallePytorchConfig

BLOCK = re.compile(
    r"transformer\.layers\.(?:layers\.(?P<seq>\d+)\.(?P<part>[01])|blocks\.(?P<rev>\d+)\.(?P<stream>[fg])\.net)\."
    r"(?P<rest>scale|fn\.norm(?:_out)?\.(?:weight|bias)|(?P<depth>(?:fn\.)+)(?:to_qkv\.weight|to_out\.0\.(?:weight|bias)"
    r"|net\.[03]\.(?:weight|bias)))"
)
LEAVES = {"to_qkv": "inner.to_qkv", "to_out.0": "inner.to_out", "net.0": "inner.up", "net.3": "inner.down"}
IGNORED = re.compile(r"logits_mask|.*\.static_mask|text_emb\.linear\..*|image_emb\.linear\..*|vae\..*")


@dataclass(frozen=True)
class Imported:
    """A DALLE-pytorch checkpoint in our terms."""

    config: DallePytorchConfig
    weights: dict[str, Tensor]
    overrides: list[str]
    """What the weights said against the file's options."""
    vae_class: str
    """DiscreteVAE, VQGanVAE or OpenAIDiscreteVAE."""
    vae_options: dict[str, Any] | None
    """Options of a DiscreteVAE."""
    vae_weights: dict[str, Tensor]
    """The image tokenizer's weights as they were, without their prefix."""


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The file's dictionary. Raises FileNotFoundError or ValueError saying what the file is instead."""
    if path.is_dir():
        raise ValueError(
            f"{path} is a directory: give the file dalle.pt (for DeepSpeed runs, consolidate it first)"
        )
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint file {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{path} is not a torch file of plain tensors: {str(error).splitlines()[0]}"
        ) from error
    if not isinstance(content, dict) or "hparams" not in content or "weights" not in content:
        raise ValueError(f"{path} is no DALLE-pytorch checkpoint: it lacks hparams and weights")
    if not isinstance(content["weights"], dict):
        raise ValueError(
            f"{path} belongs to a DeepSpeed folder and holds no weights: run its zero_to_fp32.py first, then put the "
            "result into the file's entry 'weights'"
        )
    if "depth" not in content["hparams"]:
        raise ValueError(
            f"{path} is a DiscreteVAE checkpoint, not a generator: import it with python -m vq.convert"
        )
    return content


def import_checkpoint(path: Path) -> Imported:
    """Read and translate `dalle.pt`. Raises ValueError for anything that would not give the same logits."""
    content = read_checkpoint(path)
    weights: dict[str, Tensor] = content["weights"]
    for name in ("to_logits.1.weight", "to_logits.0.weight"):
        if name not in weights:
            raise ValueError(f"{path} lacks the weight {name}")
    config, overrides = infer_config(content["hparams"], weights)
    translated, leftover = translate(weights, config)
    if leftover:
        raise ValueError(
            f"{path} has weights that DALLE-pytorch 1.x does not: {', '.join(sorted(leftover)[:5])}"
        )
    expected = DallePytorch(config).state_dict()
    missing = sorted(set(expected) - set(translated))
    if missing:
        raise ValueError(f"{path} lacks weights for {', '.join(missing[:5])}")
    wrong = [n for n in expected if expected[n].shape != translated[n].shape]
    if wrong:
        shapes = f"{tuple(translated[wrong[0]].shape)}, not {tuple(expected[wrong[0]].shape)}"
        raise ValueError(f"{path}: the weight for {wrong[0]} has shape {shapes}")
    vae_options = content.get("vae_params")
    guess = "DiscreteVAE" if vae_options else "VQGanVAE"
    vae = {n.removeprefix("vae."): t for n, t in weights.items() if n.startswith("vae.")}
    vae = {n: t for n, t in vae.items() if not n.startswith("model.loss.")}
    return Imported(config, translated, overrides, content.get("vae_class_name") or guess, vae_options, vae)


def infer_config(hparams: dict[str, Any], weights: dict[str, Tensor]) -> tuple[DallePytorchConfig, list[str]]:
    """The config, from the weights wherever they tell, and a line for each option that they contradict."""
    blocks = [m for m in map(BLOCK.fullmatch, weights) if m]
    if not blocks:
        raise ValueError("the checkpoint holds no transformer layers")
    attn_types = tuple(hparams.get("attn_types") or ("full",))
    if "sparse" in attn_types:
        raise ValueError(
            "attn_types 'sparse' needs DeepSpeed's block-sparse kernels, which are not supported"
        )
    vocab, dim = weights["to_logits.1.weight"].shape
    max_text_len = int(hparams.get("text_seq_len", 256))
    num_text_tokens = int(hparams.get("num_text_tokens", 10000))
    num_layers = 1 + max(int(m["seq"] or m["rev"] or 0) for m in blocks)
    inner = next(weights[m.string].shape[0] // 3 for m in blocks if m.string.endswith("to_qkv.weight"))
    num_heads = int(hparams.get("heads", 8))
    if inner % num_heads:
        raise ValueError(f"{num_heads} heads do not divide the attention width {inner}")
    rotary = "transformer.pos_emb" in weights
    ff_depth = next(m["depth"].count("fn.") for m in blocks if m["rest"].endswith(".net.0.weight"))
    found = {
        "dim": dim,
        "depth": num_layers,
        "dim_head": inner // num_heads,
        "rotary_emb": rotary,
        "shift_tokens": ff_depth > 2,
        "reversible": any(m["rev"] for m in blocks),
        "share_input_output_emb": "text_emb.linear.weight" in weights,
    }
    overrides = [
        f"{name}: options say {hparams[name]}, weights say {value}"
        for name, value in found.items()
        if name in hparams and hparams[name] != value
    ]
    config = DallePytorchConfig(
        dim=dim,
        num_layers=num_layers,
        num_heads=num_heads,
        head_dim=inner // num_heads,
        num_text_tokens=num_text_tokens,
        max_text_len=max_text_len,
        codebook_size=vocab - num_text_tokens - max_text_len,
        grid_size=grid_size(weights, max_text_len),
        text_pos_rows=0 if rotary else weights["text_pos_emb.weight"].shape[0],
        attn_types=attn_types,
        rotary=rotary,
        shift_tokens=ff_depth > 2,
        reversible=found["reversible"],
        stable=bool(hparams.get("stable", False)),
        sandwich_norm=any(".norm_out." in n for n in weights),
    )
    return config, overrides


def grid_size(weights: dict[str, Tensor], max_text_len: int) -> int:
    """Side of the image grid, from the positions' shapes."""
    for name in ("image_pos_emb.weights_0", "image_pos_emb.weights.0"):
        if name in weights:
            return weights[name].shape[1]
    if "transformer.pos_emb" not in weights:
        raise ValueError("the checkpoint has neither learned nor rotary image positions")
    num_image_tokens = weights["transformer.pos_emb"].shape[1] - max_text_len - 1
    side = round(max(num_image_tokens, 0) ** 0.5)
    if side < 1 or side * side != num_image_tokens:
        raise ValueError(
            f"rotary positions leave {num_image_tokens} image tokens beside {max_text_len} text tokens"
        )
    return side


def translate(weights: dict[str, Tensor], config: DallePytorchConfig) -> tuple[dict[str, Tensor], list[str]]:
    """Our names for the generator's weights, and the names that could not be placed."""
    text_vocab = config.text_vocab_size
    result, leftover = {}, []
    for name, tensor in weights.items():
        match = BLOCK.fullmatch(name)
        if match:
            result[block_name(match)] = tensor.flatten() if match["rest"] == "scale" else tensor
        elif name in ("text_emb.weight", "image_emb.weight"):
            result[name.replace("emb", "embedding")] = tensor
        elif name in ("text_pos_emb.weight",):
            result["text_positions"] = tensor
        elif re.fullmatch(r"image_pos_emb\.weights[._][01]", name):
            result["column_positions" if name.endswith("1") else "row_positions"] = tensor.flatten(0, 2)
        elif name == "transformer.pos_emb":
            result["rotary"] = tensor[0, : config.seq_len]
        elif name.startswith("to_logits."):
            result[name.replace("to_logits.0", "norm").replace("to_logits.1", "head")] = tensor
        elif not IGNORED.fullmatch(name):
            leftover.append(name)
    if "text_emb.linear.weight" in weights:  # share_input_output_emb: rows of the output head
        result["text_embedding.weight"] = result["head.weight"][:text_vocab]
        result["image_embedding.weight"] = result["head.weight"][text_vocab:]
    return {n: t.float().contiguous() for n, t in result.items()}, leftover


def block_name(match: re.Match) -> str:
    """`transformer.layers.layers.3.1.fn.fn.net.0.weight` -> `blocks.3.feed_forward.inner.up.weight`."""
    is_attention = match["part"] == "0" or match["stream"] == "f"
    rest = re.sub(r"^(fn\.)+", "", match["rest"])
    for theirs, ours in LEAVES.items():
        rest = rest.replace(theirs, ours)
    return f"blocks.{match['seq'] or match['rev']}.{'attention' if is_attention else 'feed_forward'}.{rest}"
