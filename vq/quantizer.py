"""Quantizers: continuous latents -> entries of a codebook, with straight-through gradients.

`vq` follows VQ-VAE (van den Oord et al. 2017, arXiv:1711.00937, equation 3) with the factorised, l2-normalised codes
of ViT-VQGAN (Yu et al. 2021, arXiv:2110.04627, section 3.2), a k-means start and the revival of dead codes.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Quantized:
    """What a quantizer returns."""

    latents: Tensor
    """(B, D, h, w): the chosen entries, gradients passed straight through."""
    ids: Tensor
    """(B, h, w) long."""
    loss: Tensor
    """Scalar, float32."""


class VectorQuantizer(nn.Module):
    """Nearest entry of a learned codebook of unit vectors (or of free vectors with `l2_normalize` off)."""

    def __init__(
        self, codebook_size: int, codebook_dim: int, commit_weight: float = 0.25, l2_normalize: bool = True
    ) -> None:
        super().__init__()
        self.codebook_size, self.codebook_dim = codebook_size, codebook_dim
        self.commit_weight, self.l2_normalize = commit_weight, l2_normalize
        self.codebook = nn.Embedding(codebook_size, codebook_dim)
        nn.init.normal_(self.codebook.weight, std=codebook_dim**-0.5)

    def entries(self) -> Tensor:
        """(V, D) codebook as it is compared with."""
        return F.normalize(self.codebook.weight, dim=-1) if self.l2_normalize else self.codebook.weight

    def forward(self, latents: Tensor) -> Quantized:
        """(B, D, h, w) -> Quantized; distances in float32, the first entry wins ties."""
        with torch.autocast(latents.device.type, enabled=False):
            z = self.normalize(latents)  # (B, h, w, D)
            entries = self.entries()
            ids = self.nearest(z.detach().reshape(-1, self.codebook_dim), entries.detach()).view(z.shape[:-1])
            chosen = F.embedding(ids, entries)  # (B, h, w, D)
            loss = F.mse_loss(chosen, z.detach()) + self.commit_weight * F.mse_loss(z, chosen.detach())
            passed = z + (chosen - z).detach()
        return Quantized(passed.permute(0, 3, 1, 2), ids, loss * self.codebook_dim)

    def normalize(self, latents: Tensor) -> Tensor:
        """(B, D, h, w) -> (B, h, w, D) float32 points as they are compared with the codebook."""
        z = latents.float().permute(0, 2, 3, 1)
        return F.normalize(z, dim=-1) if self.l2_normalize else z

    @staticmethod
    def nearest(z: Tensor, entries: Tensor) -> Tensor:
        """(M, D), (V, D) -> (M,) long: argmin of squared distance."""
        scores = entries.square().sum(1) - 2.0 * z @ entries.t()  # (M, V), |z|^2 is the same for all
        return scores.argmin(dim=1)

    def lookup(self, ids: Tensor) -> Tensor:
        """(B, h, w) long -> (B, D, h, w)."""
        return F.embedding(ids, self.entries()).permute(0, 3, 1, 2)

    @torch.no_grad()
    def replace_(self, rows: Tensor, vectors: Tensor) -> None:
        """Set codebook rows (n,) to `vectors` (n, D)."""
        self.codebook.weight[rows] = F.normalize(vectors, dim=-1) if self.l2_normalize else vectors


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

    def __init__(self, codebook_size: int) -> None:
        self.counts = torch.zeros(codebook_size, dtype=torch.long)

    def add(self, ids: Tensor) -> None:
        self.counts += torch.bincount(ids.flatten().cpu(), minlength=len(self.counts))

    def clear(self) -> None:
        self.counts.zero_()

    def figures(self) -> dict[str, float]:
        """usage: share of codes seen; perplexity: exp of the entropy of their frequencies; dead_codes: never seen."""
        share = self.counts.double() / self.counts.sum().clamp(min=1)
        entropy = -(share * share.clamp(min=1e-12).log()).sum()
        dead = int((self.counts == 0).sum())
        size = len(self.counts)
        return {"usage": 1 - dead / size, "perplexity": float(entropy.exp()), "dead_codes": float(dead)}
