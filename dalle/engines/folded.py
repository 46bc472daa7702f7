"""The generator with its norms folded into its matrices, for decoding on a CPU: the same function, fewer operations.

Norm gains go into the matrices that follow, those of queries and keys and the softmax scale into the rotary tables;
SiLU and the gate's product run inside the matrix products. The residual stream and all norms stay float32. Products
round each row alike however many rows there are, so an image does not depend on the batch it is sampled in.

`cpu_kernel` and `packed` share all but the products and the decode step. Both compute by themselves what they read off
a model's weights, so each compares itself once with the model's own code (`changed_reason`).
"""

import weakref
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from common.log import say
from common.precision import has_native_bf16
from dalle import sequence
from dalle.attention import RMSNorm
from dalle.model import Block, Dalle
from kernels import OFF
from kernels.structure import LINEAR, Known, is_exactly, why_changed
from kernels.train_block import BLOCK, RMS_NORM, randomised

Weights = torch.dtype  # float32, bfloat16 or int8
TOLERANCE = {
    torch.float32: 1e-3,
    torch.bfloat16: 0.04,
}  # of the spread of logits; rounding costs a third of it


class Cache(Protocol):
    """What `prefill` fills."""

    lines: Tensor | None  # (R, N, D): features of line drawings

    def fill(self, layer: int, k: Tensor, v: Tensor) -> None:
        """The prefix: k and v (R, H_kv, n, K)"""


EMBEDDING = Known("torch.nn.modules.sparse.Embedding", ("weight",))
IDENTITY = Known("torch.nn.modules.linear.Identity")
_compared: dict[type, weakref.WeakKeyDictionary[Dalle, str]] = defaultdict(weakref.WeakKeyDictionary)


def changed_structure(model: Dalle) -> str:
    """Which layer is not exactly the one that a Dalle of its config has; empty where all are."""
    c = model.config
    if not is_exactly(model, "dalle.model.Dalle"):
        return f"{type(model).__qualname__} is not dalle.model.Dalle"
    blocks = {str(i): BLOCK for i in range(c.num_layers)}
    layers = {
        "text_embed": EMBEDDING,
        "text_in": IDENTITY if c.text_embed_dim == c.dim else LINEAR,
        "image_embed": EMBEDDING,
        "blocks": Known("torch.nn.modules.container.ModuleList", children=blocks),
        "norm": RMS_NORM,
    } | ({} if c.tie_image_head else {"image_head": LINEAR})
    reasons = (why_changed(getattr(model, name), known, name) for name, known in layers.items())
    return next((reason for reason in reasons if reason), "")


@dataclass(frozen=True)
class FoldedBlock:
    qkv: Callable[[Tensor], Tensor]
    out: Callable[[Tensor], Tensor]
    gate: Callable[[Tensor], Tensor]
    down: Callable[[Tensor], Tensor]


