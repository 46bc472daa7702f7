"""LoRA files: the layouts of diffusers, of kohya-ss (ComfyUI, WebUI) and of peft, read into one form and written back.

    diffusers   unet.down_blocks.0.attentions.0....attn1.to_k.lora.down.weight, of the text encoder
                text_encoder.text_model....q_proj.lora_linear_layer.down.weight; alpha in the header's metadata
    kohya       lora_unet_down_blocks_0_attentions_0_..._attn1_to_k.lora_down.weight, .lora_up.weight, .alpha
    peft        down_blocks.0.attentions.0....attn1.to_k.lora_A.weight: `unet.save_lora_adapter`, without a prefix

A file without alpha is read as diffusers reads it: alpha = rank. Files of `save_lora_weights` without metadata have
lost theirs, and files of diffusers' layout are not loaded by ComfyUI and WebUI (diffusers#10860, #6399).
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from common.files import atomic_path

LAYOUTS = ("diffusers", "kohya")
Layout = Literal["diffusers", "kohya"]
WEIGHTS_FILE = "pytorch_lora_weights.safetensors"
METADATA_KEY = "lora_adapter_metadata"
PARTS = ("unet", "text_encoder")
_KOHYA_PREFIXES = {"lora_unet_": "unet", "lora_te_": "text_encoder", "lora_te1_": "text_encoder"}
_CLIP_PREFIX = "text_model."  # modules of CLIPTextModel until transformers 5, and in every published file
_DOWN = (".lora.down.weight", ".lora_A.weight", ".lora_linear_layer.down.weight", ".lora_down.weight")
_UP = (".lora.up.weight", ".lora_B.weight", ".lora_linear_layer.up.weight", ".lora_up.weight")
_PROCESSOR = re.compile(r"\.processor\.(to_[qkv]|to_out)_lora\.(down|up)\.weight$")  # diffusers before 0.22


@dataclass(frozen=True)
class LoraLayer:
    """The two factors of one module: W + alpha / r * up @ down."""

    down: Tensor
    """(r, in), of a convolution (r, in, k, k)."""
    up: Tensor
    """(out, r), of a convolution (out, r, 1, 1)."""
    alpha: float
    """The scale times the rank."""

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def delta(self) -> Tensor:
        """float32 in the shape of the module's weight: what is added to it."""
        down, up = self.down.float(), self.up.float()
        return self.scale * (up.flatten(1) @ down.flatten(1)).view(up.shape[0], *down.shape[1:])


Layers = dict[str, LoraLayer]


@dataclass(frozen=True)
class LoraFile:
    """All layers of a file by part and by the module's name; names of kohya's layout have underscores for dots."""

    parts: dict[str, Layers]
    layout: Literal["diffusers", "kohya", "peft"]
    has_alpha: bool
    """False where the file says nothing of alpha, so that alpha = rank was taken."""

    @property
    def num_parameters(self) -> int:
        layers = [layer for part in self.parts.values() for layer in part.values()]
        return sum(layer.down.numel() + layer.up.numel() for layer in layers)


def find_file(name: str | Path) -> Path:
    """A file, or the folder that holds it. Raises FileNotFoundError naming the command that makes one."""
    path = Path(name)
    if path.is_file():
        return path
    candidates = (path / WEIGHTS_FILE, path / "latest" / WEIGHTS_FILE)
    found = next((p for p in candidates if p.is_file()), None)
    if found is None:
        raise FileNotFoundError(
            f"no LoRA {path}: name a .safetensors file, or a folder or a run of diffusion.train_lora with "
            f"{WEIGHTS_FILE}"
        )
    return found


def read_lora(name: str | Path) -> LoraFile:
    """Raises FileNotFoundError, or ValueError for a file that is no LoRA of Stable Diffusion 1.x in a known layout."""
    from safetensors import SafetensorError, safe_open

    path = find_file(name)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} is no .safetensors file: pickled weights are not read, convert it first")
    try:
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return from_tensors(tensors, header, str(path))


def from_tensors(tensors: Mapping[str, Tensor], header: Mapping[str, str], where: str) -> LoraFile:
    """The layers of a file's tensors; `header`: its metadata. Raises ValueError naming what is not understood."""
    first = next(iter(tensors), "")
    _refuse_others(tensors, where)
    if first.startswith("lora_"):
        split, layout = _split_kohya, "kohya"
    elif first.startswith(tuple(f"{part}." for part in PARTS)):
        split, layout = _split_prefixed, "diffusers"
    elif "lora_A" in first or "lora_B" in first or _PROCESSOR.search(first) or ".lora." in first:
        split, layout = _split_plain, "peft"
    else:
        raise ValueError(f"{where} holds no LoRA: its first tensor is {first!r}")
    config = _metadata(header, where)
    parts: dict[str, dict[str, dict[str, Tensor]]] = {}
    for key, tensor in tensors.items():
        part, name, role = split(key, where)
        parts.setdefault(part, {}).setdefault(name, {})[role] = tensor
    has_alpha = bool(config) or any("alpha" in roles for part in parts.values() for roles in part.values())
    layers = {
        part: {name: _layer(part, name, roles, config, where) for name, roles in modules.items()}
        for part, modules in parts.items()
    }
    return LoraFile(layers, layout, has_alpha)


