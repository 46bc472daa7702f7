"""A decode step of the generator as one call of compiled code (csrc/decode.cpp), for x86 CPUs with AVX512-BF16 or AVX2.

What the operators of PyTorch cost besides their work, about 0.2 ms a layer, falls away. It receives matrices with the
gains of norms folded in; dalle/engines/cpu_kernel.py makes them.
"""

import ctypes
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import compiler
from kernels.compiler import address
from kernels.packing import GROUP, group_weights

BLOCK = 16  # positions of a block of keys, as in decode.cpp


class _Linear(ctypes.Structure):
    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("inputs", ctypes.c_int64),
        ("outputs", ctypes.c_int64),
    )


class _Layer(ctypes.Structure):
    _fields_ = tuple((name, _Linear) for name in ("qkv", "out", "gate_up", "down"))


class _Model(ctypes.Structure):
    _fields_ = (
        ("layers", ctypes.POINTER(_Layer)),
        ("head", _Linear),
        ("image_embed", ctypes.c_void_p),
        ("rotary_tables", ctypes.c_void_p),
        *(
            (name, ctypes.c_int64)
            for name in (
                "num_layers",
                "dim",
                "num_heads",
                "num_kv_heads",
                "head_dim",
                "num_positions",
            )
        ),
        ("eps", ctypes.c_float),
        ("head_eps", ctypes.c_float),
    )


class _Cache(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("keys", "values", "bias", "x", "qkv", "attended", "gated")),
        *((name, ctypes.c_int64) for name in ("capacity", "length", "num_blocks")),
    )


class _Rows(ctypes.Structure):
    _fields_ = (
        ("positions", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("stride", "count", "num_image")),
    )


def _declare(library: ctypes.CDLL) -> None:
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    for name in ("linear", "gated"):
        getattr(library, name).argtypes = (pointer, pointer, integer, pointer, ctypes.c_int)
    library.step.argtypes = (pointer, pointer, pointer, pointer, pointer, ctypes.c_int)
    library.linear.restype = library.gated.restype = None
    library.step.restype = ctypes.c_bool


SOURCE = compiler.Source("decode.cpp", (_Linear, _Layer, _Model, _Cache, _Rows), _declare)


def unavailable_reason() -> str:
    """Why this machine cannot run the compiled step; empty where it can."""
    return compiler.unavailable_reason(SOURCE)


def fits(dim: int, head_dim: int, ffn_dim: int) -> bool:
    """Whether the widths of a model are whole registers."""
    return dim % GROUP == 0 and head_dim % BLOCK == 0 and ffn_dim % BLOCK == 0


