"""Import a generator trained with lucidrains' DALLE-pytorch 1.x (`dalle.pt`), its image tokenizer included.

    python -m dalle.convert dalle.pt runs/imported                                  # hfl/chinese-roberta-wwm-ext texts
    python -m dalle.convert dalle.pt runs/imported --text-tokenizer DIR --image-tokenizer runs/vqgan_f16_1024
    python generate.py "一件红色的连衣裙" 8 out/ --checkpoint runs/imported

What the file's options say and what its weights say can differ, since defaults changed between releases: the weights
win, and every such override is printed. Leftover weights are an error. Foreign classes are never imported.
"""

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor

from common.checkpoint import resolve, write_model
from common.config import command, parse_options, to_mapping
from common.files import sha256_file
from common.log import say
from common.outputs.record import new_directory, require_new
from dalle.published.dalle_pytorch import KIND, BareTextTokenizer, DallePytorch, DallePytorchConfig
from vq.convert import guess_kind, tokenizer_from_dalle_pytorch, tokenizer_from_taming
from vq.model import ImageTokenizer
from vq.published.foreign import read_foreign, require_finite, unwrapped

CHINESE_VOCAB = 21128  # of bert-base-chinese and of hfl/chinese-roberta-wwm-ext, which differ in case alone
BLOCK = re.compile(
    r"transformer\.layers\.(?:layers\.(?P<seq>\d+)\.(?P<part>[01])|blocks\.(?P<rev>\d+)\.(?P<stream>[fg])\.net)\."
    r"(?P<rest>scale|fn\.norm(?:_out)?\.(?:weight|bias)|(?P<depth>(?:fn\.)+)(?:to_qkv\.weight|to_out\.0\.(?:weight|bias)"
    r"|net\.[03]\.(?:weight|bias)))"
)
LEAVES = {"to_qkv": "inner.to_qkv", "to_out.0": "inner.to_out", "net.0": "inner.up", "net.3": "inner.down"}
IGNORED = re.compile(r"logits_mask|.*\.static_mask|text_emb\.linear\..*|image_emb\.linear\..*|vae\..*")


@dataclass(frozen=True)
class Options:
    """Import a DALLE-pytorch generator."""

    source: Annotated[Path, tyro.conf.Positional]
    """The file dalle.pt."""
    target: Annotated[Path, tyro.conf.Positional]
    """Checkpoint directory to write; must not exist."""
    text_tokenizer: str = "hfl/chinese-roberta-wwm-ext"
    """Folder or hub id of the tokenizer that the generator was trained with; the file does not say which it was."""
    image_tokenizer: Path | None = None
    """Checkpoint of `python -m vq.convert` to use instead of the one in the file."""


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
    content = read_foreign(path)
    if not isinstance(content, dict) or "hparams" not in content or "weights" not in content:
        raise ValueError(f"{path} is no DALLE-pytorch checkpoint: it lacks hparams and weights")
    if isinstance(content["weights"], str):
        raise ValueError(
            f"{path} belongs to a DeepSpeed folder and holds no weights: run its zero_to_fp32.py first, then put the "
            "result into the file's entry 'weights'"
        )
    if not isinstance(content["weights"], dict) or not isinstance(content["hparams"], dict):
        raise ValueError(f"{path} is no DALLE-pytorch checkpoint: its weights are no plain tensors")
    if "depth" not in content["hparams"]:
        raise ValueError(
            f"{path} is a DiscreteVAE checkpoint, not a generator: import it with python -m vq.convert"
        )
    weights = {str(n): t.detach() for n, t in content["weights"].items() if isinstance(t, Tensor)}
    return content | {"weights": unwrapped(weights, r"to_logits\.|text_emb\.|transformer\.")}


def import_checkpoint(path: Path) -> Imported:
    """Read and translate `dalle.pt`. Raises ValueError for anything that would not give the same logits."""
    content = read_checkpoint(path)
    weights: dict[str, Tensor] = content["weights"]
    positions = () if "transformer.pos_emb" in weights else ("text_pos_emb.weight",)
    for name in ("to_logits.1.weight", "to_logits.0.weight", *positions):
        if name not in weights:
            raise ValueError(f"{path} lacks the weight {name}")
    read = {n: t for n, t in weights.items() if not IGNORED.fullmatch(n) or n.startswith("vae.")}
    require_finite(read, path)
    config, overrides = infer_config(content["hparams"], weights, is_centred(content.get("version")))
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


def is_centred(version: Any) -> bool:
    """Whether conv_like attention looked around the token: before 1.5.0, whose files say their release, if at all."""
    numbers = re.match(r"(\d+)\.(\d+)", str(version or ""))
    return not numbers or (int(numbers[1]), int(numbers[2])) < (1, 5)


def attention_types(hparams: dict[str, Any], weights: dict[str, Tensor]) -> tuple[str, ...]:
    """The patterns, repeated over the layers. Raises ValueError for those that are not supported."""
    attn_types = hparams.get("attn_types") or ("full",)
    attn_types = tuple(attn_types.split(",") if isinstance(attn_types, str) else attn_types)
    if "mlp" in attn_types or any(".sgu." in name for name in weights):
        raise ValueError(
            "attn_types 'mlp' (gMLP blocks in place of attention) is not supported here: retrain with full, axial_row, "
            "axial_col or conv_like"
        )
    if "sparse" in attn_types:
        raise ValueError("attn_types 'sparse' needs DeepSpeed's block-sparse kernels, not supported here")
    return attn_types


