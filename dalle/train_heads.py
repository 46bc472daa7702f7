"""The end of the generator in training on the CPU, in compiled code (train_heads.cpp): the last norm and the heads as
one function, and cross-entropies of bfloat16 logits. Products as bf16 autocast computes them.
"""

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import native
from dalle import train_native

SOURCE = Path(__file__).with_name("train_heads.cpp")
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


def is_available() -> bool:
    """Whether this machine can run it."""
    return train_native.is_available() and not native.why_not(SOURCE)


@functools.cache
def _library() -> ctypes.CDLL:
    library = native.library(SOURCE)
    library.heads_forward.argtypes = (_pointer, _pointer, _integer, ctypes.c_int)
    library.heads_backward.argtypes = (_pointer, _pointer, _integer, _pointer, _pointer, ctypes.c_int)
    library.heads_forward.restype = library.heads_backward.restype = None
    logits = (_pointer, _pointer, _integer, _integer)  # and targets, rows, width
    library.entropy_forward.argtypes = (*logits, _pointer, _pointer, ctypes.c_int)
    library.entropy_backward.argtypes = (*logits, _pointer, _pointer, _pointer, ctypes.c_int)
    library.entropy_forward.restype, library.entropy_backward.restype = ctypes.c_bool, None
    return library


def takes(x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether `run_heads` is for these: hidden states in training, and matrices that are all here."""
    if not train_native.is_training_in_bf16(x) or x.dtype != torch.float32 or x.shape[-1] % native.GROUP:
        return False
    whole = all(w.ndim == 2 and w.dtype == torch.float32 and w.shape[0] % 2 == 0 for w in weights)
    return whole and is_available()


class _HeadsFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, eps: float, rows: Sequence[Tensor], x: Tensor, gain: Tensor, *weights: Tensor):
        logits = tuple(
            x.new_empty(len(r), len(w), dtype=torch.bfloat16) for r, w in zip(rows, weights, strict=True)
        )
        gradients = [None] * len(weights)
        train_native.call(
            _library().heads_forward,
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
        train_native.call(_library().heads_backward, _hidden(x, gain, ctx.eps), heads, len(used), dx, by_gain)
        return None, None, dx, by_gain, *gradients


def _hidden(x: Tensor, gain: Tensor, eps: float) -> _Hidden:
    return _Hidden(x.data_ptr(), gain.data_ptr(), x.numel() // x.shape[-1], x.shape[-1], eps)


def _heads(
    weights: Sequence[Tensor],
    rows: Sequence[Tensor],
    logits: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
) -> ctypes.Array:
    """What compiled code reads; the tensors must outlive it."""
    each = zip(weights, rows, logits, gradients, strict=True)
    heads = [
        _Head(w.data_ptr(), r.data_ptr(), y.data_ptr(), None if g is None else g.data_ptr(), len(r), len(w))
        for w, r, y, g in each
    ]
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
    """Logits of image tokens (B, N, V), and of text (M, V) where it follows; None without `text_mask`.

    x: (B, T + N, D); weights: of images, and of text; text_mask: (B, T) bool. By compiled code where it is for these.
    """
    if not takes(x, weights):
        text = None if text_mask is None else F.linear(norm(x[:, :text_len][text_mask]), weights[1])
        return F.linear(norm(x[:, text_len:]), weights[0]), text
    places = torch.arange(x.shape[0] * x.shape[1]).view(x.shape[:2])
    rows = [places[:, text_len:].flatten()]
    if text_mask is not None:
        rows.append(places[:, :text_len][text_mask])
    image, *text = run_heads(x.flatten(0, 1), norm.weight, norm.eps, weights, rows)
    return image.view(len(x), -1, image.shape[1]), text[0] if text else None


class _EntropyFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor) -> Tensor:
        losses, lse = torch.empty(2, len(logits)).unbind()
        known = _library().entropy_forward(
            logits.data_ptr(), targets.data_ptr(), *logits.shape, losses.data_ptr(), lse.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        if not known:
            raise IndexError(f"targets must lie in [0, {logits.shape[1]})")
        ctx.save_for_backward(logits, targets, lse)
        return losses

    @staticmethod
    def backward(ctx, dlosses: Tensor) -> tuple[Tensor, None]:
        logits, targets, lse = ctx.saved_tensors
        dlosses, dlogits = dlosses.contiguous(), torch.empty_like(logits)
        _library().entropy_backward(
            logits.data_ptr(), targets.data_ptr(), *logits.shape, lse.data_ptr(), dlosses.data_ptr(),
            dlogits.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return dlogits, None


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Of each row, computed in float32: (M, V), (M,) long -> (M,) float32"""
    compiled = logits.device.type == "cpu" and logits.dtype == torch.bfloat16
    if compiled and not torch.compiler.is_compiling() and is_available():
        return _EntropyFunction.apply(logits.contiguous(), targets.contiguous())
    return F.cross_entropy(logits.float(), targets, reduction="none")