def _refuse_others(tensors: Mapping[str, Tensor], where: str) -> None:
    for key in tensors:
        if key.startswith(("lora_te2_", "text_encoder_2.")):
            raise ValueError(f"{where} is a LoRA for SDXL (it has a second text encoder), not for SD 1.x")
        if key.startswith(("transformer.", "lora_transformer_", "diffusion_model.")):
            raise ValueError(f"{where} is a LoRA for a diffusion transformer (SD3, Flux ...), not for SD 1.x")
        for family, mark in (
            ("DoRA", "dora_scale"),
            ("DoRA", "magnitude_vector"),
            ("LoKr", "lokr_"),
            ("LoHa", "hada_"),
        ):
            if mark in key:
                raise ValueError(f"{where} is a {family} adapter ({key}): only plain LoRA is read")


def _role(key: str) -> tuple[str, str]:
    """Module and role of a key. ("", "") where it has none."""
    for role, suffixes in (("down", _DOWN), ("up", _UP), ("alpha", (".alpha",))):
        for suffix in suffixes:
            if key.endswith(suffix):
                return key.removesuffix(suffix), role
    if match := _PROCESSOR.search(key):
        module = "to_out.0" if match[1] == "to_out" else match[1]
        return f"{key[: match.start()]}.{module}", match[2]
    return "", ""


def _split_kohya(key: str, where: str) -> tuple[str, str, str]:
    name, role = _role(key)
    prefix = next((p for p in _KOHYA_PREFIXES if name.startswith(p)), "")
    if not role or not prefix:
        raise ValueError(f"{where}: the key {key!r} is not understood")
    return _KOHYA_PREFIXES[prefix], name.removeprefix(prefix), role


def _split_prefixed(key: str, where: str) -> tuple[str, str, str]:
    part, _, rest = key.partition(".")
    name, role = _role(rest)
    if not role or part not in PARTS:
        raise ValueError(f"{where}: the key {key!r} is not understood")
    return part, name, role


def _split_plain(key: str, where: str) -> tuple[str, str, str]:
    name, role = _role(key.removeprefix("base_model.model."))
    if not role:
        raise ValueError(f"{where}: the key {key!r} is not understood")
    return "unet", name, role


