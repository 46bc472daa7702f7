"""Quantizers: continuous latents -> entries of a codebook, with gradients past the rounding.

`vq` follows VQ-VAE (van den Oord et al. 2017, arXiv:1711.00937, equation 3) with the factorised, l2-normalised codes
of ViT-VQGAN (Yu et al. 2021, arXiv:2110.04627, section 3.2), a k-means start and the revival of dead codes.
`ema` moves the same codebook by running means of its clusters (same paper, appendix A.1).
`gumbel` draws a code from logits (Ramesh et al. 2021, arXiv:2102.12092, section 2.1: the dVAE of DALL-E).
`fsq` rounds each of a few channels to a few levels (Mentzer et al. 2023, arXiv:2309.15505, section 3).
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NEAREST_BLOCK = 1024  # points compared with the codebook at once


@dataclass(frozen=True)
class Quantized:
    """What a quantizer returns."""

    latents: Tensor
    """(B, D, h, w): the chosen entries, gradients passed straight through."""
    ids: Tensor
    """(B, h, w) long."""
    loss: Tensor
    """Scalar, float32."""


@dataclass(frozen=True)
class GumbelConfig:
    """How `gumbel` draws codes in training; encoding always takes the most likely one."""

    start_temperature: float = 1.0
    """Temperature of the first step."""
    end_temperature: float = 0.5
    """Temperature from `anneal_share` of the run on; it falls geometrically until there."""
    anneal_share: float = 0.7
    """Share of the run over which the temperature falls, in (0, 1]."""
    straight_through: bool = True
    """Decode the drawn code rather than the soft mixture."""
    kl_weight: float = 5.0e-4
    """Weight of the divergence from the uniform distribution over codes."""

    def __post_init__(self) -> None:
        if not 0 < self.end_temperature <= self.start_temperature:
            raise ValueError(
                f"temperatures must fall and stay above 0, not {self.start_temperature} -> {self.end_temperature}"
            )
        if not 0 < self.anneal_share <= 1 or self.kl_weight < 0:
            raise ValueError(f"anneal_share must lie in (0, 1] and kl_weight not be negative, not {self}")

    def temperature(self, progress: float) -> float:
        """At `progress` in [0, 1] of the run."""
        share = min(1.0, progress / self.anneal_share)
        return self.start_temperature * (self.end_temperature / self.start_temperature) ** share


class VectorQuantizer(nn.Module):
    """Nearest entry of a learned codebook of unit vectors (or of free vectors with `l2_normalize` off).

    With `depth` above 1 what an entry leaves over goes to the nearest entry of a further codebook of free vectors, and
    so on; the latent is their sum (RQ-VAE, Lee et al. 2022, arXiv:2203.01941, section 3.1). The codes of a position are
    one number: its digits in base `codebook_size`, the first level the most significant. In training some images are
    decoded from their first levels alone (`level_dropout`), so that a decoder serves both.
    """

    has_codebook = True  # entries can be set anew: k-means start, revival

    def __init__(
        self,
        codebook_size: int,
        codebook_dim: int,
        commit_weight: float = 0.25,
        l2_normalize: bool = True,
        depth: int = 1,
        level_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.codebook_size, self.codebook_dim, self.depth = codebook_size, codebook_dim, depth
        self.level_dropout = level_dropout
        self.commit_weight, self.l2_normalize = commit_weight, l2_normalize
        self.codebook = nn.Embedding(depth * codebook_size, codebook_dim)
        nn.init.normal_(self.codebook.weight, std=codebook_dim**-0.5)
        with torch.no_grad():
            for level in range(1, depth):  # what is left over gets shorter from level to level
                self.codebook.weight[level * codebook_size : (level + 1) * codebook_size] *= 0.5**level

    def entries(self, level: int = 0) -> Tensor:
        """(V, D) codebook of a level as it is compared with."""
        rows = self.codebook.weight[level * self.codebook_size : (level + 1) * self.codebook_size]
        return F.normalize(rows, dim=-1) if self.l2_normalize and level == 0 else rows

    def forward(self, latents: Tensor) -> Quantized:
        """(B, D, h, w) -> Quantized; distances in float32, the first entry wins ties."""
        with torch.autocast(latents.device.type, enabled=False):
            z = self.normalize(latents)  # (B, h, w, D)
            fixed = z.detach()
            total, ids, loss = torch.zeros_like(z), 0, 0.0
            levels = self._decoded_levels(z)
            decoded = total
            for level in range(self.depth):
                entries = self.entries(level)
                rest = (fixed - total).reshape(-1, self.codebook_dim)
                digit = self.nearest(rest, entries.detach()).view(z.shape[:-1])
                chosen = total + F.embedding(digit, entries)  # (B, h, w, D)
                loss = loss + self._loss(z, chosen, digit)
                total, ids = chosen.detach(), ids * self.codebook_size + digit
                decoded = torch.where(levels > level, total, decoded)
            passed = z + (decoded - z).detach()
        return Quantized(passed.permute(0, 3, 1, 2), ids, loss * (self.codebook_dim / self.depth))

    def _decoded_levels(self, z: Tensor) -> Tensor:
        """(B, 1, 1, 1): how many levels of each image are decoded."""
        levels = torch.full((len(z), 1, 1, 1), self.depth, device=z.device)
        if not self.training or self.depth == 1 or not self.level_dropout:
            return levels
        dropped = torch.rand(levels.shape, device=z.device) < self.level_dropout
        return torch.where(dropped, torch.randint_like(levels, 1, self.depth), levels)

    def _loss(self, z: Tensor, chosen: Tensor, ids: Tensor) -> Tensor:
        return F.mse_loss(chosen, z.detach()) + self.commit_weight * F.mse_loss(z, chosen.detach())

    def normalize(self, latents: Tensor) -> Tensor:
        """(B, D, h, w) -> (B, h, w, D) float32 points as they are compared with the codebook."""
        z = latents.float().permute(0, 2, 3, 1)
        return F.normalize(z, dim=-1) if self.l2_normalize else z

    def digits(self, ids: Tensor) -> Tensor:
        """(...) -> (depth, ...): the code of each level."""
        powers = [self.codebook_size**i for i in reversed(range(self.depth))]
        return torch.stack([ids // power % self.codebook_size for power in powers])

    def rest(self, points: Tensor, level: int) -> Tensor:
        """(M, D) -> (M, D): what the levels before `level` leave over."""
        for before in range(level):
            entries = self.entries(before).detach()
            points = points - entries[self.nearest(points, entries)]
        return points

    @staticmethod
    def nearest(z: Tensor, entries: Tensor) -> Tensor:
        """(M, D), (V, D) -> (M,) long: argmin of squared distance."""
        # |z|^2 is the same for all. The product carries |e|^2 along, and a block of scores stays in the cache.
        ones = torch.ones_like(z[:, :1])
        points = torch.cat([z, ones], dim=1)  # (M, D + 1)
        codes = torch.cat([-2.0 * entries, entries.square().sum(1, keepdim=True)], dim=1).t()
        return torch.cat([(block @ codes).argmin(dim=1) for block in points.split(NEAREST_BLOCK)])

    def lookup(self, ids: Tensor) -> Tensor:
        """(B, h, w) long -> (B, D, h, w)."""
        chosen = [F.embedding(digit, self.entries(level)) for level, digit in enumerate(self.digits(ids))]
        return sum(chosen[1:], chosen[0]).permute(0, 3, 1, 2)

    @torch.no_grad()
    def replace_(self, rows: Tensor, vectors: Tensor) -> None:
        """Set codebook rows (n,), all of one level, to `vectors` (n, D)."""
        unit = self.l2_normalize and bool((rows < self.codebook_size).all())
        self.codebook.weight[rows] = F.normalize(vectors, dim=-1) if unit else vectors


class EmaQuantizer(VectorQuantizer):
    """The codebook follows the running mean of the latents nearest to each entry; it has no gradient.

    A forward pass in training mode notes counts and sums; `update_` applies those of all passes and processes.
    """

    def __init__(
        self, codebook_size: int, codebook_dim: int, commit_weight: float, l2_normalize: bool, decay: float
    ) -> None:
        super().__init__(codebook_size, codebook_dim, commit_weight, l2_normalize)
        self.decay = decay
        self.codebook.weight.requires_grad_(False)
        self.register_buffer("cluster_size", torch.ones(codebook_size))
        self.register_buffer("cluster_sum", self.entries().detach().clone())
        self.noted: Tensor | None = None  # (V, 1 + D): counts and sums since the last update

    def _loss(self, z: Tensor, chosen: Tensor, ids: Tensor) -> Tensor:
        if self.training:
            self._note(z.detach().reshape(-1, self.codebook_dim), ids.flatten())
        return self.commit_weight * F.mse_loss(z, chosen.detach())

    @torch.no_grad()
    def _note(self, points: Tensor, ids: Tensor) -> None:
        """Points (M, D) and their codes (M,)."""
        rows = torch.cat([torch.ones_like(points[:, :1]), points], dim=1)
        noted = points.new_zeros(self.codebook_size, 1 + self.codebook_dim).index_add_(0, ids, rows)
        self.noted = noted if self.noted is None else self.noted + noted

    @torch.no_grad()
    def update_(self, world: Any = None) -> None:
        """Move the codebook by what was noted on all processes of `world` since the last update."""
        if self.noted is None:
            return
        noted = self.noted if world is None else world.sum_(self.noted)
        self.cluster_size.lerp_(noted[:, 0], 1 - self.decay)
        self.cluster_sum.lerp_(noted[:, 1:], 1 - self.decay)
        means = self.cluster_sum / self.cluster_size.clamp(min=1e-3).unsqueeze(1)
        live = (self.cluster_size > 1e-3).unsqueeze(1)
        means = F.normalize(means, dim=-1) if self.l2_normalize else means
        self.codebook.weight.copy_(torch.where(live, means, self.codebook.weight))
        self.noted = None

    @torch.no_grad()
    def replace_(self, rows: Tensor, vectors: Tensor) -> None:
        super().replace_(rows, vectors)
        self.cluster_size[rows] = 1.0
        self.cluster_sum[rows] = self.entries()[rows]


class GumbelQuantizer(nn.Module):
    """Logits over the codebook from a 1x1 convolution; training draws a code, encoding takes the most likely one."""

    has_codebook = False

    def __init__(self, latent_dim: int, codebook_size: int, codebook_dim: int, config: GumbelConfig) -> None:
        super().__init__()
        self.codebook_size, self.codebook_dim, self.config = codebook_size, codebook_dim, config
        self.temperature = config.start_temperature
        self.proj = nn.Conv2d(latent_dim, codebook_size, 1)
        # logits with a spread of about 2: with PyTorch's 0.2 the first draws are noise and the encoder learns nothing
        nn.init.normal_(self.proj.weight, std=5 / math.sqrt(latent_dim))
        nn.init.zeros_(self.proj.bias)
        self.codebook = nn.Embedding(codebook_size, codebook_dim)

    def forward(self, latents: Tensor) -> Quantized:
        """(B, latent_dim, h, w) -> Quantized with latents (B, D, h, w)."""
        with torch.autocast(latents.device.type, enabled=False):
            logits = self.proj(latents.float())  # (B, V, h, w)
            ids = logits.argmax(1)
            if not self.training:
                return Quantized(self.lookup(ids), ids, logits.new_zeros(()))
            drawn = F.gumbel_softmax(logits, self.temperature, hard=self.config.straight_through, dim=1)
            mixed = torch.einsum("bvhw,vd->bdhw", drawn, self.codebook.weight)
            logs = F.log_softmax(logits, dim=1)
            divergence = (
                (logs.exp() * (logs + math.log(self.codebook_size))).sum(1).mean()
            )  # KL to uniform, in nats
        return Quantized(mixed, ids, self.config.kl_weight * divergence)

    def lookup(self, ids: Tensor) -> Tensor:
        """(B, h, w) long -> (B, D, h, w)."""
        return self.codebook(ids).permute(0, 3, 1, 2)


class FiniteScalarQuantizer(nn.Module):
    """Each channel is bounded by tanh and rounded to one of its levels; a code is the mixed-radix number of them.

    The bins lie evenly around 0 for even numbers of levels too; the shift of the published code, which puts 0 into a
    bin's middle, leaves two levels without a gradient.
    """

    has_codebook = False

    def __init__(self, levels: tuple[int, ...]) -> None:
        super().__init__()
        self.levels = levels
        self.codebook_size, self.codebook_dim = math.prod(levels), len(levels)
        basis = [math.prod(levels[:i]) for i in range(len(levels))]
        self.register_buffer("size", torch.tensor(levels), persistent=False)
        self.register_buffer("basis", torch.tensor(basis), persistent=False)

    def forward(self, latents: Tensor) -> Quantized:
        """(B, D, h, w) -> Quantized; there is no loss to add."""
        with torch.autocast(latents.device.type, enabled=False):
            z = latents.float().permute(0, 2, 3, 1)  # (B, h, w, D)
            half = (self.size - 1) * (1 + 1e-3) / 2
            offset = torch.where(self.size % 2 == 0, 0.5, 0.0)
            bounded = z.tanh() * half - offset
            steps = (
                bounded + (bounded.round() - bounded).detach()
            )  # whole numbers, half of the levels below 0
            ids = ((steps.detach().round().long() + self.size // 2) * self.basis).sum(-1)
        return Quantized((steps / (self.size // 2)).permute(0, 3, 1, 2), ids, z.new_zeros(()))

    def lookup(self, ids: Tensor) -> Tensor:
        """(B, h, w) long -> (B, D, h, w)."""
        digits = ids.unsqueeze(-1) // self.basis % self.size
        half = self.size // 2
        return ((digits - half) / half).permute(0, 3, 1, 2)


@torch.no_grad()
def kmeans(points: Tensor, k: int, iterations: int, generator: torch.Generator) -> Tensor:
    """Lloyd's algorithm on (M, D) points, M >= k -> (k, D) centres; empty clusters restart at random points."""
    centres = points[torch.randperm(len(points), generator=generator)[:k]].clone()
    for _ in range(iterations):
        ids = VectorQuantizer.nearest(points, centres)
        counts = torch.bincount(ids, minlength=k)
        sums = torch.zeros_like(centres).index_add_(0, ids, points)
        centres = sums / counts.clamp(min=1).unsqueeze(1)
        empty = (counts == 0).nonzero().squeeze(1)
        if len(empty):
            centres[empty] = points[torch.randint(len(points), (len(empty),), generator=generator)]
    return centres


