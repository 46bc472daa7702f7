"""Published image tokenizers -> our checkpoint directory.

    python -m vq.convert last.ckpt runs/vqgan_f16_1024 --config model.yaml     # taming VQGAN, GumbelVQ, f8 of LDM
    python -m vq.convert vq_ds16_c2i.pt runs/llamagen_16                       # LlamaGen VQ-8, VQ-16
    python -m vq.convert vae-final.pt runs/dvae                                # DALLE-pytorch DiscreteVAE

The kind and all sizes are read off the weights; the yaml adds the training size and is checked against them. Foreign
classes in a pickle are never imported (vq/published/foreign.py). Every weight must find its place: a leftover is an
error. Gumbel tokenizers encode with the most likely code, where the original draws one even when encoding.
"""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor

from common import checkpoint
from common.config import command, expand_home, read_mapping, to_mapping
from common.files import sha256_file
from common.log import say
from common.outputs.record import new_directory, require_new
from vq.model import KIND, ImageTokenizer, TokenizerConfig
from vq.published.dvae import DvaeConfig
from vq.published.foreign import read_foreign, require_finite, tensors_of, unwrapped
from vq.published.taming import TamingConfig

SourceKind = Literal["auto", "taming", "llamagen", "dalle_pytorch"]
Weights = dict[str, Tensor]
ANCHOR = r"vae\.|encoder\.(?:conv_in|conv_blocks|down|0)\.|codebook\.weight"  # how names of a tokenizer begin
IGNORED = re.compile(r"(loss|model_ema|colorize|logvar)(\..*)?|quantize\.codebook_used")


@dataclass(frozen=True)
class Options:
    """Import a published image tokenizer."""

    source: Annotated[Path, tyro.conf.Positional]
    """Weights file: .ckpt, .pt, .pth, .bin or .safetensors."""
    target: Annotated[Path, tyro.conf.Positional]
    """Checkpoint directory to write; must not exist."""
    config: Path | None = None
    """model.yaml of a taming or LDM model."""
    kind: SourceKind = "auto"
    """Where the weights come from; auto looks at their names."""
    image_size: int = 0
    """Side of training images in pixels; 0: from the yaml or the file, else 256."""


def guess_kind(weights: Weights) -> str:
    """By names that only one layout has. Raises ValueError."""
    if any(n.startswith("encoder.conv_blocks.") for n in weights):
        return "llamagen"
    if any(n.startswith("encoder.down.") for n in weights):
        return "taming"
    if "codebook.weight" in weights and any(re.fullmatch(r"encoder\.0\.0\.weight", n) for n in weights):
        return "dalle_pytorch"
    names = ", ".join(sorted(weights)[:5])
    raise ValueError(
        f"these weights are of no known image tokenizer (taming, LlamaGen, DALLE-pytorch): {names} ..."
    )


def tokenizer_from_taming(weights: Weights, image_size: int = 256) -> ImageTokenizer:
    """VQModel or GumbelVQ of taming-transformers, VQModelInterface of latent-diffusion."""
    if "quantize.used" in weights:
        raise ValueError(
            "these weights remap their codes (quantize.used): an image's code may lie outside the remapped codebook, "
            "so they cannot be imported without loss"
        )
    renamed = {}
    for name, tensor in _kept(weights).items():
        name = re.sub(r"^quant_conv\.", "encoder.quant_conv.", name)
        name = re.sub(r"^post_quant_conv\.", "decoder.post_quant_conv.", name)
        name = re.sub(r"^quantize\.(embedding|embed)\.", "quantizer.codebook.", name)
        renamed[re.sub(r"^quantize\.proj\.", "quantizer.proj.", name)] = tensor
    gumbel = "quantizer.proj.weight" in renamed
    return _build(renamed, _taming_config(renamed, image_size, gumbel=gumbel, l2_normalize=False))


def tokenizer_from_llamagen(weights: Weights, image_size: int = 256) -> ImageTokenizer:
    """VQModel of LlamaGen: the taming network under other names, with l2-normalised codes."""
    levels = 1 + max(int(n.split(".")[2]) for n in weights if n.startswith("encoder.conv_blocks."))
    mid = {"0": "block_1", "1": "attn_1", "2": "block_2"}
    renamed = {}
    for name, tensor in _kept(weights).items():
        name = re.sub(r"\.mid\.(\d)\.", lambda m: f".mid.{mid[m[1]]}.", name)
        name = re.sub(r"^encoder\.conv_blocks\.(\d+)\.res\.", r"encoder.down.\1.block.", name)
        name = re.sub(r"^encoder\.conv_blocks\.", "encoder.down.", name)
        name = re.sub(
            r"^decoder\.conv_blocks\.(\d+)\.", lambda m: f"decoder.up.{levels - 1 - int(m[1])}.", name
        )
        name = re.sub(r"^(decoder\.up\.\d+)\.res\.", r"\1.block.", name)
        name = re.sub(r"^quant_conv\.", "encoder.quant_conv.", name)
        name = re.sub(r"^post_quant_conv\.", "decoder.post_quant_conv.", name)
        renamed[re.sub(r"^quantize\.embedding\.", "quantizer.codebook.", name)] = tensor
    return _build(renamed, _taming_config(renamed, image_size, gumbel=False, l2_normalize=True))


