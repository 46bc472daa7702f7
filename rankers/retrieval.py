"""How well a ranker finds images by their captions: recall over captions; categories and colours told right."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from common.log import say
from data_tools.rules.colors import find_color, with_color
from data_tools.shards.captions import pick_caption
from data_tools.shards.index import ShardIndex
from data_tools.shards.loader import IMAGE_SUFFIXES, CorruptSample, open_image
from rankers.training.pairs import AttributeConfig, describes, facts_of, number, read_meta, value_of

KS = (1, 5, 10)


@dataclass(frozen=True)
class Pairs:
    """Images with their first captions, labels and colours ("" where unknown)."""

    images: list[Image.Image]
    captions: list[str]
    labels: list[str]
    colors: list[str]
    facts: Tensor
    """(N, F) long, see `rankers.training.pairs.facts_of`."""

    def describes(self) -> Tensor:
        """Whether caption j is true of image i, (N, N) bool."""
        numbers = torch.tensor([number(c) for c in self.captions])
        return describes(numbers, self.facts, numbers, self.facts)


def load_pairs(index: ShardIndex, config: AttributeConfig, limit: int = 1000) -> Pairs:
    """The first `limit` samples with image and caption; the others are counted. Raises ValueError for none."""
    rows, skipped = [], 0
    for i in range(len(index)):
        if len(rows) == limit:
            break
        members = index.read(i, (*IMAGE_SUFFIXES, "txt", "json"))
        caption = pick_caption(members.get("txt", b""), None)
        try:
            image = open_image(next((members[s] for s in IMAGE_SUFFIXES if s in members), b""))
            meta = read_meta(members.get("json", b""))
        except CorruptSample:
            skipped += 1
            continue
        if not caption:
            skipped += 1
            continue
        named = find_color(caption, [value_of(meta, config.color_field)])[0]
        facts = facts_of(meta, config.fact_fields)
        rows.append((image, caption, value_of(meta, config.label_field), named, facts))
    if skipped:
        say(f"left out {skipped} samples of {index.paths[0].parent} without a readable image or a caption")
    if not rows:
        raise ValueError(f"{index.paths[0].parent} holds no image with a caption")
    images, captions, labels, colors, facts = (list(column) for column in zip(*rows, strict=True))
    return Pairs(images, captions, labels, colors, torch.tensor(facts, dtype=torch.long))


def hits_at(scores: Tensor, relevant: Tensor, ks: Sequence[int] = KS) -> dict[int, Tensor]:
    """Whether a relevant item is among the best k, (Q,) bool by k; scores (Q, N), relevant (Q, N) bool.

    Items of equal score count as if the irrelevant ones came first, so that a constant ranker gets no credit.
    """
    best = scores.masked_fill(~relevant, float("-inf")).max(1).values  # (Q,)
    before = ((scores >= best[:, None]) & ~relevant).sum(1)  # irrelevant items that stand before it
    return {k: before < k for k in ks}


def recall_at(scores: Tensor, relevant: Tensor, ks: Sequence[int] = KS) -> dict[str, float]:
    """Share of queries with a relevant item among the best k."""
    return {f"recall@{k}": float(hit.float().mean()) for k, hit in hits_at(scores, relevant, ks).items()}


def chance_recall(relevant: Tensor, ks: Sequence[int] = KS) -> dict[str, float]:
    """The same for a random order: 1 - C(N - R, k) / C(N, k) averaged over queries with R relevant items of N."""
    count, n = relevant.sum(1).double(), relevant.shape[1]
    chances = {}
    for k in ks:
        miss = torch.ones_like(count)
        for i in range(min(k, n)):
            miss = miss * ((n - count - i) / (n - i)).clamp(min=0)
        chances[f"recall@{k}"] = float(1 - miss.mean())
    return chances


def retrieval_metrics(
    ranker: Any, pairs: Pairs, labels: Sequence[str], colors: Sequence[str], color_limit: int = 100
) -> dict[str, float]:
    """recall@1/5/10 of text to image over distinct captions (an image is relevant when its caption is equal);
    `true@1`, the share of captions that are true of the first image; `kind_accuracy`, images nearest to their own
    label's name; `color_accuracy`, images whose own caption beats the ones with another colour (first `color_limit`).

    The last three are there where the data know labels and colours.
    """
    distinct = sorted(set(pairs.captions))
    first = [pairs.captions.index(c) for c in distinct]
    scores = ranker.score_matrix(distinct, pairs.images)  # (T, N)
    relevant = caption_matches(pairs.captions, distinct)
    metrics = recall_at(scores, relevant)
    if pairs.facts.shape[1]:
        true = pairs.describes()[:, first].T  # (T, N)
        metrics["true@1"] = float(true.gather(1, scores.argmax(1, keepdim=True)).float().mean())
    known = [i for i, label in enumerate(pairs.labels) if label in set(labels)]
    if known and len(labels) > 1:
        named = ranker.score_matrix(list(labels), [pairs.images[i] for i in known]).argmax(0)
        right = [labels[int(n)] == pairs.labels[i] for n, i in zip(named, known, strict=True)]
        metrics["kind_accuracy"] = sum(right) / len(right)
    colored = [i for i, color in enumerate(pairs.colors) if color][:color_limit]
    if colored and len(colors) > 1:
        metrics["color_accuracy"] = _color_accuracy(ranker, pairs, colored, colors)
    return metrics


def _color_accuracy(ranker: Any, pairs: Pairs, rows: Sequence[int], colors: Sequence[str]) -> float:
    right = 0
    for i in rows:
        others = [c for c in colors if c != pairs.colors[i]]
        texts = [with_color(pairs.captions[i], pairs.colors[i], c) for c in (pairs.colors[i], *others)]
        right += int(ranker.score_matrix(texts, [pairs.images[i]]).argmax() == 0)
    return right / len(rows)


def caption_matches(captions: Sequence[str], distinct: Sequence[str]) -> Tensor:
    """(T, N) bool: image n carries distinct caption t."""
    number_of = {c: i for i, c in enumerate(distinct)}
    matches = torch.zeros(len(distinct), len(captions), dtype=torch.bool)
    matches[torch.tensor([number_of[c] for c in captions]), torch.arange(len(captions))] = True
    return matches
