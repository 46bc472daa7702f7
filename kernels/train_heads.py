"""The end of the generator in training on the CPU, in compiled code (csrc/train_heads.cpp): the last norm and the heads
as one function, and cross-entropies of bfloat16 logits. Products as bf16 autocast computes them.
"""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kernels import compiler, train_block
from kernels.compiler import address
from kernels.packing import GROUP
from kernels.structure import Known, named, why_changed

HEADS, CROSS_ENTROPY = Known("dalle.model.Heads"), Known("dalle.losses.CrossEntropy")
ENTROPY_TOLERANCE = 0.01  # of the norm; gradients are rounded to bfloat16
_pointer, _integer = ctypes.c_void_p, ctypes.c_int64


class _Hidden(ctypes.Structure):
    _fields_ = (
        *((name, _pointer) for name in ("x", "gain")),
        *((name, _integer) for name in ("rows", "dim")),
        ("eps", ctypes.c_float),
    )


class _Head(ctypes.Structure):
    _fields_ = (
        *((name, _pointer) for name in ("weight", "rows", "logits", "gradient")),
        *((name, _integer) for name in ("count", "width")),
    )


def _declare(library: ctypes.CDLL) -> None:
    library.heads_forward.argtypes = (_pointer, _pointer, _integer, ctypes.c_int)
    library.heads_backward.argtypes = (_pointer, _pointer, _integer, _pointer, _pointer, ctypes.c_int)
    library.heads_forward.restype = library.heads_backward.restype = None
    logits = (_pointer, _pointer, _integer, _integer)  # and targets, rows, width
    library.entropy_forward.argtypes = (*logits, _pointer, _pointer, ctypes.c_int)
    library.entropy_backward.argtypes = (*logits, _pointer, _pointer, _pointer, ctypes.c_int)
    library.entropy_forward.restype, library.entropy_backward.restype = ctypes.c_bool, None


SOURCE = compiler.Source("train_heads.cpp", (_Hidden, _Head), _declare)


def unavailable_reason() -> str:
    """Why training on this machine is not for the heads, whatever the model; empty where it is."""
    return train_block.unavailable_reason() or compiler.unavailable_reason(SOURCE)


def supports(x: Tensor, norm: nn.Module, weights: Sequence[Tensor]) -> bool:
    """Whether `run_heads` is for these: hidden states in training, and matrices that are all here."""
    if not train_block.is_training_in_bf16(x) or x.dtype != torch.float32 or x.shape[-1] % GROUP:
        return False
    if why_changed(norm, train_block.RMS_NORM):
        return False
    whole = all(w.ndim == 2 and w.dtype == torch.float32 and w.shape[0] % 2 == 0 for w in weights)
    return whole and not unavailable_reason()


def forward(
    heads: nn.Module,
    x: Tensor,
    norm: nn.Module,
    weights: Sequence[Tensor],
    text_len: int,
    text_mask: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """What replaces the `forward` of a Heads: x (B, T + N, D); weights: of images, and of text; text_mask (B, T) bool.
    -> logits of image tokens (B, N, V), and of text (M, V) where it follows."""
    if why_changed(heads, HEADS) or not supports(x, norm, weights):
        return type(heads).forward(heads, x, norm, weights, text_len, text_mask)
    return run_both(x, norm, weights, text_len, text_mask)


class _HeadsFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, eps: float, rows: Sequence[Tensor], x: Tensor, gain: Tensor, *weights: Tensor):
        logits = tuple(
            x.new_empty(len(r), len(w), dtype=torch.bfloat16) for r, w in zip(rows, weights, strict=True)
        )
        gradients = [None] * len(weights)
        train_block.call(
            compiler.load(SOURCE).heads_forward,
            _hidden(x, gain, eps),
            _heads(weights, rows, logits, gradients),
            len(weights),
        )
        ctx.save_for_backward(x, gain, *rows, *weights)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        return logits

    @staticmethod
    def backward(ctx, *dlogits: Tensor | None):
        x, gain, *others = ctx.saved_tensors
        rows, weights = others[: len(dlogits)], others[len(dlogits) :]
        gradients = [
            None if d is None else torch.empty_like(w) for d, w in zip(dlogits, weights, strict=True)
        ]
        used = [i for i, d in enumerate(dlogits) if d is not None]
        given = [dlogits[i].contiguous() for i in used]
        dx, by_gain = torch.empty_like(x), torch.empty_like(gain)
        heads = _heads(
            *([values[i] for i in used] for values in (weights, rows)), given, [gradients[i] for i in used]
        )
        train_block.call(
            compiler.load(SOURCE).heads_backward, _hidden(x, gain, ctx.eps), heads, len(used), dx, by_gain
        )
        return None, None, dx, by_gain, *gradients


def _hidden(x: Tensor, gain: Tensor, eps: float) -> _Hidden:
    return _Hidden(
        address(x, torch.float32), address(gain, torch.float32), x.numel() // x.shape[-1], x.shape[-1], eps
    )


def _heads(
    weights: Sequence[Tensor],
    rows: Sequence[Tensor],
    logits: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
) -> ctypes.Array:
    """What compiled code reads; the tensors must outlive it."""
    each = zip(weights, rows, logits, gradients, strict=True)
    heads = [
        _Head(
            address(w, torch.float32), address(r, torch.long), address(y, torch.bfloat16),
            None if g is None else address(g, torch.float32), len(r), len(w),
        )
        for w, r, y, g in each
    ]  # fmt: skip
    return (_Head * len(heads))(*heads)