def tokenizer_from_dalle_pytorch(weights: Weights, hparams: dict[str, Any] | None = None) -> ImageTokenizer:
    """DiscreteVAE of DALLE-pytorch; `hparams` as in its checkpoint, for the image size."""
    weights = _kept(weights)
    numbers = sorted({int(n.split(".")[1]) for n in weights if n.startswith("encoder.")})
    down = [i for i in numbers if f"encoder.{i}.0.weight" in weights]
    blocks = [i for i in numbers if f"encoder.{i}.net.0.weight" in weights]
    renamed = {"quantizer.codebook.weight": weights["codebook.weight"]}
    renames = {f"encoder.{i}.0": f"encoder.down.{k}" for k, i in enumerate(down)}
    renames |= {f"encoder.{i}": f"encoder.blocks.{k}" for k, i in enumerate(blocks)}
    renames |= {f"encoder.{numbers[-1]}": "quantizer.proj"}
    first = 1 if blocks else 0  # the decoder's 1x1 convolution before its residual blocks
    renames |= {"decoder.0": "decoder.conv_in"} if blocks else {}
    renames |= {f"decoder.{first + k}": f"decoder.blocks.{k}" for k in range(len(blocks))}
    up = first + len(blocks)
    renames |= {f"decoder.{up + k}.0": f"decoder.up.{k}" for k in range(len(down))}
    renames |= {f"decoder.{up + len(down)}": "decoder.conv_out"}
    for name, tensor in weights.items():
        for before in sorted(renames, key=len, reverse=True):
            if name.startswith(f"{before}."):
                renamed[renames[before] + name.removeprefix(before)] = tensor
                break
        else:
            if name != "codebook.weight":
                raise ValueError(f"a weight of no DiscreteVAE: {name}")
    size, dim = weights["codebook.weight"].shape
    config = TokenizerConfig(
        image_size=int((hparams or {}).get("image_size", 256)),
        architecture="dvae",
        dvae=DvaeConfig(weights[f"encoder.{down[0]}.0.weight"].shape[0], len(down), len(blocks)),
        quantizer="gumbel",
        codebook_size=size,
        codebook_dim=dim,
    )
    return _build(renamed, config)


def _kept(weights: Weights) -> Weights:
    return {n: t.float() for n, t in weights.items() if not IGNORED.fullmatch(n)}