def int8_steps(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(N, K) -> whole numbers from -127 to 127, and what one of them is worth in each row (N,)"""
    scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-8) / 127
    return (weight / scale).round(), scale[:, 0].contiguous()


class Linear:
    """x @ weight.T: x (M, K) bfloat16 -> (M, N) float32."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        """weight: (N, K), rounded to bfloat16 or to int8 with one scale an output."""
        outputs, inputs = weight.shape
        weight = torch.nn.functional.pad(weight.float(), (0, 0, 0, -outputs % GROUP))  # (N', K)
        self.scale = None
        if dtype == torch.int8:
            weight, self.scale = int8_steps(weight)
        self.weight = group_weights(weight.unsqueeze(1)).to(dtype)  # (N' / 32, 1, K / 2, 2, 16, 2)
        scale = None if self.scale is None else address(self.scale, torch.float32)
        self.struct = _Linear(address(self.weight, dtype), scale, inputs, outputs)

    def __call__(self, x: Tensor) -> Tensor:
        y = torch.empty(len(x), self.struct.outputs)
        _call(compiler.load(SOURCE).linear, self.struct, x, y)
        return y


class Gate(Linear):
    """silu(x @ gate.T) * (x @ up.T) in bfloat16."""

    def __init__(self, gate_up: Tensor, dtype: torch.dtype) -> None:
        width = gate_up.shape[1]
        # 16 gates, their 16 factors, 16 gates ...
        interleaved = gate_up.view(2, -1, GROUP // 2, width).transpose(0, 1)
        super().__init__(interleaved.reshape(-1, width), dtype)

    def __call__(self, x: Tensor) -> Tensor:
        y = torch.empty(len(x), self.struct.outputs // 2, dtype=torch.bfloat16)
        _call(compiler.load(SOURCE).gated, self.struct, x, y)
        return y


def _call(function: Callable, struct: _Linear, x: Tensor, y: Tensor) -> None:
    x = x.contiguous()
    if x.dtype != torch.bfloat16 or x.shape[1] != struct.inputs:
        raise ValueError(f"expected bfloat16 (M, {struct.inputs}), got {x.dtype} {tuple(x.shape)}")
    function(
        ctypes.addressof(struct),
        address(x, torch.bfloat16),
        len(x),
        address(y, y.dtype),
        torch.get_num_threads(),
    )


class Sizes(NamedTuple):
    """Of a generator."""

    num_layers: int
    dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_dim: int
    num_image_tokens: int


class RowCache:
    """Keys and values as decode.cpp has them, and room for a step."""

    def __init__(self, sizes: Sizes, bias: Tensor) -> None:
        """bias: (R, L) float32, 0 or -inf where a key is padding."""
        c = sizes
        self.lines: Tensor | None = None
        self.bias = bias.contiguous()
        rows, self.length = bias.shape
        stored, blocks = rows * c.num_kv_heads, -(-self.length // BLOCK)
        self.keys = torch.empty(c.num_layers, stored, blocks, c.head_dim, BLOCK, dtype=torch.float16)
        self.values = torch.empty(c.num_layers, stored, self.length + 1, c.head_dim, dtype=torch.float16)
        x = torch.empty(rows, c.dim)
        qkv = torch.empty(rows, (c.num_heads + 2 * c.num_kv_heads) * c.head_dim)
        attended = torch.empty(rows, c.num_heads * c.head_dim, dtype=torch.bfloat16)
        gated = torch.empty(rows, c.ffn_dim, dtype=torch.bfloat16)
        self.buffers = (self.keys, self.values, self.bias, x, qkv, attended, gated)
        self.struct = _Cache(*(address(t, t.dtype) for t in self.buffers), rows, self.length, blocks)

    def follow(self, lines: Tensor, model: _Model) -> None:
        """Features of line drawings (R, N, D): a step reads its inputs from `inputs`, where its embedding is read
        otherwise."""
        self.lines = lines.float().contiguous()
        self.inputs = torch.empty(lines.shape[0], lines.shape[2])
        self.rows = torch.arange(lines.shape[0])
        self.model = _Model.from_buffer_copy(model)
        self.model.image_embed = address(self.inputs, torch.float32)

    def fill(self, layer: int, k: Tensor, v: Tensor, start: int = 0) -> None:
        """The prefix of the rows from `start` on: k and v (R, H_kv, n, K)"""
        rows = slice(start * k.shape[1], (start + len(k)) * k.shape[1])
        k, v = k.flatten(0, 1), v.flatten(0, 1)
        n = k.shape[1]
        self.values[layer, rows, :n] = v
        k = torch.nn.functional.pad(k, (0, 0, 0, -n % BLOCK)).unflatten(1, (-1, BLOCK))
        self.keys[layer, rows, : k.shape[1]] = k.transpose(2, 3)

    def move_row(self, source: int, target: int) -> None:
        """Row `source` takes the place of row `target`, whose contents are lost."""
        heads = self.keys.shape[1] // len(self.bias)
        to, of = (slice(r * heads, (r + 1) * heads) for r in (target, source))
        self.keys[:, to], self.values[:, to] = self.keys[:, of], self.values[:, of]
        self.bias[target] = self.bias[source]
        if self.lines is not None:
            self.lines[target] = self.lines[source]


class Layer(NamedTuple):
    """The products of a block, norms folded in."""

    qkv: Linear
    out: Linear
    gate: Gate
    down: Linear


class Step:
    """All layers of a decode step."""

    def __init__(
        self,
        sizes: Sizes,
        layers: Sequence[Layer],
        head: Linear,
        image_embed: Tensor,
        tables: Tensor,
        eps: float,
        head_eps: float,
    ) -> None:
        """image_embed: (V, D) float32; tables: (layers, 2, P, 2, K) float32, rotary tables with the gains of queries
        and of keys; eps: times D, and head_eps times K."""
        self.sizes, self.image_embed, self.tables = sizes, image_embed.contiguous(), tables.contiguous()
        self.codebook_size = head.struct.outputs
        self._kept = layers, head  # what the structures point to
        self._layers = (_Layer * len(layers))(
            *(_Layer(x.qkv.struct, x.out.struct, x.gate.struct, x.down.struct) for x in layers)
        )
        self.struct = _Model(
            self._layers, head.struct, address(self.image_embed, torch.float32), address(self.tables, torch.float32),
            *sizes[:5], tables.shape[2], eps, head_eps,
        )  # fmt: skip

    def __call__(self, image_ids: Tensor, positions: Tensor, cache: RowCache) -> Tensor:
        """image_ids: (R,) long, of the first R rows of the cache; positions: (R,) long, or (1,) for all rows alike.
        -> logits (R, V) float32. Raises ValueError or IndexError for what is out of range."""
        if len(image_ids) > cache.struct.capacity or len(positions) not in (1, len(image_ids)):
            raise ValueError(
                f"expected a position for each of at most {cache.struct.capacity} ids, got {len(image_ids)} ids and "
                f"{len(positions)} positions"
            )
        lowest, highest = (int(p) for p in positions.aminmax())
        last = self.sizes.num_image_tokens - 1
        if lowest < 0 or highest >= last:
            raise ValueError(f"positions must lie in [0, {last}), not {lowest} to {highest}")
        image_ids, positions, model = image_ids.contiguous(), positions.contiguous(), self.struct
        if cache.lines is not None:  # this step's inputs in the place of the embedding, row by row
            active = cache.rows[: len(image_ids)]
            inputs = cache.inputs[: len(image_ids)]
            torch.add(self.image_embed[image_ids], cache.lines[active, positions + 1], out=inputs)
            image_ids, model = active, cache.model
        logits = torch.empty(len(image_ids), self.codebook_size)
        rows = _Rows(
            address(positions, torch.long),
            int(len(positions) > 1),
            len(image_ids),
            self.sizes.num_image_tokens,
        )
        known = compiler.load(SOURCE).step(
            ctypes.addressof(model), ctypes.addressof(cache.struct), ctypes.addressof(rows),
            address(image_ids, torch.long), address(logits, torch.float32), torch.get_num_threads(),
        )  # fmt: skip
        if not known:
            raise IndexError(f"image ids must lie below {self.codebook_size}: {image_ids.tolist()}")
        return logits
