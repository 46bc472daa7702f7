"""A base in fewer bits under a LoRA (QLoRA, Dettmers et al. 2023, arXiv:2305.14314): frozen weights of 16, 8 or 4 bits.

8 and 4 bits are computed by bitsandbytes or torchao, whichever is installed; adapters stay float32.
"""

import importlib.util
from typing import Any, Literal

import torch
from torch import nn

from common.console.terminal import first_line
from diffusion.tuning.options import TunePrecision
from diffusion.tuning.step import autocast_for

BaseBits = Literal[32, 16, 8, 4]
MIN_WEIGHTS = 4096  # smaller matrices are not worth it


def quantize_base_(unet: nn.Module, bits: BaseBits, precision: TunePrecision) -> str:
    """Replace the weights of the linear layers; returns what was done. To be called before adapters are put in.

    Raises ValueError in one sentence where neither package can do it here.
    """
    if bits == 32:
        return "the base is float32"
    device = next(unet.parameters()).device
    with autocast_for(device, precision):  # weights in 16 bits meet inputs in 16 bits under autocast alone
        dtype = nn.functional.linear(*torch.ones(2, 1, 1, device=device)).dtype
    if dtype == torch.float32:
        raise ValueError(
            f"a base of {bits} bits needs computation in 16: --precision bf16 where the machine has it, or fp16"
        )
    for layer in unet.modules():
        if type(layer) in (nn.Linear, nn.Conv2d):  # norms stay float32
            layer.to(dtype)
    name = str(dtype).removeprefix("torch.")
    if bits == 16:
        return f"the base is {name}"
    layers = [
        (parent, leaf, layer)
        for parent in unet.modules()
        for leaf, layer in parent.named_children()
        if type(layer) is nn.Linear and layer.weight.numel() >= MIN_WEIGHTS
    ]
    package, reasons = _usable_package(bits, device)
    if package == "bitsandbytes":
        for parent, leaf, layer in layers:
            setattr(parent, leaf, _bitsandbytes_layer(layer, bits, dtype))
    elif package == "torchao":
        _quantize_by_torchao(unet, {id(layer) for _, _, layer in layers}, bits)
    else:
        raise ValueError(
            f"a base of {bits} bits cannot be computed here: {'; '.join(reasons)}; --base-bits 16 can"
        )
    return f"{len(layers)} linear layers of the base in {bits} bits by {package}, the rest {name}"


def _usable_package(bits: int, device: torch.device) -> tuple[str, list[str]]:
    """The package that computes a small layer here, or "" and why neither does."""
    reasons = []
    for package in ("bitsandbytes", "torchao"):
        if importlib.util.find_spec(package) is None:
            reasons.append(f"{package} is not installed (pip install {package})")
            continue
        try:
            _try_layer(package, bits, device)
        except Exception as error:  # both raise what their compiled parts raise
            reasons.append(f"{package} does not run here ({first_line(error)})")
            continue
        return package, []
    return "", reasons


def _try_layer(package: str, bits: int, device: torch.device) -> None:
    """A gradient through one quantised layer. Raises whatever the package raises."""
    layer = nn.Sequential(nn.Linear(64, 64)).to(device, torch.bfloat16).requires_grad_(False)
    if package == "bitsandbytes":
        layer[0] = _bitsandbytes_layer(layer[0], bits, torch.bfloat16)
    else:
        _quantize_by_torchao(layer, {id(layer[0])}, bits)
    x = torch.ones(2, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
    layer(x).sum().backward()


def _bitsandbytes_layer(layer: nn.Linear, bits: int, dtype: torch.dtype) -> nn.Module:
    """The same layer with packed weights; they are packed by the move to the device."""
    import bitsandbytes as bnb

    sizes: dict[str, Any] = {"bias": layer.bias is not None, "device": "meta"}
    if bits == 4:
        result = bnb.nn.Linear4bit(
            layer.in_features, layer.out_features, compute_dtype=dtype, quant_type="nf4", **sizes
        )
        result.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
    else:
        result = bnb.nn.Linear8bitLt(layer.in_features, layer.out_features, has_fp16_weights=False, **sizes)
        result.weight = bnb.nn.Int8Params(
            layer.weight.data.float(), requires_grad=False, has_fp16_weights=False
        )
    result.bias = layer.bias
    return result.to(layer.weight.device)


def _quantize_by_torchao(module: nn.Module, chosen: set[int], bits: int) -> None:
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    config = Int8WeightOnlyConfig() if bits == 8 else Int4WeightOnlyConfig()
    quantize_(module, config, filter_fn=lambda layer, name: id(layer) in chosen)
