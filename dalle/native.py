"""The decode step of dalle/packed.py as one call of compiled code (native.cpp), for x86 CPUs with AVX512-BF16 or AVX2.

What the operators of PyTorch cost besides their work, about 0.2 ms a layer, falls away.
"""

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from common import native
from common.native import GROUP
from dalle import sequence
from dalle.lines import no_lines
from dalle.model import Dalle, DalleConfig
from dalle.packed import PackedDecoder, Weights, int8_steps

SOURCE = Path(__file__).with_name("native.cpp")
BLOCK = 16  # positions of a block of keys, as there


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
        ("turns", ctypes.c_void_p),
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


def why_not() -> str:
    """Why this machine cannot run the compiled step; empty where it can."""
    return native.why_not(SOURCE)


@functools.cache
def _library() -> ctypes.CDLL:
    library = native.library(SOURCE)
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    for name in ("linear", "gated"):
        getattr(library, name).argtypes = (pointer, pointer, integer, pointer, ctypes.c_int)
    library.step.argtypes = (pointer, pointer, pointer, pointer, pointer, ctypes.c_int)
    library.linear.restype = library.gated.restype = None
    library.step.restype = ctypes.c_bool
    return library


def fits(config: DalleConfig) -> bool:
    """Whether the widths of a model are whole registers."""
    return config.dim % GROUP == 0 and config.head_dim % BLOCK == 0 and config.ffn_dim % BLOCK == 0


class NativeLinear:
    """x @ weight.T: x (M, K) bfloat16 -> (M, N) float32."""

    def __init__(self, weight: Tensor, dtype: Weights) -> None:
        """weight: (N, K), rounded to bfloat16 or to int8 with one scale an output."""
        outputs, inputs = weight.shape
        weight = torch.nn.functional.pad(weight.float(), (0, 0, 0, -outputs % GROUP))  # (N', K)
        self.scale = None
        if dtype == torch.int8:
            weight, self.scale = int8_steps(weight)
        self.weight = native.group_weights(weight.unsqueeze(1)).to(dtype)  # (N' / 32, 1, K / 2, 2, 16, 2)
        scale = None if self.scale is None else self.scale.data_ptr()
        self.struct = _Linear(self.weight.data_ptr(), scale, inputs, outputs)

    def __call__(self, x: Tensor) -> Tensor:
        y = torch.empty(len(x), self.struct.outputs)
        _call(_library().linear, self.struct, x, y)
        return y


