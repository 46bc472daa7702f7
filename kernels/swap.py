"""`accelerate(model)`: a script switches kernels on, and its log says which module is computed by what.

A kernel takes an instance whose type is exactly the one it was written for, whose layers are too, and whose results and
gradients on a small random input it reproduces; it then stands as `forward` of that instance. Names of parameters,
state dicts and classes stay as they are, and the model's own files know nothing of it. Everything else stays with
PyTorch, and the report says why.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from common.log import say
from kernels import autograd, compiler, encode, train_block, train_heads
from kernels.report import COMPILED, WRITTEN, Report, Taken
from kernels.structure import Known, named, why_changed


@dataclass(frozen=True)
class Kernel:
    """What stands for the `forward` of one class."""

    name: str
    """Of the modules, in the plural."""
    known: Known
    compute: Callable[..., Any]
    """(module, *inputs): decides at each call whether the inputs are for it, and calls the module's own code if not."""
    mismatch: Callable[[nn.Module], str]
    """How its results differ from those of the module; empty where they do not."""
    made_by: str = COMPILED
    unavailable_reason: Callable[[], str] = lambda: ""
    """Why this machine is not for it."""
    unsupported_reason: Callable[[nn.Module], str] = lambda module: ""
    """Why a module of exactly this type is not for it."""
    needs_bf16: bool = False


class Swapped:
    """A `forward` of an instance. Goes along with copies of its module."""

    def __init__(self, kernel: str, compute: Callable[..., Any], module: nn.Module) -> None:
        self.kernel, self.compute, self.module = kernel, compute, module

    def __call__(self, *inputs: Any) -> Any:
        return self.compute(self.module, *inputs)


def accelerate(modules: tuple[nn.Module, ...], in_bf16: bool, insist: bool) -> Report:
    """See `kernels.accelerate`."""
    device = next((p.device for module in modules for p in module.parameters()), torch.device("cpu"))
    if device.type != "cpu":
        return Report(note=f"for CPUs, the model is on {device}")
    parts = list(dict.fromkeys(part for module in modules for part in module.modules()))
    taken = [_swap(kernel, parts, in_bf16) for kernel in KERNELS] + [_swap_encoders(parts, in_bf16, insist)]
    return Report(tuple(t for t in taken if t.total), level=compiler.level())


def _swap(kernel: Kernel, parts: list[nn.Module], in_bf16: bool) -> Taken:
    candidates = [part for part in parts if _derives_from(part, kernel.known.name)]
    unavailable = ""
    if candidates:
        unavailable = (
            "computed in float32" if kernel.needs_bf16 and not in_bf16 else kernel.unavailable_reason()
        )
    reasons, count = ([unavailable] if unavailable else []), 0
    compared: dict[Any, str] = {}
    for module in candidates if not unavailable else ():
        reason = why_changed(module, kernel.known) or kernel.unsupported_reason(module)
        if not reason:
            widths = tuple(tuple(p.shape) for p in module.parameters())
            if widths not in compared:
                compared[widths] = _compare(kernel.name, kernel.mismatch, module)
            reason = compared[widths]
        if reason:
            reasons.append(reason)
            if isinstance(module.__dict__.get("forward"), Swapped):
                del module.forward
            continue
        module.forward = Swapped(kernel.name, kernel.compute, module)
        count += 1
    return Taken(kernel.name, kernel.made_by, count, len(candidates), tuple(dict.fromkeys(reasons)))


def _derives_from(module: nn.Module, name: str) -> bool:
    return any(f"{kind.__module__}.{kind.__qualname__}" == name for kind in type(module).__mro__)


def _compare(name: str, mismatch: Callable[[nn.Module], str], module: nn.Module) -> str:
    """Loud where the code of a module is no longer what its kernel computes."""
    with torch.enable_grad(), torch.autocast("cpu", enabled=False):
        try:
            reason = mismatch(module)
        except (
            AttributeError,
            TypeError,
            ValueError,
            RuntimeError,
        ) as error:  # the module has other inputs, say
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
    if reason:
        say(
            f"warning: a kernel is not used: {type(module).__qualname__} does not compute what the kernel for {name} "
            f"was written for ({reason}); PyTorch computes it"
        )
        return f"not what the kernel computes: {reason}"
    return ""