def _taming_config(weights: Weights, image_size: int, gumbel: bool, l2_normalize: bool) -> TokenizerConfig:
    """Sizes from weights under our names. Raises ValueError naming what is missing."""
    needed = ("encoder.conv_in.weight", "encoder.conv_out.weight", "quantizer.codebook.weight")
    missing = [n for n in needed if n not in weights]
    if missing:
        raise ValueError(f"the weights lack {', '.join(missing)}")
    matches = [re.match(r"encoder\.down\.(\d+)\.block\.(\d+)\.", n) for n in weights]
    levels = 1 + max(int(m[1]) for m in matches if m)
    blocks = 1 + max(int(m[2]) for m in matches if m)
    channels = weights["encoder.conv_in.weight"].shape[0]
    if weights["encoder.conv_in.weight"].shape[1] != 3:
        raise ValueError(
            f"images of {weights['encoder.conv_in.weight'].shape[1]} channels are not supported, only RGB"
        )
    widths = [weights[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in range(levels)]
    taming = TamingConfig(
        channels=channels,
        channel_mults=tuple(w // channels for w in widths),
        res_blocks=blocks,
        attention_factors=tuple(
            2**i for i in range(levels) if f"encoder.down.{i}.attn.0.q.weight" in weights
        ),
        z_channels=weights["encoder.conv_out.weight"].shape[0],
    )
    size, dim = weights["quantizer.codebook.weight"].shape
    return TokenizerConfig(
        image_size=image_size,
        architecture="taming",
        taming=taming,
        quantizer="gumbel" if gumbel else "vq",
        codebook_size=size,
        codebook_dim=dim,
        l2_normalize=l2_normalize if not gumbel else True,
    )


def _build(weights: Weights, config: TokenizerConfig) -> ImageTokenizer:
    """Strictly. Raises ValueError naming what does not fit."""
    with torch.device("meta"):
        model = ImageTokenizer(config)
    expected = model.state_dict()
    missing, extra = sorted(set(expected) - set(weights)), sorted(set(weights) - set(expected))
    if missing or extra:
        raise ValueError(
            f"{len(missing)} weights are missing ({', '.join(missing[:3])}) and {len(extra)} have no place "
            f"({', '.join(extra[:3])})"
        )
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, not {tuple(expected[name].shape)}")
    model.load_state_dict(weights, assign=True)
    return model.eval()


def _of_tokenizer(weights: Weights) -> Weights:
    """A DALLE-pytorch generator carries its tokenizer along, as `vae.` (DiscreteVAE) or `vae.model.` (VQGAN)."""
    for prefix in ("vae.model.", "vae."):
        inside = {n.removeprefix(prefix): t for n, t in weights.items() if n.startswith(prefix)}
        if inside:
            return inside
    return weights


def _section(values: dict[str, Any], path: Path, *names: str) -> dict[str, Any]:
    """A mapping inside a mapping; {} where a section is missing or empty. Raises ValueError naming the file."""
    for depth, name in enumerate(names):
        values = values.get(name) or {}
        if not isinstance(values, dict):
            where = ".".join(names[: depth + 1])
            raise ValueError(f"{path}: {where} must be a mapping, not {str(values)[:40]!r}")
    return values


def _number(values: dict[str, Any], name: str, path: Path) -> int | None:
    """None where it is missing or empty. Raises ValueError naming the file."""
    value = values.get(name)
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return value
    if isinstance(value, str) and value.strip().isascii() and value.strip().isdigit() and int(value):
        return int(value)
    raise ValueError(f"{path}: {name} must be a whole number above 0, not {str(value)[:40]!r}")


def image_size_of(options: Options, content: Any, weights: Weights) -> int:
    """From the flag, the yaml (checked against the weights) or the file's own options; 256 if none says."""
    stated = 0
    if options.config:
        params = _section(read_mapping(options.config), options.config, "model", "params")
        ddconfig = _section(params, options.config, "ddconfig")
        stated = _number(ddconfig, "resolution", options.config) or 0
        for key in ("n_embed", "embed_dim"):
            books = [
                weights[n] for n in ("quantize.embedding.weight", "quantize.embed.weight") if n in weights
            ]
            said = _number(params, key, options.config)
            if said is not None and books and said != books[0].shape[key == "embed_dim"]:
                found = books[0].shape[key == "embed_dim"]
                raise ValueError(
                    f"{options.config} says {key} {said}, the weights have {found}: not of one model"
                )
    elif isinstance(content, dict):
        for entry in ("vae_params", "hparams"):
            if isinstance(content.get(entry), dict) and "image_size" in content[entry]:
                stated = _number(content[entry], "image_size", options.source) or 0
                break
    return options.image_size or stated or 256


def convert(options: Options) -> ImageTokenizer:
    """Read, translate and write. Raises ValueError or FileNotFoundError saying what is wrong with the files."""
    require_new(options.target)
    content = read_foreign(options.source)
    weights = unwrapped(_of_tokenizer(unwrapped(tensors_of(content, options.source), ANCHOR)), ANCHOR)
    require_finite(_kept(weights), options.source)
    kind = guess_kind(weights) if options.kind == "auto" else options.kind
    image_size = image_size_of(options, content, weights)
    try:
        if kind == "taming":
            tokenizer = tokenizer_from_taming(weights, image_size)
        elif kind == "llamagen":
            tokenizer = tokenizer_from_llamagen(weights, image_size)
        else:
            tokenizer = tokenizer_from_dalle_pytorch(weights, {"image_size": image_size})
    except (KeyError, IndexError) as error:
        raise ValueError(f"{options.source} is no complete {kind} tokenizer: it lacks {error}") from error
    except ValueError as error:
        raise ValueError(f"{options.source} cannot be imported as {kind}: {error}") from error
    source = {"kind": kind, "file": options.source.name, "sha256": sha256_file(options.source)}
    with new_directory(options.target) as directory:
        mapping = to_mapping(tokenizer.config)
        checkpoint.write_model(directory, KIND, mapping, tokenizer.state_dict(), step=0, imported=source)
    return ImageTokenizer.from_pretrained(options.target)


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Import; prints what it was."""
    options = _parse(argv)
    tokenizer = convert(options)
    config, count = tokenizer.config, sum(p.numel() for p in tokenizer.parameters())
    say(
        f"{options.target}: {config.architecture}, f{config.downsample_factor}, {config.codebook_size} codes of width "
        f"{config.codebook_dim} ({config.quantizer}), {config.image_size} pixels, {count / 1e6:.1f}M parameters"
    )


def _parse(argv: Sequence[str] | None) -> Options:
    """`--config` names the foreign yaml here, not one of ours."""
    return tyro.cli(Options, args=expand_home(sys.argv[1:] if argv is None else argv), description=__doc__)


if __name__ == "__main__":
    main()
