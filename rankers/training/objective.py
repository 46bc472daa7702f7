"""The contrastive objective, and how its batch grows beyond what memory or one process holds.

InfoNCE over images and captions (CLIP, arXiv 2103.00020, section 2.3), without the pairs that are true though not
matched; captions with a wrong colour as further negatives; and the category's name among all categories' names.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from common.distributed import World
from rankers.training.pairs import describes


@dataclass(frozen=True)
class LossWeights:
    """How much each part counts."""

    label_weight: float = 1.0
    """Weight of naming the category among all categories of the data set; 0: off."""
    label_smoothing: float = 0.1
    """Probability spread over the other categories' names."""

    def __post_init__(self) -> None:
        if self.label_weight < 0 or not 0 <= self.label_smoothing < 1:
            raise ValueError("label_weight must not be negative and label_smoothing lie in [0, 1)")


@dataclass(frozen=True)
class Features:
    """Unit vectors: images, captions, captions with a wrong colour, each (B, D), categories (K, D); scale ()."""

    image: Tensor
    caption: Tensor
    twin: Tensor
    label: Tensor
    scale: Tensor


def ranker_loss(features: Features, batch: dict[str, Tensor], weights: LossWeights) -> dict[str, Tensor]:
    """`loss`, its parts, and the share of images whose own caption wins, over a whole batch.

    batch: caption (B, 2), facts (B, 2, F), has_twin (B,), label (B,); see `rankers.training.pairs.DecodePair`. Float32.
    """
    caption, facts = batch["caption"], batch["facts"]
    own = torch.arange(len(caption), device=caption.device)
    elsewhere = ~torch.eye(len(caption), dtype=torch.bool, device=caption.device)
    true, twin_true = (
        describes(caption[:, i], facts[:, i], caption[:, 0], facts[:, 0]) & elsewhere for i in (0, 1)
    )  # (B, B) images x captions
    logits = features.scale * features.image @ features.caption.T  # (B, B)
    twin_logits = features.scale * features.image @ features.twin.T  # (B, B)
    logits = logits.masked_fill(true, float("-inf"))
    twin_logits = twin_logits.masked_fill(twin_true | ~batch["has_twin"][None], float("-inf"))
    to_text = F.cross_entropy(torch.cat([logits, twin_logits], dim=1), own)
    to_image = F.cross_entropy(logits.T, own)
    loss = (to_text + to_image) / 2
    parts = {"contrastive": loss, "batch_accuracy": (logits.argmax(1) == own).float().mean()}
    if weights.label_weight and len(features.label) and bool((batch["label"] >= 0).any()):
        names = features.scale * features.image @ features.label.T  # (B, K)
        named = F.cross_entropy(
            names, batch["label"], ignore_index=-1, label_smoothing=weights.label_smoothing
        )
        loss = loss + weights.label_weight * named
        parts["label"] = named
    return {"loss": loss, **parts}


TARGETS = ("caption", "facts", "has_twin", "label")


def large_batch_step(
    engine: Any,
    micro_batches: Sequence[dict[str, Tensor]],
    label_ids: Tensor,
    weights: LossWeights,
    world: World,
    seed: int,
    forward: Callable[[Any, dict[str, Tensor], Tensor], Features],
) -> dict[str, float]:
    """Backward of one loss over all micro-batches of all processes, as if they were one batch.

    Features first, without a graph; then the loss and its gradient at the features; then each micro-batch again with
    a graph, driven by that gradient (GradCache, arXiv 2101.06983; open_clip's accum_freq). One micro-batch needs no
    second pass. The generators are seeded alike in both passes, so dropout is the same.
    """
    count = len(micro_batches)
    engine.accumulation = count
    graph: Features | None = None
    if count == 1:
        torch.manual_seed(seed)
        graph = forward(engine.model, micro_batches[0], label_ids)
        kept = [graph]
    else:
        kept = []
        for i, micro in enumerate(micro_batches):
            torch.manual_seed(seed + i)
            with torch.no_grad():
                kept.append(forward(engine.model, micro, label_ids))
    leaves = _leaves(kept)
    targets = {name: _gather(torch.cat([m[name] for m in micro_batches]), world) for name in TARGETS}
    parts = ranker_loss(_everyones(leaves, world), targets, weights)
    parts["loss"].backward()
    size = len(leaves.image) // count
    for i, micro in enumerate(engine.micro_batches({"part": list(range(count))}, count)):
        part = micro["part"][0]
        if graph is None:
            torch.manual_seed(seed + part)
            features = forward(engine.model, micro_batches[part], label_ids)
        else:
            features = graph
        engine.backward(_surrogate(features, leaves, slice(i * size, (i + 1) * size), count * world.size))
    return {name: float(value.detach()) for name, value in parts.items()}


def _leaves(kept: Sequence[Features]) -> Features:
    """All micro-batches' features, cut off from their graphs; categories and scale from the last."""

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().clone().requires_grad_()

    rows = {n: leaf(torch.cat([getattr(f, n) for f in kept])) for n in ("image", "caption", "twin")}
    return Features(**rows, label=leaf(kept[-1].label), scale=leaf(kept[-1].scale))


def _surrogate(features: Features, leaves: Features, rows: slice, factor: float) -> Tensor:
    """A scalar whose gradient in the weights is that of the loss.

    The engine divides by the number of micro-batches and averages over processes: rows belong to one of each, hence
    `factor`; categories and scale are seen by all.
    """
    own = sum(
        (getattr(features, n) * getattr(leaves, n).grad[rows]).sum() for n in ("image", "caption", "twin")
    )
    shared = (features.scale * leaves.scale.grad).sum()
    if leaves.label.grad is not None:
        shared = shared + (features.label * leaves.label.grad).sum()
    else:
        shared = shared + 0.0 * features.label.sum()  # every weight needs a gradient under DDP
    return factor * own + shared


def _everyones(leaves: Features, world: World) -> Features:
    """The rows of all processes; only this one's carry gradients."""
    if world.size == 1:
        return leaves
    rows = {}
    for name in ("image", "caption", "twin"):
        mine = getattr(leaves, name)
        parts = list(_gather(mine.detach(), world).split(len(mine)))
        parts[world.rank] = mine
        rows[name] = torch.cat(parts)
    return Features(**rows, label=leaves.label, scale=leaves.scale)


def _gather(tensor: Tensor, world: World) -> Tensor:
    if world.size == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(world.size)]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)