def infer_config(
    hparams: dict[str, Any], weights: dict[str, Tensor], conv_centred: bool = False
) -> tuple[DallePytorchConfig, list[str]]:
    """The config, from the weights wherever they tell, and a line for each option that they contradict.

    `conv_centred`: the window of conv_like attention, which only the file's release tells.
    """
    attn_types = attention_types(hparams, weights)
    blocks = [m for m in map(BLOCK.fullmatch, weights) if m]
    if not blocks:
        raise ValueError("the checkpoint holds no transformer layers")
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
        sandwich_norm=any(".norm_out." in m.string for m in blocks),  # a VQGAN beside them has such names too
        conv_centred=conv_centred and "conv_like" in attn_types,
    )
    return config, _overrides(hparams, found)


def _overrides(hparams: dict[str, Any], found: dict[str, Any]) -> list[str]:
    return [
        f"{name}: options say {hparams[name]}, weights say {value}"
        for name, value in found.items()
        if name in hparams and hparams[name] != value
    ]


def grid_size(weights: dict[str, Tensor], max_text_len: int) -> int:
    """Side of the image grid, from the positions' shapes."""
    for name in ("image_pos_emb.weights_0", "image_pos_emb.weights.0"):
        if name in weights:
            return weights[name].shape[1]
    if "transformer.pos_emb" not in weights:
        raise ValueError("the checkpoint has neither learned nor rotary image positions")
    rows = weights["transformer.pos_emb"].shape[1]
    for num_image_tokens in (rows - max_text_len - 1, rows - max_text_len):  # releases 1.1.x: one row short
        side = round(max(num_image_tokens, 0) ** 0.5)
        if side >= 1 and side * side == num_image_tokens:
            return side
    raise ValueError(
        f"rotary positions leave {rows - max_text_len - 1} image tokens beside {max_text_len} text tokens"
    )


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
            missing = config.seq_len - tensor.shape[1]  # the last row, which no token of an image needs
            result["rotary"] = torch.nn.functional.pad(
                tensor[0, : config.seq_len], (0, 0, 0, max(0, missing))
            )
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


def image_tokenizer_of(imported: Imported, override: Path | None) -> ImageTokenizer:
    """The tokenizer in the file, or the one given. Raises ValueError when it does not fit the generator."""
    config = imported.config
    if override:
        tokenizer = ImageTokenizer.from_pretrained(override)
    elif not imported.vae_weights:
        raise ValueError(
            f"the file holds no {imported.vae_class}: import it first and give it as --image-tokenizer"
        )
    elif imported.vae_class == "OpenAIDiscreteVAE":
        raise ValueError(
            "the file holds OpenAI's discrete VAE, which is not supported: retrain with a DiscreteVAE or a VQGAN"
        )
    else:
        weights = {n.removeprefix("model."): t for n, t in imported.vae_weights.items()}
        is_taming = guess_kind(weights) == "taming"
        options = imported.vae_options or {}
        tokenizer = (
            tokenizer_from_taming(weights) if is_taming else tokenizer_from_dalle_pytorch(weights, options)
        )
        side = (
            config.grid_size * tokenizer.downsample_factor
        )  # the generator tells which side it was trained at
        if is_taming and side != tokenizer.image_size:
            tokenizer = tokenizer_from_taming(weights, side)
    if (tokenizer.codebook_size, tokenizer.grid_size) != (config.codebook_size, config.grid_size):
        raise ValueError(
            f"the generator samples {config.grid_size} x {config.grid_size} of {config.codebook_size} codes, the image "
            f"tokenizer has {tokenizer.grid_size} x {tokenizer.grid_size} of {tokenizer.codebook_size}"
        )
    return tokenizer


def convert(options: Options) -> Imported:
    """Read, translate and write. Raises ValueError or FileNotFoundError saying what is wrong with the files."""
    require_new(options.target)
    imported = import_checkpoint(options.source)
    text_tokenizer = BareTextTokenizer.from_pretrained(options.text_tokenizer)
    if text_tokenizer.vocab_size != imported.config.num_text_tokens:
        raise ValueError(
            f"the generator was trained on {imported.config.num_text_tokens} text tokens, {options.text_tokenizer} has "
            f"{text_tokenizer.vocab_size}: name the right one with --text-tokenizer"
        )
    if imported.config.num_text_tokens == CHINESE_VOCAB and options.text_tokenizer == Options.text_tokenizer:
        say(
            "note: 21128 text tokens are also those of bert-base-chinese, which DALLE-pytorch's --chinese takes and "
            "which keeps upper case: if the generator was trained so, the same ids of Latin letters need "
            "--text-tokenizer bert-base-chinese (or its folder)"
        )
    image_tokenizer = image_tokenizer_of(imported, options.image_tokenizer)
    source = {"file": options.source.name, "sha256": sha256_file(options.source)}
    with new_directory(options.target) as directory:
        text_tokenizer.save(directory)
        if options.image_tokenizer:
            shutil.copytree(resolve(options.image_tokenizer), directory / "image_tokenizer")
        else:
            (directory / "image_tokenizer").mkdir()
            image_tokenizer.write(directory / "image_tokenizer", 0)
        write_model(directory, KIND, to_mapping(imported.config), imported.weights, 0, imported=source)
    return imported


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Import; prints what it was."""
    options = parse_options(Options, argv, description=__doc__)
    imported = convert(options)
    for line in imported.overrides:
        say(f"the weights win | {line}")
    if options.image_tokenizer and imported.vae_weights:
        say(f"note: {options.image_tokenizer} takes the place of the {imported.vae_class} in the file")
    c, count = imported.config, sum(t.numel() for t in imported.weights.values())
    sizes = (
        f"{c.num_layers} layers of width {c.dim}, {c.max_text_len} text and {c.num_image_tokens} image tokens"
    )
    say(f"{options.target}: {sizes}, {count / 1e6:.1f}M parameters, images by {imported.vae_class}")


if __name__ == "__main__":
    main()
