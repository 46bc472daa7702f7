"""LoRA (Hu et al. 2021, arXiv:2106.09685) on the UNet and the text encoder of a Stable Diffusion pipeline, by peft.

What is added to a weight W (out, in) is alpha / r * B A with A (r, in) and B (out, r). Adapters are put in for
training, taken out as layers for a file, loaded with weights, or merged into the base for good.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusion.lora.formats import PARTS, Layers, LoraLayer, find_file, named_for, peft_options, read_lora

UNET_TARGETS = ("to_k", "to_q", "to_v", "to_out.0")
CLIP_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
BERT_TARGETS = ("query", "key", "value", "dense")
TRAINED = "default"  # peft's name of the adapter that is trained


@dataclass(frozen=True)
class LoraOptions:
    """Size and place of the adapter."""

    rank: int = 8
    """Rank r of the update."""
    alpha: float = 16.0
    """The update is scaled by alpha / rank."""
    targets: tuple[str, ...] = UNET_TARGETS
    """Modules of the UNet, by the end of their names; proj_in, proj_out, ff.net.2, conv1 ... may be added."""
    dropout: float = 0.1
    """Dropout before the first factor, in training."""
    text_encoder: bool = False
    """Train an adapter of the text encoder too."""
    text_targets: tuple[str, ...] = ()
    """Modules of the text encoder; empty: q_proj k_proj v_proj out_proj of CLIP, query key value dense of BERT."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, not {self.rank}")
        if self.alpha <= 0:
            raise ValueError(f"alpha must be above 0, not {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), not {self.dropout}")
        if not self.targets:
            raise ValueError("targets must name at least one module of the UNet, such as to_q")
        if self.text_targets and not self.text_encoder:
            raise ValueError("text_targets have no effect without text_encoder: set --lora.text-encoder True")