def run_heads(
    x: Tensor, gain: Tensor, eps: float, weights: Sequence[Tensor], rows: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Of each head, `F.linear(rms_norm(x)[rows], weight)`.

    x: (R, D) float32; gain: (D,); weights: (V, D) each; rows: (M,) long each, none twice. -> (M, V) bfloat16 each
    """
    weights = [w.contiguous() for w in weights]
    return _HeadsFunction.apply(
        eps, [r.contiguous() for r in rows], x.contiguous(), gain.contiguous(), *weights
    )


def run_both(
    x: Tensor, norm: nn.Module, weights: Sequence[Tensor], text_len: int, text_mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """As `forward`, by compiled code."""
    positions = torch.arange(x.shape[0] * x.shape[1]).view(x.shape[:2])
    rows = [positions[:, text_len:].flatten()]
    if text_mask is not None:
        rows.append(positions[:, :text_len][text_mask])
    image, *text = run_heads(x.flatten(0, 1), norm.weight, norm.eps, list(weights)[: len(rows)], rows)
    return image.view(len(x), -1, image.shape[1]), text[0] if text else None


class _EntropyFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor) -> Tensor:
        losses, lse = torch.empty(2, len(logits)).unbind()
        known = compiler.load(SOURCE).entropy_forward(
            address(logits, torch.bfloat16), address(targets, torch.long), *logits.shape,
            address(losses, torch.float32), address(lse, torch.float32), torch.get_num_threads(),
        )  # fmt: skip
        if not known:
            raise IndexError(f"targets must lie in [0, {logits.shape[1]})")
        ctx.save_for_backward(logits, targets, lse)
        return losses

    @staticmethod
    def backward(ctx, dlosses: Tensor) -> tuple[Tensor, None]:
        logits, targets, lse = ctx.saved_tensors
        dlosses, dlogits = dlosses.contiguous(), torch.empty_like(logits)
        compiler.load(SOURCE).entropy_backward(
            address(logits, torch.bfloat16), address(targets, torch.long), *logits.shape, address(lse, torch.float32),
            address(dlosses, torch.float32), address(dlogits, torch.bfloat16), torch.get_num_threads(),
        )  # fmt: skip
        return dlogits, None


def cross_entropy(module: nn.Module, logits: Tensor, targets: Tensor) -> Tensor:
    """What replaces the `forward` of a CrossEntropy, computed in float32: (M, V), (M,) long -> (M,) float32"""
    compiled = logits.device.type == "cpu" and logits.dtype == torch.bfloat16
    if compiled and not torch.compiler.is_compiling() and not why_changed(module, CROSS_ENTROPY):
        return run_entropy(logits, targets)
    return type(module).forward(module, logits, targets)


def run_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """(M, V) bfloat16, (M,) long -> (M,) float32. Raises IndexError for a target that is none."""
    return _EntropyFunction.apply(logits.contiguous(), targets.contiguous())


def heads_mismatch(heads: nn.Module) -> str:
    """Compares the heads forward and back with the module's own in float32; says what differs."""
    generator = torch.Generator().manual_seed(1)
    batch, text_len, length, dim = 2, 5, 14, 64
    norm = train_block.randomised(named(train_block.RMS_NORM.name)(dim))
    x = torch.randn(batch, length, dim, generator=generator) + 0.5
    weights = [
        (torch.randn(width, dim, generator=generator) / dim**0.5).requires_grad_() for width in (96, 50)
    ]
    mask = torch.ones(batch, text_len, dtype=torch.bool)
    mask[1, 2:] = False

    def passes(compute) -> dict[str, Tensor]:
        given = x.clone().requires_grad_()
        logits = compute(given, norm, weights, text_len, mask)
        total = sum((y.float() * y.detach().float().cos()).sum() for y in logits)
        gradients = torch.autograd.grad(total, [given, norm.weight, *weights])
        names = (
            "image logits",
            "text logits",
            *(f"a gradient ({n})" for n in ("input", "norm", "image", "text")),
        )
        return dict(zip(names, [*(y.detach() for y in logits), *gradients], strict=True))

    plain = train_block.randomised(heads)
    exact = passes(lambda *inputs: type(plain).forward(plain, *inputs))
    return train_block.largest_difference(passes(run_both), exact, train_block.TOLERANCE)


def entropy_mismatch(module: nn.Module) -> str:
    """Compares cross-entropies and their gradients with the module's own; says what differs."""
    generator = torch.Generator().manual_seed(1)
    logits = (3 * torch.randn(9, 50, generator=generator)).bfloat16()
    targets = torch.randint(50, (9,), generator=generator)

    def passes(compute) -> dict[str, Tensor]:
        given = logits.clone().requires_grad_()
        losses = compute(given, targets)
        (gradient,) = torch.autograd.grad(losses.sum(), given)
        return {"losses": losses.detach(), "the gradient": gradient.float()}

    exact = passes(lambda *inputs: type(module).forward(module, *inputs))
    return train_block.largest_difference(passes(run_entropy), exact, ENTROPY_TOLERANCE)
