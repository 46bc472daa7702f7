"""Base models of Stable Diffusion's kind: one loader for folders, hub ids and single files, and the writer of folders.

A folder in diffusers' layout holds model_index.json and one folder each for the autoencoder, the text encoder, its
tokenizer, the UNet and the scheduler. The text encoder is CLIP (Stable Diffusion 1.x, Taiyi-EN) or BERT (Taiyi, and
the base that diffusion.train_base trains).
"""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common import checkpoint
from common.console.terminal import first_line
from common.files import read_json, sha256_file
from diffusion.hub import download

KIND = "diffusion"
INDEX = "model_index.json"
PARTS = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
TEXT_CLASSES = {
    "CLIPTextModel": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "BertModel": ("BertTokenizer", "BertTokenizerFast"),
}
SPARE_ROWS = 128  # an embedding may be padded to a multiple of this for speed

# DeepSpeed, which diffusers and peft import, warns of a missing GPU otherwise
if not torch.accelerator.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


@dataclass(frozen=True)
class DiffusionBase:
    """The parts of a latent diffusion model, frozen and in eval mode; a trainer switches on what it trains."""

    vae: nn.Module
    """AutoencoderKL."""
    text_encoder: nn.Module
    """CLIPTextModel or BertModel; conditioning is its last hidden state, (B, T, D)."""
    tokenizer: Any
    """CLIPTokenizer or BertTokenizer; model_max_length is `text_len`."""
    unet: nn.Module
    """UNet2DConditionModel."""
    scheduler: Any
    """As the folder names it; its betas and prediction type define the training objective."""
    text_len: int
    """Tokens of every padded text, in training and in inference alike."""
    licence: str
    """Of the weights, as the card (README.md) says; "" where it says nothing."""
    path: Path
    """Folder or file that this was loaded from."""

    @property
    def latent_channels(self) -> int:
        return self.vae.config.latent_channels

    @property
    def downsample_factor(self) -> int:
        """Image side over latent side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def image_size(self) -> int:
        """Side in pixels that the UNet was trained for."""
        return self.unet.config.sample_size * self.downsample_factor

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "DiffusionBase":
        """Moves the networks in place; returns self."""
        with quiet():
            for part in (self.vae, self.text_encoder, self.unet):
                part.to(device=device, dtype=dtype)
        return self

    def with_text_len(self, text_len: int) -> "DiffusionBase":
        """The same base with texts of another length; folders that are saved from it keep that length.

        Raises ValueError for a length that the text encoder has no positions for.
        """
        most = self.text_encoder.config.max_position_embeddings
        if not 3 <= text_len <= most:
            raise ValueError(f"text_len must lie in 3..{most} for this text encoder, not {text_len}")
        self.tokenizer.model_max_length = text_len
        return replace(self, text_len=text_len)


def load_base(
    name: str | Path, device: torch.device | str = "cpu", text_len: int | None = None, config: str = ""
) -> DiffusionBase:
    """A base in float32 from a folder in diffusers' layout, a run of diffusion.train_base or diffusion.finetune, a hub
    id, or a single .safetensors file.

    text_len: another padded length than the tokenizer's own. config: for a single file, the folder or hub id with the
    configs and the tokenizer of its architecture.
    Raises FileNotFoundError or ValueError saying in one sentence what is missing, unsupported or inconsistent.
    """
    path = find_base(name)
    if path.is_file():
        parts = _load_single_file(path, config)
    elif config:
        raise ValueError(f"a config is for single files: {path} is a folder and has its own")
    else:
        require_supported(path)
        parts = {part: _load_part(path, part) for part in PARTS}
    for part in ("vae", "text_encoder", "unet"):
        parts[part].requires_grad_(False).eval().to(device)
    text_encoder, tokenizer = parts["text_encoder"], parts["tokenizer"]
    own_len = min(tokenizer.model_max_length, text_encoder.config.max_position_embeddings)
    base = DiffusionBase(**parts, text_len=own_len, licence=read_licence(path), path=path)
    require_consistent(base)
    return base.with_text_len(own_len if text_len is None else text_len)


def find_base(name: str | Path) -> Path:
    """The folder or the single file that `name` stands for; hub ids are downloaded. Raises FileNotFoundError."""
    path = Path(name)
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ValueError(
                f"{path} is not read, since loading a pickle runs what it asks for: convert it to .safetensors"
            )
        return path
    if (path / INDEX).is_file():
        return path
    if (path / "latest" / INDEX).is_file():
        return (path / "latest").resolve()
    if path.is_dir():
        raise FileNotFoundError(f"{path} is no base model in diffusers' layout: it holds no {INDEX}")
    if str(name).count("/") == 1 and not str(name).startswith((".", "/")):
        return download(str(name))
    raise FileNotFoundError(f"no base model {name}: give a folder in diffusers' layout or a hub id")


# ---------------------------------------------------------------------------------------------- what is supported


def require_supported(directory: Path) -> None:
    """Raises ValueError naming the reason for a pipeline that is not of Stable Diffusion 1's kind, FileNotFoundError
    for a missing part."""
    index = read_json(directory / INDEX)
    name = str(index.get("_class_name")) if isinstance(index, dict) else ""
    reason = unsupported_reason(name)
    if reason:
        raise ValueError(f"{directory} holds a {name}, which is not supported: {reason}")
    for part in PARTS:
        entry = index.get(part)
        if not isinstance(entry, list) or len(entry) != 2 or entry[1] is None:
            raise FileNotFoundError(f"{directory} is no whole base model: its {INDEX} names no {part}")
        if not (directory / part).is_dir():
            raise FileNotFoundError(f"{directory} is no whole base model: the folder {part} is missing")
    if index["text_encoder"][1] not in TEXT_CLASSES:
        raise ValueError(
            f"the text encoder {index['text_encoder'][1]} of {directory} is not supported: only "
            f"{' and '.join(TEXT_CLASSES)} are"
        )
    scheduler = read_json(directory / "scheduler" / "scheduler_config.json")
    _require_scheduler(str(index["scheduler"][1]), scheduler, directory)


def unsupported_reason(pipeline_class: str) -> str:
    """Why a pipeline of diffusers cannot serve as a base; "" if it can."""
    if pipeline_class.startswith(("StableDiffusionXL", "StableDiffusionInstructPix2PixXL")):
        return "SDXL conditions on two text encoders, pooled text and sizes"
    if pipeline_class.startswith("StableDiffusion3"):
        return "SD3 is a flow-matching transformer with three text encoders"
    if pipeline_class.startswith(("Flux", "Lumina", "AuraFlow", "Sana", "QwenImage", "HunyuanDiT", "PixArt")):
        return "it is a diffusion transformer, and only UNets of Stable Diffusion 1's kind are trained here"
    if pipeline_class == "StableDiffusionInpaintPipeline":
        return "its UNet also reads a mask and a masked image"
    if not pipeline_class.startswith("StableDiffusion"):
        return "only Stable Diffusion 1.x and Taiyi layouts are"
    return ""


def _require_scheduler(class_name: str, config: dict[str, Any], where: Path) -> None:
    if "FlowMatch" in class_name:
        raise ValueError(
            f"{where} is a flow-matching model ({class_name}): only noise prediction is supported"
        )
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "v_prediction"):
        raise ValueError(f"{where} predicts {prediction!r}: only epsilon and v_prediction are supported")


def require_consistent(base: DiffusionBase) -> None:
    """Raises ValueError where the parts do not belong together."""
    pieces, rows = len(base.tokenizer), base.text_encoder.get_input_embeddings().num_embeddings
    if not 0 <= rows - pieces < SPARE_ROWS:
        raise ValueError(
            f"the tokenizer of {base.path} has {pieces} pieces and its text encoder {rows}: they do not belong "
            "together"
        )
    unet = base.unet.config
    if unet.addition_embed_type is not None:
        raise ValueError(
            f"the UNet of {base.path} has additional conditions ({unet.addition_embed_type}) as SDXL has"
        )
    width, wanted = base.text_encoder.config.hidden_size, unet.cross_attention_dim
    if width != wanted:
        raise ValueError(
            f"the text encoder of {base.path} gives {width} numbers a token, its UNet reads {wanted}: they do not "
            "belong together"
        )
    if unet.in_channels != base.latent_channels:
        raise ValueError(
            f"the autoencoder of {base.path} has {base.latent_channels} latent channels, its UNet reads "
            f"{unet.in_channels}: they do not belong together"
        )
    if getattr(base.text_encoder.config, "use_attention_mask", False):
        raise ValueError(f"the text encoder of {base.path} needs an attention mask, which is not supported")


def read_licence(path: Path) -> str:
    """`license` in the header of README.md beside the weights, or ""."""
    import yaml

    card = (path if path.is_dir() else path.parent) / "README.md"
    if not card.is_file():
        return ""
    header = card.read_text("utf-8", errors="replace").split("---\n")
    try:
        values = yaml.safe_load(header[1]) if len(header) > 2 and not header[0].strip() else {}
    except yaml.YAMLError:
        return ""
    return str(values.get("license") or "") if isinstance(values, dict) else ""


# ------------------------------------------------------------------------------------------------------- loading


def _load_part(directory: Path, part: str) -> Any:
    """One part by the class that model_index.json names. Raises ValueError in one sentence."""
    import diffusers
    import transformers

    library, name = read_json(directory / INDEX)[part]
    kind = getattr({"diffusers": diffusers, "transformers": transformers}.get(library), name, None)
    if kind is None:
        raise ValueError(f"{directory} names {library}.{name} as its {part}: there is no such class")
    folder, options = directory / part, {}
    if part in ("vae", "unet", "text_encoder"):
        options = _weight_options(folder, part)
    try:
        with quiet():
            return kind.from_pretrained(str(folder), local_files_only=True, **options)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"the {part} in {folder} cannot be loaded: {first_line(error)}") from error


def _weight_options(folder: Path, part: str) -> dict[str, Any]:
    """Which file of `folder` is read: safetensors before .bin (read with weights_only), full before fp16 ones."""
    stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
    bin_stem = "pytorch_model" if part == "text_encoder" else stem
    found = {
        (use_safetensors, variant): list(folder.glob(f"{name}{dot}*{suffix}"))
        for use_safetensors, name, suffix in ((True, stem, ".safetensors"), (False, bin_stem, ".bin"))
        for variant, dot in ((None, ""), ("fp16", ".fp16"))
    }
    for key in ((True, None), (False, None)):  # a glob without variant finds those of a variant too
        found[key] = [f for f in found[key] if ".fp16" not in f.name and ".non_ema" not in f.name]
    for (use_safetensors, variant), files in found.items():
        if files:
            options = {"use_safetensors": use_safetensors, "variant": variant}
            return options | {"dtype" if part == "text_encoder" else "torch_dtype": torch.float32}
    raise FileNotFoundError(f"{folder} holds no weights: neither {stem}.safetensors nor {bin_stem}.bin")


def _load_single_file(path: Path, config: str) -> dict[str, Any]:
    """The parts of a checkpoint in one file, which has weights alone: configs and tokenizer come from `config`, or
    from the hub."""
    from diffusers import StableDiffusionPipeline
    from safetensors import SafetensorError

    options: dict[str, Any] = {
        "torch_dtype": torch.float32,
        "safety_checker": None,
        "feature_extractor": None,
    }
    if config:
        directory = find_base(config)
        require_supported(directory)
        options |= {"config": str(directory), "local_files_only": True}
    try:
        with quiet():
            pipeline = StableDiffusionPipeline.from_single_file(str(path), **options)
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file: {first_line(error)}") from error
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        hint = (
            ""
            if config
            else (
                "; a single file holds no configs and no tokenizer: name a folder in diffusers' layout of the same "
                "architecture with --base-config where the hub cannot be reached"
            )
        )
        raise ValueError(
            f"{path} cannot be loaded as Stable Diffusion 1.x: {first_line(error)}{hint}"
        ) from error
    parts = {part: getattr(pipeline, part) for part in PARTS}
    _require_scheduler(type(parts["scheduler"]).__name__, parts["scheduler"].config, path)
    return parts


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars and the warnings of diffusers and transformers, which name CLIP where BERT is right."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    modules = [of_diffusers, of_transformers]
    before = [(m.get_verbosity(), m.is_progress_bar_enabled()) for m in modules]
    try:
        for module in modules:
            module.set_verbosity_error()
            module.disable_progress_bar()
        yield
    finally:
        for module, (verbosity, had_bar) in zip(modules, before, strict=True):
            module.set_verbosity(verbosity)
            if had_bar:
                module.enable_progress_bar()


# -------------------------------------------------------------------------------------------------------- saving


def save_base(base: DiffusionBase, directory: Path) -> None:
    """An ordinary StableDiffusionPipeline folder, safetensors, into an existing directory; plain diffusers loads it."""
    with quiet():
        make_pipeline(base).save_pretrained(str(directory))
    if base.licence and not (directory / "README.md").exists():
        (directory / "README.md").write_text(f"---\nlicense: {base.licence}\n---\n", "utf-8")


def make_pipeline(base: DiffusionBase) -> Any:
    """diffusers' own StableDiffusionPipeline around the same parts."""
    from diffusers import StableDiffusionPipeline

    with quiet():
        return StableDiffusionPipeline(
            **{part: getattr(base, part) for part in PARTS},
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


def newest_base(runs: Path = Path("runs")) -> Path | None:
    """The run of kind `diffusion` that was written last."""
    return checkpoint.newest_run(KIND, runs)


def base_sha256(path: Path) -> str:
    """Identity of a base: the digest of its file, or of the digests of a folder's weight files by name."""
    if path.is_file():
        return sha256_file(path)
    digest = hashlib.sha256()
    for file in sorted([*path.glob("*/*.safetensors"), *path.glob("*/*.bin")]):
        digest.update(f"{file.parent.name}/{file.name} {sha256_file(file)}\n".encode())
    return digest.hexdigest()