def _metadata(header: Mapping[str, str], where: str) -> dict[str, Any]:
    """The peft configuration in a header, {} where there is none."""
    try:
        config = json.loads(header.get(METADATA_KEY, "{}"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: the {METADATA_KEY} of its header is damaged: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{where}: the {METADATA_KEY} of its header is no mapping")
    return config


def _layer(part: str, name: str, roles: dict[str, Tensor], config: dict[str, Any], where: str) -> LoraLayer:
    for role in ("down", "up"):
        if role not in roles:
            raise ValueError(f"{where}: {name} has no {role} factor")
    down, up = roles["down"], roles["up"]
    if down.ndim < 2 or up.ndim != down.ndim or up.shape[1] != down.shape[0]:
        raise ValueError(f"{where}: the factors of {name} are {tuple(down.shape)} and {tuple(up.shape)}")
    rank = down.shape[0]
    alpha = float(roles["alpha"]) if "alpha" in roles else _alpha_of(part, name, rank, config)
    return LoraLayer(down, up, alpha)


def _alpha_of(part: str, name: str, rank: int, config: dict[str, Any]) -> float:
    """From the metadata of diffusers or peft; the rank where it says nothing."""
    values = {key.removeprefix(f"{part}."): value for key, value in config.items()}
    alpha = values.get("lora_alpha", rank)
    for pattern, value in (values.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            alpha = value
    return float(alpha) * (rank**0.5 if values.get("use_rslora") else 1.0)


def named_for(module: nn.Module, layers: Layers, part: str, where: str) -> Layers:
    """`layers` under the names that `module`'s own modules have, checked for their shapes.

    Raises ValueError in one sentence for a LoRA of another architecture.
    """
    modules = {n: m for n, m in module.named_modules() if isinstance(getattr(m, "weight", None), Tensor)}
    plain = {name.replace(".base_layer", ""): name for name in modules}
    spelled = {s: name for name in plain for s in _spellings(name, part)}
    unknown = [name for name in layers if name not in spelled]
    if unknown:
        raise ValueError(
            f"{where} is a LoRA of another architecture: the {part} has no module {unknown[0]} "
            f"({len(unknown)} of {len(layers)} are unknown)"
        )
    result = {spelled[name]: layer for name, layer in layers.items()}
    for name, layer in result.items():
        shape = tuple(modules[plain[name]].weight.shape)
        found = (layer.up.shape[0], *layer.down.shape[1:])
        if found != shape:
            raise ValueError(
                f"{where} is a LoRA of another architecture: {name} of the {part} has a weight of {shape}, the LoRA "
                f"is for {found}"
            )
    return result


def _spellings(name: str, part: str) -> list[str]:
    """A module's name as the layouts have it: with dots or underscores, of CLIP with `text_model.` and without."""
    names = [name]
    if part == "text_encoder":
        names += [_CLIP_PREFIX + name, name.removeprefix(_CLIP_PREFIX)]
    return [spelling for n in names for spelling in (n, n.replace(".", "_"))]


def published_name(name: str, part: str) -> str:
    """As published files have it: modules of CLIP's text encoder begin with `text_model.` whatever the version."""
    is_clip = part == "text_encoder" and (".self_attn." in name or ".mlp." in name)
    return _CLIP_PREFIX + name.removeprefix(_CLIP_PREFIX) if is_clip else name


def to_diffusers(parts: Mapping[str, Layers]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of diffusers' layout. `parts` has the names of modules, with dots."""
    tensors, config = {}, {}
    for part, layers in parts.items():
        named = {published_name(name, part): layer for name, layer in layers.items()}
        stem = "lora" if part == "unet" else "lora_linear_layer"
        for name, layer in named.items():
            tensors[f"{part}.{name}.{stem}.down.weight"] = layer.down
            tensors[f"{part}.{name}.{stem}.up.weight"] = layer.up
        own = {_own_name(name): layer for name, layer in named.items()}
        config |= {f"{part}.{key}": value for key, value in peft_options(own).items()}
    return tensors, {METADATA_KEY: json.dumps(config, indent=2, sort_keys=True)}


def _own_name(name: str) -> str:
    """A module's name in today's transformers, which peft's options are matched with."""
    return name.removeprefix(_CLIP_PREFIX)


def peft_options(layers: Layers) -> dict[str, Any]:
    """Arguments of peft's LoraConfig under which these very layers are made, whatever their ranks and alphas."""
    ranks = {name: layer.rank for name, layer in layers.items()}
    alphas = {name: layer.alpha for name, layer in layers.items()}
    rank, alpha = (max(set(v.values()), key=list(v.values()).count) for v in (ranks, alphas))
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{re.escape(n)}": r for n, r in ranks.items() if r != rank},
        "alpha_pattern": {f"^{re.escape(n)}": a for n, a in alphas.items() if a != alpha},
        "target_modules": sorted(layers),
        "lora_dropout": 0.0,
        "bias": "none",
    }


def to_kohya(parts: Mapping[str, Layers]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of kohya's layout."""
    prefixes = {"unet": "lora_unet_", "text_encoder": "lora_te_"}
    tensors = {}
    for part, layers in parts.items():
        for name, layer in layers.items():
            flat = prefixes[part] + published_name(name, part).replace(".", "_")
            tensors[f"{flat}.lora_down.weight"] = layer.down
            tensors[f"{flat}.lora_up.weight"] = layer.up
            tensors[f"{flat}.alpha"] = torch.tensor(layer.alpha)
    ranks = {layer.rank for part in parts.values() for layer in part.values()}
    alphas = {layer.alpha for part in parts.values() for layer in part.values()}
    header = {"ss_network_module": "networks.lora", "ss_base_model_version": "sd_v1"}
    if len(ranks) == len(alphas) == 1:
        header |= {"ss_network_dim": str(ranks.pop()), "ss_network_alpha": str(alphas.pop())}
    return tensors, header


def write_lora(path: Path, parts: Mapping[str, Layers], layout: Layout = "diffusers") -> Path:
    """Write the layers, by part and module name, atomically; returns the path.

    Raises ValueError for an unknown layout.
    """
    from safetensors.torch import save_file

    writers: dict[str, Callable[..., Any]] = {"diffusers": to_diffusers, "kohya": to_kohya}
    if layout not in writers:
        raise ValueError(f"layout {layout!r}: choose {' or '.join(LAYOUTS)}")
    tensors, header = writers[layout](parts)
    contiguous = {n: t.detach().to("cpu").contiguous().clone() for n, t in tensors.items()}
    with atomic_path(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode  # save_file leaves its own files to their owner alone
        save_file(contiguous, str(temporary), metadata={"format": "pt"} | header)
        temporary.chmod(mode)
    return path
