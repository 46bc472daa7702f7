"""A block's forward and backward passes as two calls of compiled code (csrc/train_block.cpp), for training on x86 CPUs
with AVX512-BF16 or AVX2: the same function as `dalle.model.Block`, in bfloat16 products as autocast computes them.

What the operators of PyTorch cost besides their work falls away: each sequence stays in the cache of its core.
"""

import copy
import ctypes
import itertools
import math
import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from common.precision import trains_in_bf16
from kernels import compiler
from kernels.autograd import branch_mask
from kernels.compiler import address
from kernels.packing import GROUP, memory
from kernels.structure import LINEAR, Known, named, why_changed

MOST_HEAD_DIM = 128  # eight registers
MOST_SUMS = 2**29  # gradients of all threads: 2 GiB
TOLERANCE = 0.03  # of the norm of a result or a gradient; bfloat16 itself costs up to 0.01
RMS_NORM = Known("dalle.attention.RMSNorm", ("weight",))
BLOCK = Known(
    "dalle.model.Block",
    children={
        "attention_norm": RMS_NORM,
        "ffn_norm": RMS_NORM,
        "attention": Known(
            "dalle.attention.Attention",
            children={
                "qkv": LINEAR,
                "q_norm": RMS_NORM,
                "k_norm": RMS_NORM,
                "attend": Known("dalle.attention.CausalAttention"),
                "out": LINEAR,
            },
        ),
        "ffn": Known("dalle.model.SwiGLU", children={"gate_up": LINEAR, "out": LINEAR}),
        "branch": Known("dalle.model.BranchDropout"),
    },
)
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


def _declare(library: ctypes.CDLL) -> None:
    library.block_forward.argtypes = (*(_pointer,) * 5, ctypes.c_int)
    library.block_backward.argtypes = (*(_pointer,) * 7, ctypes.c_int)
    library.block_forward.restype = library.block_backward.restype = None


SOURCE = compiler.Source("train_block.cpp", (_Shape, _Weights, _Input, _Kept), _declare)


def is_training_in_bf16(x: Tensor) -> bool:
    """Whether gradients are wanted of what is computed from `x` in bf16 on a CPU; see `common.precision.autocast`."""
    if x.device.type != "cpu" or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return trains_in_bf16()


def unavailable_reason() -> str:
    """Why training on this machine is not for it, whatever the module; empty where it is."""
    if not compiler.level():
        return compiler.unavailable_reason(SOURCE)
    if compiler.prefers_torch():
        return "PyTorch multiplies faster on this CPU, with AMX"
    return compiler.unavailable_reason(SOURCE)


def unsupported_reason(block: nn.Module) -> str:
    """Why `block` is not for it, whatever its input; empty where it is."""
    if reason := why_changed(block, BLOCK):
        return reason
    attention, ffn = block.attention, block.ffn
    matrices, threads = _matrices(block), torch.get_num_threads()
    if block.training and attention.attend.dropout:
        return "attention weights are dropped"
    if any(m.ndim != 2 or m.dtype != torch.float32 or not m.is_contiguous() for m in matrices):
        return "weights are not whole float32 matrices"  # ZeRO-3 keeps parts
    if any(width % GROUP for width in (attention.qkv.in_features, attention.head_dim, ffn.out.in_features)):
        return f"widths are not multiples of {GROUP}"
    if _sizes(block) != [tuple(m.shape) for m in matrices]:
        return "the shapes of its weights are not those of its heads"
    if block.attention_norm.eps != block.ffn_norm.eps or attention.q_norm.eps != attention.k_norm.eps:
        return "its norms have different eps"
    if attention.head_dim > MOST_HEAD_DIM:
        return f"heads are wider than {MOST_HEAD_DIM}"
    if threads * sum(m.numel() for m in matrices) > MOST_SUMS:
        return "gradients of all threads would take more than 2 GiB"
    return ""


def _matrices(block: nn.Module) -> tuple[Tensor, ...]:
    attention, ffn = block.attention, block.ffn
    return attention.qkv.weight, attention.out.weight, ffn.gate_up.weight, ffn.out.weight


def _sizes(block: nn.Module) -> list[tuple[int, int]]:
    """What the shapes of `_matrices` must be."""
    a, dim, ffn = block.attention, block.attention.qkv.in_features, block.ffn.out.in_features
    inner = a.num_heads * a.head_dim
    return [(inner + 2 * a.num_kv_heads * a.head_dim, dim), (dim, inner), (2 * ffn, dim), (dim, ffn)]


def supports(block: nn.Module, x: Tensor) -> bool:
    """Whether `run_block` is what `block(x)` should do: in training under bf16 autocast, with a sequence or more for
    every thread."""
    if not is_training_in_bf16(x) or x.dtype != torch.float32 or len(x) < torch.get_num_threads():
        return False
    return not (unsupported_reason(block) or unavailable_reason())


def forward(block: nn.Module, x: Tensor, table: Tensor, mask: object) -> Tensor:
    """What replaces `block.forward`: x (B, L, D); table (2, L, K); mask: a CausalMask. -> (B, L, D)"""
    if supports(block, x):
        return run_block(block, x, table, mask.key_bias)
    return type(block).forward(block, x, table, mask)


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
        return memory(size)

    def give_back(self, buffer: Tensor) -> None:
        self._free.append(buffer)


_buffers = _Buffers()


