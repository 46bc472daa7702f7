"""A block's forward and backward passes as two calls of compiled code (train_native.cpp), for training on x86 CPUs with
AVX512-BF16 or AVX2: the same function as `dalle.model.Block`, in bfloat16 products as autocast computes them.

What the operators of PyTorch cost besides their work falls away: each sequence stays in the cache of its core.
"""

import ctypes
import functools
import itertools
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from common import native
from common.log import say
from common.precision import trains_in_bf16

if TYPE_CHECKING:
    from dalle.model import Block

SOURCE = Path(__file__).with_name("train_native.cpp")
MOST_HEAD_DIM = 128  # eight registers
MOST_SUMS = 2**29  # gradients of all threads: 2 GiB
_one_at_a_time = threading.Lock()
_pointer, _integer = ctypes.c_void_p, ctypes.c_int64


class _Shape(ctypes.Structure):
    _fields_ = (
        *((name, _integer) for name in ("batch", "length", "dim", "heads", "kv_heads", "head_dim", "ffn")),
        ("eps", ctypes.c_float),
        ("head_eps", ctypes.c_float),
    )


class _Weights(ctypes.Structure):
    _fields_ = tuple(
        (name, _pointer)
        for name in ("qkv", "out", "gate_up", "down", "attention_norm", "ffn_norm", "q_norm", "k_norm")
    )


class _Input(ctypes.Structure):
    _fields_ = tuple((name, _pointer) for name in ("x", "table", "bias", "attention_mask", "ffn_mask"))


class _Kept(ctypes.Structure):
    _fields_ = tuple(
        (name, _pointer) for name in ("qkv", "gate_up", "attended", "first", "last", "scales", "lse")
    )


@functools.cache
def is_available() -> bool:
    """Whether this machine can run it; says so where only a compiler is missing."""
    if not native.level():
        return False
    if reason := native.why_not(SOURCE):
        say(f"training slower, with PyTorch's operators: {reason}")
    return not reason


def is_training_in_bf16(x: Tensor) -> bool:
    """Whether gradients are wanted of what is computed from `x` in bf16 on a CPU without AMX; see `autocast`."""
    if x.device.type != "cpu" or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return trains_in_bf16() and not native.is_outdone()


def takes(block: "Block", x: Tensor) -> bool:
    """Whether `run_block` is what `block(x)` should do.

    It is for training under bf16 autocast on such a CPU, without AMX, with a sequence or more for every thread, whole
    registers, all weights here (ZeRO-3 keeps parts), no attention weights dropped, and gradients of the matrices that
    every thread can have for itself.
    """
    attention, ffn, threads = block.attention, block.ffn, torch.get_num_threads()
    if not is_training_in_bf16(x) or (block.training and attention.dropout) or len(x) < threads:
        return False
    matrices = attention.qkv.weight, attention.out.weight, ffn.gate_up.weight, ffn.out.weight
    if x.dtype != torch.float32 or any(m.ndim != 2 or m.dtype != torch.float32 for m in matrices):
        return False
    if any(width % native.GROUP for width in (x.shape[2], attention.head_dim, ffn.out.in_features)):
        return False
    if attention.head_dim > MOST_HEAD_DIM:
        return False
    return threads * sum(m.numel() for m in matrices) <= MOST_SUMS and is_available()


@functools.cache
def _library() -> ctypes.CDLL:
    library = native.library(SOURCE)
    library.block_forward.argtypes = (*(_pointer,) * 5, ctypes.c_int)
    library.block_backward.argtypes = (*(_pointer,) * 7, ctypes.c_int)
    library.block_forward.restype = library.block_backward.restype = None
    return library


class _Buffers:
    """Memory that forward passes fill and backward passes give back, so that no step needs fresh pages: those cost more
    than some of the products."""

    def __init__(self) -> None:
        self._free: list[Tensor] = []

    def take(self, size: int) -> Tensor:
        """-> (size,) bytes"""
        if self._free:
            buffer = self._free.pop()
            if buffer.untyped_storage().nbytes() - buffer.storage_offset() >= size:
                return buffer.as_strided((size,), (1,))
        return native.memory(size)

    def give_back(self, buffer: Tensor) -> None:
        self._free.append(buffer)


