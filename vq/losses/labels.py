"""What a small network can learn from the shards themselves: the label of an image, or the words of its caption."""

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from data_tools.shards.index import ShardIndex

LABEL_KEYS = ("label", "kind", "category", "class", "coarse")
TargetKind = Literal["auto", "label", "caption"]


@dataclass(frozen=True)
class Targets:
    """A vocabulary of labels or words, and the target of each sample."""

    kind: Literal["label", "caption"]
    names: tuple[str, ...]

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Logits (B, K), targets (B, K) of 0 and 1 -> scalar."""
        if self.kind == "label":
            return F.cross_entropy(logits.float(), targets.argmax(1), label_smoothing=0.1)
        return F.binary_cross_entropy_with_logits(logits.float(), targets)

    def hits(self, logits: Tensor, targets: Tensor) -> Tensor:
        """(B,): whether the best guess is right: the label, or one of the caption's words."""
        return targets.gather(1, logits.argmax(1, keepdim=True)).squeeze(1)

    def of(self, members: dict[str, bytes]) -> Tensor:
        """(K,) float from a sample's `json` and `txt`; all 0 where it has neither."""
        target = torch.zeros(len(self.names))
        words = {label_of(members)} if self.kind == "label" else set(words_of(members))
        for i, name in enumerate(self.names):
            target[i] = float(name in words)
        return target


def label_of(members: dict[str, bytes]) -> str:
    """The first of LABEL_KEYS in the sample's json, or ""."""
    try:
        values = json.loads(members.get("json", b"{}"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        return ""
    if not isinstance(values, dict):
        return ""
    return next((str(values[k]) for k in LABEL_KEYS if values.get(k) not in (None, "")), "")


def words_of(members: dict[str, bytes]) -> list[str]:
    """Words of the caption: runs of letters or digits, and pairs of neighbouring characters elsewhere (Chinese)."""
    text = members.get("txt", b"").decode("utf-8", errors="replace").lower()
    words = re.findall(r"[a-z0-9]+", text)
    for run in re.findall(r"[^\W_a-z0-9]+", text):
        words += [run[i : i + 2] for i in range(len(run) - 1)] or [run]
    return words


def find_targets(index: ShardIndex, kind: TargetKind = "auto", limit: int = 20_000) -> Targets:
    """From at most `limit` samples. auto: labels where 4 of 5 samples have one of at least two, else caption words.

    Raises ValueError saying what the shards lack.
    """
    step = max(1, len(index) // limit)
    samples = [index.read(i, ("json", "txt")) for i in range(0, len(index), step)]
    labels = Counter(filter(None, map(label_of, samples)))
    labelled = sum(labels.values()) >= 0.8 * len(samples) and len(labels) >= 2
    if kind == "label" and not labelled:
        raise ValueError(
            f"{sum(labels.values())} of {len(samples)} samples have a label ({', '.join(LABEL_KEYS)} in the json) of "
            f"{len(labels)} kinds, too few to learn from: use --target caption"
        )
    if kind == "label" or (kind == "auto" and labelled):
        return Targets("label", _common(labels, len(samples), 0.0))
    words = Counter(word for sample in samples for word in set(words_of(sample)))
    names = _common(words, len(samples), 0.002)
    if len(names) < 2:
        raise ValueError(
            "neither labels nor captions to learn from: fewer than two words stand in several captions"
        )
    return Targets("caption", names)


def _common(counts: Counter[str], total: int, least: float, most: float = 0.7) -> Sequence[str]:
    """At most 512 names, by frequency then name, between `least` and `most` of the samples and never once alone."""
    kept = [(n, w) for w, n in counts.items() if n >= 2 and least * total <= n <= most * total]
    return tuple(w for _, w in sorted(kept, key=lambda item: (-item[0], item[1]))[:512])
