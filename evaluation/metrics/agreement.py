"""Images and their texts: CLIP score, R-precision both ways, recall, and the attributes that the titles name.

CLIP score: Hessel et al. 2021 (arXiv:2104.08718) without its factor 2.5. R-precision against all texts is the form of
the e-commerce plan; among 100, first place, that of AttnGAN (Xu et al. 2018, arXiv:1711.10485, section 4).
"""

import numpy as np
import torch

from evaluation.compare.parts import Bench, Part
from evaluation.metrics.attributes import (
    SlotHits,
    hard_negative_hits,
    judged_categories,
    judged_colors,
    pixel_colors,
)
from evaluation.metrics.features import RankerTower
from evaluation.metrics.pixel_colors import ColorHistogram
from evaluation.metrics.resampling import Estimate, mean_estimate
from evaluation.metrics.statistics import r_precision_all, r_precision_sampled
from rankers.retrieval import KS, caption_matches, hits_at


def metrics(
    scorer: RankerTower, part: Part, top: int, among: int, seed: int
) -> dict[str, tuple[Estimate, str]]:
    """Estimate and note by name; one text alone has only a CLIP score."""
    distinct = sorted(set(part.texts))
    texts = scorer.ranker.text_features(distinct).numpy()  # (T, D)
    similarity = part.features(scorer).astype(np.float64) @ texts.T  # (N, T)
    own = np.array([distinct.index(text) for text in part.texts])
    cosines = similarity[np.arange(len(own)), own]
    found: dict[str, tuple[Estimate | None, str]] = {
        "clip_score": (
            mean_estimate(100 * np.clip(cosines, 0, None), part.resampling),
            "mean of 100 max(cosine, 0)",
        )
    }
    if len(distinct) > 1:
        hits = r_precision_all(similarity, own, top)
        found[f"r_precision_top{top}"] = (
            mean_estimate(hits, part.resampling, is_share=True),
            f"own text among the best {top} of all {len(distinct)}; by chance {min(1, top / len(distinct)):.1%}",
        )
        hits = r_precision_sampled(similarity, own, among, seed)
        others = min(among, len(distinct))
        found[f"r_precision_1_of_{others}"] = (
            mean_estimate(hits, part.resampling, is_share=True),
            f"own text first of {others}, chosen with seed {seed}; by chance {1 / others:.1%}",
        )
        found |= _recall(similarity.T, part, distinct)
    return {name: (estimate, note) for name, (estimate, note) in found.items() if estimate}


def _recall(scores: np.ndarray, part: Part, distinct: list[str]) -> dict[str, tuple[Estimate | None, str]]:
    """Text to image over all images of the part: is one of its own among the first k."""
    relevant = caption_matches(part.texts, distinct)
    index_of = {text: i for i, text in enumerate(distinct)}
    found = {}
    for k, hit in hits_at(torch.from_numpy(scores.copy()), relevant, KS).items():
        first = dict.fromkeys(part.texts)  # one value a text, at its first image
        values = np.full(len(part), np.nan)
        for text in first:
            values[part.texts.index(text)] = float(hit[index_of[text]])
        estimate = mean_estimate(values, part.resampling, is_share=True)
        note = f"{len(distinct)} texts, each looking for its images among all {len(part)}"
        found[f"recall_at_{k}"] = (estimate, note)
    return found


def attribute_hits(bench: Bench, part: Part) -> dict[str, tuple[SlotHits, str, str]]:
    """Hits, who judged and a note, by the metric's name."""
    networks, lexicon = bench.networks, bench.lexicon
    found: dict[str, tuple[SlotHits | None, str, str]] = {}
    if networks.judge:
        judge, features = networks.judge, part.features(networks.judge.network)
        for name, top in (("category_right", 1), ("category_top5", 5)):
            hits = judged_categories(judge, part.texts, features, top)
            found[f"{name}[{judge.name}]"] = (hits, judge.name, "")
        found[f"color_right[{judge.name}]"] = (
            judged_colors(judge, lexicon, part.texts, features),
            judge.name,
            "",
        )
    measured = bench.pixel_colors()
    if measured:
        histograms = part.features(ColorHistogram())
        hits = pixel_colors(measured, lexicon, part.texts, histograms)
        note = f"named by {len(measured.labels)} real images of known colour"
        found["color_right[pixels]"] = (hits, "pixels", note)
    if networks.scorer:
        scorer = networks.scorer
        images = part.features(scorer)
        for slot in lexicon.words:
            hits = hard_negative_hits(scorer.ranker, lexicon, slot, part.texts, images)
            note = "the title scores above itself with any other word for it"
            found[f"{slot}_right[{scorer.name}]"] = (hits, scorer.name, note)
    return {name: row for name, row in found.items() if row[0] is not None}
