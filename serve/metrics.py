"""What Prometheus reads at /metrics, and how far ranker scores have drifted from a reference window."""

from collections import deque

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from serve.messages import Done, Fill

LATENCY_BUCKETS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120)
SCORE_BUCKETS = tuple(round(0.05 * i, 2) for i in range(-4, 21))
REFERENCE, RECENT = 1000, 200  # scores of the first and of the last images


class Metrics:
    """One registry for each application, so that tests do not share counts."""

    def __init__(self) -> None:
        self.registry = r = CollectorRegistry()
        self.requests = Counter(
            "requests_total", "Requests by endpoint and status", ["endpoint", "status"], registry=r
        )
        self.refused = Counter("refused_total", "Requests refused, by code", ["code"], registry=r)
        self.images = Counter("images_total", "Images answered", registry=r)
        self.tokens = Counter("tokens_total", "Image tokens sampled", registry=r)
        self.queued = Gauge("queued_images", "Images that wait or are being sampled", registry=r)
        self.fill = Gauge("batch_fill_ratio", "Images being sampled, as a share of the batch", registry=r)
        self.ready = Gauge("model_ready", "1 when the model worker takes requests", registry=r)
        self.restarts = Gauge("worker_restarts", "Times that the model worker was started again", registry=r)
        self.latency = Histogram(
            "stage_seconds", "Time of a request by stage", ["stage"], buckets=LATENCY_BUCKETS, registry=r
        )
        self.scores = Histogram(
            "ranker_score", "Scores of answered images", buckets=SCORE_BUCKETS, registry=r
        )
        self.drift = Gauge(
            "ranker_score_drift",
            "Kolmogorov-Smirnov distance of the last scores to the first ones",
            registry=r,
        )
        self.reference: list[float] = []
        self.recent: deque[float] = deque(maxlen=RECENT)

    def answered(self, done: Done) -> None:
        """Count what a request gave."""
        self.images.inc(len(done.images))
        for stage, seconds in done.stage_seconds.items():
            self.latency.labels(stage).observe(seconds)
        for image in done.images:
            if image.score is None:
                continue
            self.scores.observe(image.score)
            self.recent.append(image.score)
            if len(self.reference) < REFERENCE:
                self.reference.append(image.score)
        if len(self.reference) == REFERENCE and len(self.recent) == RECENT:
            self.drift.set(ks_distance(self.reference, self.recent))

    def filled(self, fill: Fill, max_images: int) -> None:
        """Take over what the worker told."""
        self.fill.set(fill.active / max_images)
        self.tokens.inc(fill.tokens)

    def text(self) -> bytes:
        return generate_latest(self.registry)


def ks_distance(first, second) -> float:
    """Largest difference of two empirical distribution functions (Kolmogorov and Smirnov)."""
    first, second = np.sort(np.asarray(first)), np.sort(np.asarray(second))
    points = np.concatenate([first, second])
    of_first = np.searchsorted(first, points, side="right") / len(first)
    of_second = np.searchsorted(second, points, side="right") / len(second)
    return float(np.abs(of_first - of_second).max())