_buffers = _Buffers()


def _kept_sizes(s: _Shape) -> list[int]:
    """Bytes of what a forward pass keeps, in the order of `_Kept`, whole cache lines each."""
    places = s.batch * s.length
    halves = ((s.heads + 2 * s.kv_heads) * s.head_dim, 2 * s.ffn, s.heads * s.head_dim, s.dim, s.dim)
    return [
        -(-size // 64) * 64 for size in (*(2 * n * places for n in halves), 8 * places, 4 * s.heads * places)
    ]


def _kept(s: _Shape, buffer: Tensor) -> _Kept:
    """The parts of a buffer."""
    return _Kept(*(buffer.data_ptr() + start for start in itertools.accumulate([0, *_kept_sizes(s)[:-1]])))


class _BlockFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, shape: _Shape, inputs: tuple[Tensor | None, ...], x: Tensor, *weights: Tensor) -> Tensor:
        """inputs: the rotary table, the bias of keys and the masks of both branches"""
        buffer = _buffers.take(sum(_kept_sizes(shape)))
        y = torch.empty_like(x)
        call(
            _library().block_forward, shape, _pointers(_Weights, weights), _pointers(_Input, (x, *inputs)),
            _kept(shape, buffer), y,
        )  # fmt: skip
        ctx.save_for_backward(buffer, *inputs, *weights)  # so that gradient checkpointing lets go of it
        ctx.shape, ctx.is_spent = shape, False
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.is_spent:
            raise RuntimeError("a compiled block goes back once: what its forward pass kept is gone")
        buffer, *saved = ctx.saved_tensors
        count = len(_Input._fields_) - 1
        inputs, weights = saved[:count], saved[count:]
        gradients = [torch.empty_like(w) for w in weights]
        dy = dy.contiguous()
        dx = torch.empty_like(dy)
        call(
            _library().block_backward, ctx.shape, _pointers(_Weights, weights), _pointers(_Input, (None, *inputs)),
            _kept(ctx.shape, buffer), dy, dx, _pointers(_Weights, gradients),
        )  # fmt: skip
        _buffers.give_back(buffer)
        ctx.is_spent = True
        return None, None, dx, *gradients


def _pointers(kind: type, tensors: Sequence[Tensor | None]) -> ctypes.Structure:
    return kind(*(None if t is None else t.data_ptr() for t in tensors))


def call(function, *arguments: ctypes.Structure | ctypes.Array | Tensor | int) -> None:
    """Of compiled code, with addresses of tensors and structures; one at a time, since packed weights are shared."""

    def place(a) -> int:
        return a.data_ptr() if isinstance(a, Tensor) else a if isinstance(a, int) else ctypes.addressof(a)

    with _one_at_a_time:
        function(*map(place, arguments), torch.get_num_threads())


def run_block(block: "Block", x: Tensor, table: Tensor, bias: Tensor | None) -> Tensor:
    """`block(x)`: x (B, L, D) float32; table (2, L, K) float32; bias (B, L) float32, -inf at padding, or None."""
    a, f = block.attention, block.ffn
    shape = _Shape(
        x.shape[0], x.shape[1], x.shape[2], a.num_heads, a.num_kv_heads, a.head_dim, f.out.in_features,
        block.attention_norm.eps, a.q_norm.eps,
    )  # fmt: skip
    matrices = (a.qkv.weight, a.out.weight, f.gate_up.weight, f.out.weight)
    gains = (block.attention_norm.weight, block.ffn_norm.weight, a.q_norm.weight, a.k_norm.weight)
    masks = [
        m if m is None else m.expand_as(x).contiguous() for m in (block.branch_mask(x), block.branch_mask(x))
    ]
    return _BlockFunction.apply(shape, (table.contiguous(), bias, *masks), x.contiguous(), *matrices, *gains)