class NativeGate(NativeLinear):
    """silu(x @ gate.T) * (x @ up.T) in bfloat16."""

    def __init__(self, gate_up: Tensor, dtype: Weights) -> None:
        width = gate_up.shape[1]
        # 16 gates, their 16 factors, 16 gates ...
        turns = gate_up.view(2, -1, GROUP // 2, width).transpose(0, 1)
        super().__init__(turns.reshape(-1, width), dtype)

    def __call__(self, x: Tensor) -> Tensor:
        y = torch.empty(len(x), self.struct.outputs // 2, dtype=torch.bfloat16)
        _call(_library().gated, self.struct, x, y)
        return y


def _call(function, struct: _Linear, x: Tensor, y: Tensor) -> None:
    x = x.contiguous()
    if x.dtype != torch.bfloat16 or x.shape[1] != struct.inputs:
        raise ValueError(f"expected bfloat16 (M, {struct.inputs}), got {x.dtype} {tuple(x.shape)}")
    function(ctypes.addressof(struct), x.data_ptr(), len(x), y.data_ptr(), torch.get_num_threads())


class NativeCache:
    """Keys and values as native.cpp has them, and room for a step."""

    def __init__(self, config: DalleConfig, bias: Tensor) -> None:
        """bias: (R, L) float32, 0 or -inf where a key is padding."""
        c = config
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
        self.struct = _Cache(*(t.data_ptr() for t in self.buffers), rows, self.length, blocks)

    def follow(self, lines: Tensor, model: _Model) -> None:
        """Features of line drawings (R, N, D): a step reads its inputs from `inputs`, where its embedding is read
        otherwise."""
        self.lines = lines.float().contiguous()
        self.inputs = torch.empty(lines.shape[0], lines.shape[2])
        self.rows = torch.arange(lines.shape[0])
        self.model = _Model.from_buffer_copy(model)
        self.model.image_embed = self.inputs.data_ptr()

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


@dataclass(frozen=True)
class _RowsFrom:
    """The rows of a cache from `start` on, for `prefill`."""

    cache: NativeCache
    start: int
    lines: Tensor | None = None

    def fill(self, layer: int, k: Tensor, v: Tensor) -> None:
        self.cache.fill(layer, k, v, self.start)


class NativeDecoder(PackedDecoder):
    """As PackedDecoder, in bfloat16 or int8: the prefix goes through its operators, each step is one call."""

    @staticmethod
    def require(weights: Weights) -> None:
        """Raises ValueError where the machine does not allow it."""
        if weights not in (torch.bfloat16, torch.int8):
            raise ValueError("the native engine computes in bfloat16 or int8: take packed for float32")
        if reason := why_not():
            raise ValueError(f"the native engine cannot run here: {reason}")

    @staticmethod
    def layer_types(weights: Weights) -> tuple[type, type, type]:
        return NativeLinear, NativeGate, NativeLinear

    def __init__(self, model: Dalle, weights: Weights) -> None:
        """Raises ValueError where the machine or the model's widths do not allow it."""
        if not fits(model.config):
            raise ValueError(
                "the native engine needs a width that is a multiple of 32 and heads of multiples of 16"
            )
        super().__init__(model, weights)
        c = self.config
        self.turns = self.turns.contiguous()
        self.image_embed = self.image_embed.contiguous()
        self.num_positions = self.turns.shape[2]
        layers = (_Layer(b.qkv.struct, b.out.struct, b.gate.struct, b.down.struct) for b in self.blocks)
        self.layers = (_Layer * c.num_layers)(*layers)
        self.struct = _Model(
            self.layers, self.head.struct, self.image_embed.data_ptr(), self.turns.data_ptr(),
            c.num_layers, c.dim, c.num_heads, c.num_kv_heads, c.head_dim, self.num_positions,
            self.eps**2, self.head_eps**2,
        )  # fmt: skip

    @torch.inference_mode()
    def new_cache(self, text_ids: Tensor, lines: Tensor | None = None) -> NativeCache:
        """As `Dalle.new_cache`."""
        c = self.config
        bias = sequence.key_bias(sequence.text_mask(text_ids, c.pad_id), c.num_image_tokens, torch.float32)
        return self._following(NativeCache(c, bias[:, 0, 0]), lines)

    def _following(self, cache: NativeCache, lines: Tensor | None) -> NativeCache:
        if lines is None:
            return cache
        if len(lines) > self.config.codebook_size:
            raise ValueError(
                f"{len(lines)} rows with drawings need a codebook of as many codes: lower the batch size"
            )
        cache.follow(lines, self.struct)
        return cache

    @torch.inference_mode()
    def new_rows(self, capacity: int) -> NativeCache:
        """An empty cache whose rows come and go: `prefill_rows`, `decode_rows`, `move_row`."""
        c = self.config
        cache = NativeCache(c, torch.zeros(capacity, c.max_text_len + c.num_image_tokens))
        return self._following(cache, no_lines(c, capacity))

    @torch.inference_mode()
    def prefill_rows(
        self,
        text_ids: Tensor,
        cache: NativeCache,
        start: int,
        image_ids: Tensor | None = None,
        lines: Tensor | None = None,
    ) -> Tensor:
        """As `prefill`, into the rows from `start` on; text_ids (R, max_text_len), lines (R, N, D) or None for none."""
        c = self.config
        bias = sequence.key_bias(sequence.text_mask(text_ids, c.pad_id), c.num_image_tokens, torch.float32)
        cache.bias[start : start + len(text_ids)] = bias[:, 0, 0]
        if cache.lines is not None:
            cache.lines[start : start + len(text_ids)] = 0 if lines is None else lines
        return self.prefill(text_ids, _RowsFrom(cache, start, lines), image_ids)

    @torch.inference_mode()
    def decode_step(self, image_ids: Tensor, position: int, cache: NativeCache) -> Tensor:
        """As `Dalle.decode_step`: the token drawn at `position` (R,) -> logits (R, V) of the next."""
        if len(image_ids) != cache.struct.capacity:
            raise ValueError(f"expected {cache.struct.capacity} ids, got {len(image_ids)}")
        self._require_positions(position, position)
        return self._step(image_ids, torch.tensor([position]), cache)

    @torch.inference_mode()
    def decode_rows(self, image_ids: Tensor, positions: Tensor, cache: NativeCache) -> Tensor:
        """The same for the first R rows of the cache, each at a position of its own: (R,) and (R,) -> (R, V)"""
        if len(positions) != len(image_ids) or len(image_ids) > cache.struct.capacity:
            raise ValueError(
                f"expected a position for each of at most {cache.struct.capacity} ids, got {len(image_ids)} ids and "
                f"{len(positions)} positions"
            )
        self._require_positions(*(int(p) for p in positions.aminmax()))
        return self._step(image_ids, positions, cache)

    def _require_positions(self, lowest: int, highest: int) -> None:
        last = self.config.num_image_tokens - 1
        if lowest < 0 or highest >= last:
            raise ValueError(f"positions must lie in [0, {last}), not {lowest} to {highest}")

    def _step(self, image_ids: Tensor, positions: Tensor, cache: NativeCache) -> Tensor:
        """positions: (R,), or (1,) for all rows alike."""
        c = self.config
        image_ids, positions, model = image_ids.contiguous(), positions.contiguous(), self.struct
        if cache.lines is not None:  # this step's inputs in the place of the embedding, row by row
            active = cache.rows[: len(image_ids)]
            inputs = cache.inputs[: len(image_ids)]
            torch.add(self.image_embed[image_ids], cache.lines[active, positions + 1], out=inputs)
            image_ids, model = active, cache.model
        logits = torch.empty(len(image_ids), c.codebook_size)
        rows = _Rows(positions.data_ptr(), int(len(positions) > 1), len(image_ids), c.num_image_tokens)
        known = _library().step(
            ctypes.addressof(model), ctypes.addressof(cache.struct), ctypes.addressof(rows), image_ids.data_ptr(),
            logits.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        if not known:
            raise IndexError(f"image ids must lie below {c.codebook_size}: {image_ids.tolist()}")
        return logits
