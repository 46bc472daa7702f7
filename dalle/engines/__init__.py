"""How a generator is run when it samples: the options, and the forms of a model that the sampling loop takes.

    torch       the model as it is, for any device and any model
    cpu_kernel  cpu_kernel.py: a step is one call of code compiled for the CPU, in 16 or 8 bits
    cuda_graph  cuda_graph.py: the decode step replayed as CUDA graphs, one for each quarter of the cache
    packed      packed.py: weights packed for the CPU, in 32, 16 or 8 bits, where there is no compiler

Each gives the same bytes for the same seed on the same machine. One rounds otherwise than another, so under another
one a few codes of an image differ: what was taken stands in images.jsonl. The file of an engine is imported when it
is taken.
"""

import copy

import torch
from torch import nn

from common.log import say
from common.precision import has_native_bf16
from dalle.engines.eager import TorchDecoder
from dalle.model import Dalle
from dalle.options import Engine, FastOptions, WeightType
from dalle.sampling import Generator
from kernels import OFF, accelerate

__all__ = ["Engine", "FastOptions", "WeightType", "prepare", "resolve_options"]


def resolve_options(model: nn.Module, options: FastOptions) -> FastOptions:
    """`options` with what `auto` stands for here. Raises ValueError for what cannot be."""
    if not isinstance(model, Dalle):
        if options.engine not in ("auto", "torch") or options.weights not in ("auto", "float32"):
            raise ValueError("an imported generator is run as it is: leave the fast options alone")
        return FastOptions("torch", "float32", options.kernels)
    device, engine, weights = next(model.parameters()).device, options.engine, options.weights
    if weights == "int8" and device.type != "cpu":
        raise ValueError(f"int8 weights are for CPUs, the model is on {device}")
    if engine == "auto":
        others = _engine_of_cpu(model, options) if device.type == "cpu" else "torch"  # such as Apple's GPUs
        engine = "cuda_graph" if device.type == "cuda" else others
    if weights == "auto":
        weights = "bfloat16" if engine == "cpu_kernel" or has_native_bf16(device) else "float32"
    return FastOptions(engine, weights, options.kernels)


def prepare(model: nn.Module, options: FastOptions) -> Generator:
    """The form of `model` to sample with. The model's weights stay as they are; with kernels, its own steps are
    accelerated in place (`kernels.accelerate`). Raises ValueError for what cannot be."""
    device, options = next(model.parameters()).device, resolve_options(model, options)
    if not isinstance(model, Dalle):
        return TorchDecoder(model)
    engine, dtype = options.engine, getattr(torch, options.weights)
    if engine in ("cpu_kernel", "packed") and device.type != "cpu":
        raise ValueError(
            f"the {engine} engine is for CPUs, the model is on {device}: use torch or cuda_graph"
        )
    if engine == "cpu_kernel":
        from dalle.engines.cpu_kernel import CpuKernelDecoder

        return CpuKernelDecoder(model, dtype)
    if engine == "packed":
        from dalle.engines.packed import PackedDecoder

        return PackedDecoder(model, dtype)
    if engine == "torch":
        model = _as_type(model, dtype)
        report = OFF if options.kernels == "off" else accelerate(model)
        return TorchDecoder(model, report)
    if engine == "cuda_graph":
        if device.type != "cuda":
            raise ValueError(f"CUDA graphs need a GPU, the model is on {device}")
        from dalle.engines.cuda_graph import CudaGraphDecoder

        return CudaGraphDecoder(_as_type(model, dtype))
    raise ValueError(f"unknown engine {engine!r}")


def _engine_of_cpu(model: Dalle, options: FastOptions) -> Engine:
    from dalle.engines import cpu_kernel, packed
    from kernels.compiler import level

    weights = options.weights
    if options.kernels == "auto" and weights != "float32" and cpu_kernel.fits(model.config) and level():
        if not (reason := cpu_kernel.unsupported_reason(model)):
            return "cpu_kernel"
        say(f"sampling up to seven times slower, without the compiled step: {reason}")
    dtype = torch.float32 if weights == "auto" else getattr(torch, weights)
    if not packed.is_available(dtype) or packed.PackedDecoder.changed_reason(model):
        return "torch"
    return "packed"


def _as_type(model: Dalle, dtype: torch.dtype) -> Dalle:
    return model if model.image_embed.weight.dtype == dtype else copy.deepcopy(model).to(dtype)