class CodeUsage:
    """Counts of codes over a window of images: usage, perplexity and dead codes mean something only over many."""

    def __init__(self, codebook_size: int, depth: int = 1) -> None:
        self.size, self.depth = codebook_size, depth
        self.counts = torch.zeros(depth * codebook_size, dtype=torch.long)

    def add(self, ids: Tensor) -> None:
        """Codes of positions, the digits of all levels in one number."""
        ids = ids.flatten().cpu()
        for level in reversed(range(self.depth)):
            digits = ids % self.size + level * self.size
            self.counts += torch.bincount(digits, minlength=len(self.counts))
            ids = ids // self.size

    def clear(self) -> None:
        self.counts.zero_()

    def metrics(self) -> dict[str, float]:
        """usage: share of codes seen; dead_codes: never seen; perplexity: exp of the entropy of their frequencies, the
        geometric mean over levels."""
        counts = self.counts.double().view(self.depth, self.size)
        share = counts / counts.sum(1, keepdim=True).clamp(min=1)
        entropy = -(share * share.clamp(min=1e-12).log()).sum(1).mean()
        dead = int((self.counts == 0).sum())
        return {
            "usage": 1 - dead / len(self.counts),
            "perplexity": float(entropy.exp()),
            "dead_codes": float(dead),
        }