def _swap_encoders(parts: list[nn.Module], in_bf16: bool, insist: bool) -> Taken:
    """Encoders of image tokenizers, for finished weights: they are packed now."""
    candidates = [part for part in parts if _derives_from(part, "vq.model.ImageTokenizer")]
    reasons, count = [], 0
    for tokenizer in candidates:
        if reason := encoder_refusal(tokenizer, in_bf16, insist):
            if insist:
                raise ValueError(f"compiled encoding cannot run here: {reason}")
            reasons.append(reason)
            continue
        tokenizer.encode_ids = encode.EncodeIds(tokenizer)
        count += 1
    return Taken("image encoders", COMPILED, count, len(candidates), tuple(dict.fromkeys(reasons)))


def encoder_refusal(tokenizer: nn.Module, in_bf16: bool, insist: bool = False) -> str:
    """Why compiled code does not encode for an ImageTokenizer; empty where it does."""
    if not in_bf16:
        return "computed in float32"
    if compiler.level() and compiler.prefers_torch() and not insist:
        return "PyTorch multiplies faster on this CPU, with AMX"
    reason = encode.unavailable_reason() or encode.unsupported_reason(tokenizer)
    return reason or _compare("image encoders", encode.mismatch, tokenizer)


# --- kernels in PyTorch's own operators compare themselves ---------------------------------------------------------

EXACT = 1e-3  # of the norm: float32 both


def _norm_mismatch(module: nn.Module) -> str:
    probe = train_block.randomised(module)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, probe.weight.shape[0], generator=generator) + 0.5
    return _difference(probe, lambda given: autograd.rms_norm(probe, given), x)


def _attention_mismatch(module: nn.Module) -> str:
    probe = train_block.randomised(module)
    visible = torch.ones(2, 4, dtype=torch.bool)
    visible[1, 2:] = False
    mask = named("dalle.attention.CausalMask")(visible, 11)
    q, k, v = torch.randn(3, 2, 3, 11, 8, generator=torch.Generator().manual_seed(1)).unbind()
    return _difference(probe, lambda given: autograd.attend(probe, given, k, v, mask), q, k, v, mask)


def _difference(probe: nn.Module, compute: Callable[[Tensor], Tensor], first: Tensor, *more: Any) -> str:
    """Between a kernel and a module's own code: the result and the gradient of the first input."""

    def passes(function: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        given = first.clone().requires_grad_()
        y = function(given)
        (gradient,) = torch.autograd.grad((y * y.detach().cos()).sum(), given)
        return {"its result": y.detach(), "a gradient": gradient}

    exact = passes(lambda given: type(probe).forward(probe, given, *more))
    return train_block.largest_difference(passes(compute), exact, EXACT)


def _branch_mismatch(module: nn.Module) -> str:
    """Random both: what they keep, and the mean of what they make of ones."""
    ones = torch.ones(64, 32, 16)
    training = module.training
    module.train()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            found, exact = autograd.drop_branch(module, ones), type(module).forward(module, ones)
    finally:
        module.train(training)
    by_sample = ((y.abs().amax((1, 2)) == 0).float().mean() for y in (found, exact))
    dropped, expected = by_sample
    zeros = [(y == 0).float().mean() for y in (found, exact)]
    if (
        abs(dropped - expected) > 0.3
        or abs(zeros[0] - zeros[1]) > 0.3
        or abs(found.mean() - exact.mean()) > 0.3
    ):
        return f"drops {float(zeros[0]):.0%}, the module {float(zeros[1]):.0%}"
    return ""


KERNELS = (
    Kernel(
        "blocks", train_block.BLOCK, train_block.forward, train_block.mismatch, COMPILED,
        train_block.unavailable_reason, train_block.unsupported_reason, needs_bf16=True,
    ),
    Kernel(
        "heads", train_heads.HEADS, train_heads.forward, train_heads.heads_mismatch, COMPILED,
        train_heads.unavailable_reason, needs_bf16=True,
    ),
    Kernel(
        "cross-entropies", train_heads.CROSS_ENTROPY, train_heads.cross_entropy, train_heads.entropy_mismatch,
        COMPILED, partial(compiler.unavailable_reason, train_heads.SOURCE), needs_bf16=True,
    ),
    Kernel(
        "attentions", Known("dalle.attention.CausalAttention"), autograd.attend, _attention_mismatch, WRITTEN
    ),
    Kernel("norms", train_block.RMS_NORM, autograd.rms_norm, _norm_mismatch, WRITTEN),
    Kernel("branches", Known("dalle.model.BranchDropout"), autograd.drop_branch, _branch_mismatch, WRITTEN),
)  # fmt: skip