def add_adapter(module: nn.Module, options: LoraOptions, part: str) -> list[nn.Parameter]:
    """Put a fresh adapter into the UNet or the text encoder, freeze the rest; returns what is trained, float32.

    B starts at zero, so nothing changes yet. Raises ValueError for targets that the module does not have.
    """
    from peft import LoraConfig

    targets = options.targets if part == "unet" else options.text_targets or text_targets(module)
    found = [n for n, _ in module.named_modules() if n.endswith(tuple(f".{t}" for t in targets))]
    missing = [t for t in targets if not any(n.endswith(f".{t}") for n in found)]
    if missing:
        raise ValueError(
            f"the {part} has no module {missing[0]!r}: --lora.targets are the ends of module names"
        )
    module.requires_grad_(False)
    # of BERT: its output is not read, so no gradient ever comes there
    pooler = [n for n in found if n.startswith("pooler.")] or None
    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        target_modules=list(targets),
        exclude_modules=pooler,
        lora_dropout=options.dropout,
        bias="none",
        init_lora_weights="gaussian",
    )
    module.add_adapter(config, adapter_name=TRAINED)
    trained = [p for p in module.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    return trained


def text_targets(module: nn.Module) -> tuple[str, ...]:
    """Raises ValueError for a text encoder that is neither CLIP nor BERT."""
    names = {name.rpartition(".")[2] for name, _ in module.named_modules()}
    for targets in (CLIP_TARGETS, BERT_TARGETS):
        if names.issuperset(targets):
            return targets
    raise ValueError(
        f"the text encoder {type(module).__name__} is neither CLIP nor BERT: name its modules with --lora.text-targets"
    )


def adapted(module: nn.Module, adapter: str = TRAINED) -> Iterator[tuple[str, nn.Module]]:
    """(name, peft layer) of each module that has the adapter."""
    from peft.tuners.lora import LoraLayer as PeftLayer

    for name, layer in module.named_modules():
        if isinstance(layer, PeftLayer) and adapter in layer.lora_A:
            yield name, layer


def layers_of(module: nn.Module, adapter: str = TRAINED) -> Layers:
    """The adapter's factors by module name, copied to the CPU."""
    return {
        name: LoraLayer(
            layer.lora_A[adapter].weight.detach().to("cpu", copy=True),
            layer.lora_B[adapter].weight.detach().to("cpu", copy=True),
            layer.scaling[adapter] * layer.r[adapter],
        )
        for name, layer in adapted(module, adapter)
    }


def parts_of(pipeline: Any, adapter: str = TRAINED) -> dict[str, Layers]:
    """The adapter in all parts of a pipeline, as `lora_formats.write_lora` takes it."""
    found = {part: layers_of(getattr(pipeline, part), adapter) for part in PARTS}
    return {part: layers for part, layers in found.items() if layers}


@dataclass(frozen=True)
class LoraSpec:
    """One adapter at inference."""

    file: Path
    weight: float = 1.0

    @classmethod
    def parse(cls, text: str) -> "LoraSpec":
        """`FILE`, or `FILE:WEIGHT` as in WebUI's prompts. Raises FileNotFoundError or ValueError."""
        name, colon, number = text.rpartition(":")
        if colon and not Path(text).exists():
            try:
                return cls(find_file(name), float(number))
            except ValueError as error:
                raise ValueError(f"the weight of the LoRA {text!r} is no number: write FILE:0.8") from error
        return cls(find_file(text))


def load_loras(pipeline: Any, specs: Sequence[LoraSpec]) -> list[str]:
    """Load adapters and switch them on with their weights; returns one line about each.

    They can be switched off by diffusers' own `disable_lora` and `unload_lora_weights`. Raises ValueError for one of
    another architecture, before any is loaded.
    """
    read = [_read_for(pipeline, spec) for spec in specs]
    names = [f"lora_{i}" for i in range(len(specs))]
    for name, parts in zip(names, read, strict=True):
        for part, layers in parts.items():
            _inject(pipeline, part, layers, name)
    if names:
        pipeline.set_adapters(names, [spec.weight for spec in specs])
    return [_describe(pipeline, spec, parts) for spec, parts in zip(specs, read, strict=True)]


def _read_for(pipeline: Any, spec: LoraSpec) -> dict[str, Layers]:
    file = read_lora(spec.file)
    return {
        part: named_for(getattr(pipeline, part), layers, part, str(spec.file))
        for part, layers in file.parts.items()
    }


def _inject(pipeline: Any, part: str, layers: Layers, name: str) -> None:
    """By diffusers' own loaders, in the names that each of them reads."""
    down, up = ("lora_A", "lora_B") if part == "unet" else ("lora_linear_layer.down", "lora_linear_layer.up")
    tensors = {f"{part}.{n}.{down}.weight": layer.down for n, layer in layers.items()}
    tensors |= {f"{part}.{n}.{up}.weight": layer.up for n, layer in layers.items()}
    options = {f"{part}.{key}": value for key, value in peft_options(layers).items()}
    load = pipeline.load_lora_into_unet if part == "unet" else pipeline.load_lora_into_text_encoder
    module = getattr(pipeline, part)
    load(tensors, None, module, adapter_name=name, metadata=options, _pipeline=pipeline)


def _describe(pipeline: Any, spec: LoraSpec, parts: dict[str, Layers]) -> str:
    norms = {part: relative_norm(getattr(pipeline, part), layers) for part, layers in parts.items()}
    said = ", ".join(f"{len(parts[p])} layers of the {p}, |BA|/|W| {n:.2e}" for p, n in norms.items())
    return f"LoRA {spec.file} at weight {spec.weight:g}: {said}"


@torch.no_grad()
def fuse_(pipeline: Any, specs: Sequence[LoraSpec]) -> list[str]:
    """Add adapters to the weights of the base for good: W += weight * alpha / r * B A, computed in float32.

    Returns one line about each; raises ValueError for one of another architecture, before anything changes.
    """
    read = [_read_for(pipeline, spec) for spec in specs]
    said = [_describe(pipeline, spec, parts) for spec, parts in zip(specs, read, strict=True)]
    for spec, parts in zip(specs, read, strict=True):
        for part, layers in parts.items():
            modules = dict(getattr(pipeline, part).named_modules())
            for name, layer in layers.items():
                weight = modules[name].weight
                merged = weight.float() + spec.weight * layer.delta().to(weight.device)
                weight.copy_(merged.to(weight.dtype))
    return said


def factored_norm(down: Tensor, up: Tensor) -> float:
    """Frobenius norm of up @ down without forming it: the trace of (up^T up)(down down^T)."""
    down, up = down.detach().double().flatten(1), up.detach().double().flatten(1)
    return float(((up.T @ up) * (down @ down.T)).sum().clamp(min=0).sqrt())


def relative_norm(module: nn.Module, layers: Layers) -> float:
    """The norm of all updates over that of the weights that they change."""
    modules = dict(module.named_modules())
    update = sum((layer.scale * factored_norm(layer.down, layer.up)) ** 2 for layer in layers.values())
    base = sum(_norm(modules[name]) ** 2 for name in layers)
    return (update / base) ** 0.5 if base else 0.0


def trained_norm(module: nn.Module, adapter: str = TRAINED, base: float | None = None) -> float:
    """`relative_norm` of an adapter that is being trained, without copies of its factors.

    base: `base_norm` of the module, which training does not change.
    """
    base = base_norm(module, adapter) if base is None else base
    update = 0.0
    for _, layer in adapted(module, adapter):
        norm = factored_norm(layer.lora_A[adapter].weight, layer.lora_B[adapter].weight)
        update += (layer.scaling[adapter] * norm) ** 2
    return update**0.5 / base if base else 0.0


def base_norm(module: nn.Module, adapter: str = TRAINED) -> float:
    """The norm of all weights that the adapter changes."""
    return sum(_norm(layer) ** 2 for _, layer in adapted(module, adapter)) ** 0.5


def _norm(module: nn.Module) -> float:
    """Of a module's weight; of a quantised one as its module computes with it."""
    from peft.utils.integrations import dequantize_module_weight

    module = getattr(module, "base_layer", module)
    weight = module.weight
    if type(weight) is not nn.Parameter:
        weight = (
            weight.dequantize() if hasattr(weight, "tensor_data_names") else dequantize_module_weight(module)
        )
    return float(weight.detach().float().norm())