class FoldedDecoder(ABC):
    """What `new_cache`, `prefill` and `decode_step` of a `Dalle` on a CPU share; see `dalle.sampling.Generator`."""

    row_multiple, report = 1, OFF

    @staticmethod
    @abstractmethod
    def require(weights: Weights) -> None:
        """Raises ValueError where the machine does not allow it."""

    @staticmethod
    @abstractmethod
    def layer_types(weights: Weights) -> tuple[type, type, type]:
        """Of the products, of the gate, and of the head."""

    def __init__(self, model: Dalle, weights: Weights) -> None:
        """Raises ValueError where the machine does not allow it, or the model's code is no longer what is computed
        here."""
        self.require(weights)
        if reason := self.changed_reason(model):
            raise ValueError(f"this engine cannot compute the model: {reason}")
        self._fold(model, weights)

    @classmethod
    def changed_reason(cls, model: Dalle) -> str:
        """What of the model is not as this engine was written for it; empty where all is. Loud where code differs."""
        if reason := changed_structure(model):
            return reason
        compared = _compared[cls]
        if model not in compared:
            compared[model] = cls._mismatch(model)
            if compared[model]:
                say(f"warning: {cls.__name__} is not used: {compared[model]}")
        return compared[model]

    @classmethod
    @torch.no_grad()
    def _mismatch(cls, model: Dalle) -> str:
        """Compares the steps of a small model of the same widths and code with its forward pass, in float32 and with
        random weights."""
        sizes = {
            "text_vocab_size": 12,
            "pad_id": 0,
            "max_text_len": 4,
            "grid_size": 3,
            "codebook_size": 64,
            "line_factor": 0,
        }
        with torch.random.fork_rng(devices=[]):
            probe = randomised(type(model)(replace(model.config, num_layers=2, **sizes)))
        dtype = cls.compared_dtype()
        decoder = cls.__new__(cls)
        decoder._fold(probe, dtype)
        generator = torch.Generator().manual_seed(1)
        text, image = (
            torch.randint(low, high, (3, n), generator=generator) for low, high, n in ((1, 12, 4), (0, 64, 9))
        )
        text[1, 2:] = 0
        exact = probe(text, image).image  # (R, N, V)
        cache = decoder.new_cache(text)
        steps = [decoder.prefill(text, cache)] + [
            decoder.decode_step(image[:, n], n, cache) for n in range(8)
        ]
        error = float((torch.stack(steps, 1).float() - exact).std() / exact.std())
        if error <= TOLERANCE[dtype]:
            return ""
        return (
            f"logits of the model's own code differ by {error:.1%} of their spread from this engine's, "
            f"{TOLERANCE[dtype]:.1%} allowed: was the model changed?"
        )

    @staticmethod
    @abstractmethod
    def compared_dtype() -> Weights:
        """In what `changed_reason` compares."""

    def _fold(self, model: Dalle, weights: Weights) -> None:
        c = self.config = model.config
        self.compute_dtype = torch.bfloat16 if weights == torch.int8 else weights
        # of a prefix; PyTorch only emulates bfloat16 on other CPUs
        self.attention_dtype = self.compute_dtype if has_native_bf16(torch.device("cpu")) else torch.float32
        # queries and keys are normed and values of order one: float16 holds them with three more bits than bfloat16
        self.cache_dtype = torch.float32 if weights == torch.float32 else torch.float16
        linear, gate, head_type = self.layer_types(weights)
        with torch.inference_mode():
            self.text_embed, self.text_in = model.text_embed, model.text_in
            self.image_embed, self.begin_image = model.image_embed.weight.float(), model.begin_image
            self.blocks = [fold_block(block, weights, linear, gate) for block in model.blocks]
            head = model.image_embed.weight if c.tie_image_head else model.image_head.weight
            self.head = head_type(fold(head, model.norm), self.compute_dtype)
            self.rotary_tables = torch.stack(
                [rotary_with_gains(block, model.rotary) for block in model.blocks]
            )
        self.head_group = torch.tensor([0] * c.num_heads + [1] * c.num_kv_heads)
        self.eps, self.head_eps = (model.norm.eps * c.dim) ** 0.5, (model.norm.eps * c.head_dim) ** 0.5

    @torch.inference_mode()
    def prefill(self, text_ids: Tensor, cache: Cache, image_ids: Tensor | None = None) -> Tensor:
        """As `Dalle.prefill`: logits (R, V) of the first unknown image token. Rows that are alike are computed once."""
        text_ids, image_ids, lines, which = _distinct_rows(text_ids, image_ids, cache.lines)
        begin = self.begin_image.expand(len(text_ids), 1, -1)
        image = torch.cat([begin, self.image_embed[image_ids]], 1)
        if lines is not None:
            image = image + lines[:, : image.shape[1]]
        x = torch.cat([self.text_in(self.text_embed(text_ids)), image], 1)  # (U, n, D)
        rows, n, _ = x.shape
        text_len = text_ids.shape[1]
        visible = sequence.text_mask(text_ids, self.config.pad_id)
        bias = sequence.attention_bias(visible, n - text_len, self.compute_dtype)
        slices = sequence.input_rows(text_len, self.config.max_text_len, n - text_len)
        tables = torch.cat([self.rotary_tables[:, :, s] for s in slices], 2)  # (layers, 2, n, 2, K)
        tables = tables.index_select(3, self.head_group)  # (layers, 2, n, H + H_kv, K)
        x = x.reshape(rows * n, -1)
        for layer, block in enumerate(self.blocks):
            heads = self._heads(x, block, tables[layer].repeat(1, rows, 1, 1))
            q, k, v = (t.unflatten(0, (rows, n)).transpose(1, 2) for t in heads)  # (U, H or H_kv, n, K)
            cache.fill(layer, k[which], v[which])
            self._finish(x, self._attend(q, k, v, bias), block)
        return self._logits(x.unflatten(0, (rows, n))[:, -1])[which]

    def _heads(self, x: Tensor, block: FoldedBlock, turn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (M, D) -> queries (M, H, K) and keys (M, H_kv, K), normed and turned, float32; values (M, H_kv, K).

        turn: (2, [M,] H + H_kv, K)
        """
        c = self.config
        heads = block.qkv(self._norm(x)).view(len(x), -1, c.head_dim)
        straight = heads[:, : c.num_heads + c.num_kv_heads]
        y = torch.addcmul(straight * turn[0], straight.roll(c.head_dim // 2, -1), turn[1])  # float32
        norm = torch.linalg.vector_norm(straight, dim=-1, keepdim=True, dtype=torch.float32)
        y.div_(norm.square_().add_(self.head_eps**2).sqrt_())
        return y[:, : c.num_heads], y[:, c.num_heads :], heads[:, c.num_heads + c.num_kv_heads :]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        """Causal attention of a whole prefix: (R, H or H_kv, n, K) -> (R n, H K)"""
        dtype = self.attention_dtype
        q, k, v, bias = (None if t is None else t.to(dtype) for t in (q, k, v, bias))
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, bias, is_causal=bias is None, scale=1.0)  # (R, H, n, K)
        return y.transpose(1, 2).flatten(2).flatten(0, 1).to(self.compute_dtype)

    def _finish(self, x: Tensor, y: Tensor, block: FoldedBlock) -> None:
        """Adds the attention's result and the feed-forward branch to x in place."""
        x.add_(block.out(y))
        x.add_(block.down(block.gate(self._norm(x))))

    def _norm(self, x: Tensor) -> Tensor:
        """x / sqrt(|x|^2 + D eps), float32 inside; sqrt(D) is in the weights that follow."""
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        out = torch.empty(x.shape, dtype=self.compute_dtype)
        return torch.div(x, norm.square_().add_(self.eps**2).sqrt_(), out=out)

    def _logits(self, x: Tensor) -> Tensor:
        return self.head(self._norm(x))


def _distinct_rows(
    text_ids: Tensor, image_ids: Tensor | None, lines: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Texts (U, T), known image tokens (U, n) and drawings (U, N, D) of the U different rows, and which of them each
    row is: (R,)"""
    image_ids = text_ids.new_empty(len(text_ids), 0) if image_ids is None else image_ids
    number = text_ids.new_zeros(len(text_ids), 1)
    if lines is not None:  # neighbours alike have one number: rows of a drawing stand side by side
        is_new = (lines[1:] != lines[:-1]).flatten(1).any(1)
        number[1:, 0] = is_new.long().cumsum(0)
    rows, which = torch.cat([number, text_ids, image_ids], 1).unique(dim=0, return_inverse=True)
    _, text_ids, image_ids = rows.split([1, text_ids.shape[1], image_ids.shape[1]], 1)
    if lines is not None:
        first = torch.zeros(len(rows), dtype=torch.long).scatter_(0, which, torch.arange(len(which)))
        lines = lines[first]
    return text_ids, image_ids, lines, which


def fold_block(block: Block, weights: Weights, linear: type, gate: type) -> FoldedBlock:
    return FoldedBlock(
        linear(fold(block.attention.qkv.weight, block.attention_norm), weights),
        linear(block.attention.out.weight.float(), weights),
        gate(fold(block.ffn.gate_up.weight, block.ffn_norm), weights),
        linear(block.ffn.out.weight.float(), weights),
    )


def fold(weight: Tensor, norm: RMSNorm) -> Tensor:
    """The matrix after a norm takes the norm's gains and its sqrt(D): (O, D) float32."""
    return weight.float() * norm.weight.float() * weight.shape[1] ** 0.5


def rotary_with_gains(block: Block, rotary: Tensor) -> Tensor:
    """rotate(norm(x) * gain) = x / |x| * a + roll(x / |x|) * b. rotary (2, P, K) -> a and b: (2, P, 2, K) float32 for
    queries, which also take the softmax scale, and keys."""
    attention = block.attention
    width = attention.head_dim
    gains = (
        torch.stack([attention.q_norm.weight / width**0.5, attention.k_norm.weight]).float() * width**0.5
    )  # (2, K)
    rolled = gains.roll(width // 2, -1)
    return torch.stack([rotary[0][:, None] * gains, rotary[1][:, None] * rolled])