def _kept_sizes(s: _Shape) -> list[int]:
    """Bytes of what a forward pass keeps, in the order of `_Kept`, whole cache lines each."""
    positions = s.batch * s.length
    halves = ((s.heads + 2 * s.kv_heads) * s.head_dim, 2 * s.ffn, s.heads * s.head_dim, s.dim, s.dim)
    return [
        -(-size // 64) * 64
        for size in (*(2 * n * positions for n in halves), 8 * positions, 4 * s.heads * positions)
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
            compiler.load(SOURCE).block_forward, shape, _floats(_Weights, weights), _input(x, *inputs),
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
            compiler.load(SOURCE).block_backward, ctx.shape, _floats(_Weights, weights), _input(None, *inputs),
            _kept(ctx.shape, buffer), dy, dx, _floats(_Weights, gradients),
        )  # fmt: skip
        _buffers.give_back(buffer)
        ctx.is_spent = True
        return None, None, dx, *gradients


def _floats(kind: type, tensors: Sequence[Tensor]) -> ctypes.Structure:
    return kind(*(address(t, torch.float32) for t in tensors))


def _input(*tensors: Tensor | None) -> _Input:
    types = (*(torch.float32,) * 3, *(torch.bfloat16,) * 2)  # the masks
    return _Input(
        *(None if t is None else address(t, dtype) for t, dtype in zip(tensors, types, strict=True))
    )


def call(function: Callable, *arguments: ctypes.Structure | ctypes.Array | Tensor | int) -> None:
    """Of compiled code, with addresses of float32 tensors and of structures; one at a time, since packed weights are
    shared."""

    def address_of(a) -> int:
        if isinstance(a, Tensor):
            return address(a, torch.float32)
        return a if isinstance(a, int) else ctypes.addressof(a)

    with _one_at_a_time:
        function(*map(address_of, arguments), torch.get_num_threads())


def run_block(block: nn.Module, x: Tensor, table: Tensor, bias: Tensor | None) -> Tensor:
    """`block(x)`: x (B, L, D) float32; table (2, L, K) float32; bias (B, L) float32, -inf at padding, or None."""
    a, f = block.attention, block.ffn
    shape = _Shape(
        x.shape[0], x.shape[1], x.shape[2], a.num_heads, a.num_kv_heads, a.head_dim, f.out.in_features,
        block.attention_norm.eps, a.q_norm.eps,
    )  # fmt: skip
    gains = (block.attention_norm.weight, block.ffn_norm.weight, a.q_norm.weight, a.k_norm.weight)
    masks = [branch_mask(block.branch, x) for _ in range(2)]
    masks = [m if m is None else m.expand_as(x).contiguous() for m in masks]
    return _BlockFunction.apply(
        shape, (table.contiguous(), bias, *masks), x.contiguous(), *_matrices(block), *gains
    )


def mismatch(block: nn.Module) -> str:
    """Compares a pass forward and back with the module's own, in float32 and with random weights; says what differs.

    So a block whose code was changed is refused, not only one whose layers were.
    """
    probe = randomised(block)
    length, text_len, batch = 24, 8, max(2, torch.get_num_threads())
    generator = torch.Generator().manual_seed(1)
    x, dy = torch.randn(2, batch, length, probe.attention.qkv.in_features, generator=generator).unbind()
    x += 0.5  # a mean, which some norms take off
    angles = torch.rand(length, probe.attention.head_dim // 2, generator=generator) * 6
    cosine, sine = angles.cos(), angles.sin()
    table = torch.stack([torch.cat([cosine, cosine], 1), torch.cat([-sine, sine], 1)])  # (2, L, K)
    visible = torch.ones(batch, text_len, dtype=torch.bool)
    visible[-1, text_len // 2 :] = False
    mask = named("dalle.attention.CausalMask")(visible, length)

    def passes(compute: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        given = x.clone().requires_grad_()
        y = compute(given)
        wanted = [given, *probe.parameters()]
        names = ["its result", "the gradient of its input"]
        names += [f"the gradient of {name}" for name, _ in probe.named_parameters()]
        return dict(zip(names, [y.detach(), *torch.autograd.grad(y, wanted, dy)], strict=True))

    exact = passes(lambda given: type(probe).forward(probe, given, table, mask))
    found = passes(lambda given: run_block(probe, given, table, mask.key_bias))
    return largest_difference(found, exact, TOLERANCE)


def randomised(module: nn.Module) -> nn.Module:
    """A copy in eval mode, without what replaced its own `forward`s, with weights that all say something. Takes no
    random numbers of PyTorch's own generator."""
    probe = copy.deepcopy(module).eval().requires_grad_()
    generator = torch.Generator().manual_seed(0)
    for part in probe.modules():
        part.__dict__.pop("forward", None)
    with torch.no_grad():
        for weight in probe.parameters():
            mean, spread = (1.0, 0.2) if weight.ndim == 1 else (0.0, weight[0].numel() ** -0.5)
            weight.copy_(torch.randn(weight.shape, generator=generator) * spread + mean)
    return probe


def largest_difference(found: dict[str, Tensor], exact: dict[str, Tensor], tolerance: float) -> str:
    """Empty where every norm of a difference is at most `tolerance` of the norm of what is exact."""
    errors = {n: float((found[n].float() - exact[n]).norm() / exact[n].norm()) for n in exact}
    name = max(errors, key=lambda n: (math.isnan(errors[n]), errors[n]))
    return (
        "" if errors[name] <= tolerance else f"{name} differs by {errors[name]:.1%}, {tolerance:.1%} allowed"
    )
