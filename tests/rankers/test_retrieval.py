import math

import pytest
import torch
from tiny_goods import COLORS, KINDS, draw

from data_tools.shards.index import ShardIndex
from rankers import load_ranker
from rankers.retrieval import Pairs, caption_matches, chance_recall, load_pairs, recall_at, retrieval_metrics
from rankers.training.pairs import AttributeConfig


def test_recall_by_hand():
    scores = torch.tensor([[0.9, 0.1, 0.5, 0.3], [0.2, 0.1, 0.4, 0.3]])
    relevant = torch.tensor([[0, 0, 1, 0], [0, 1, 0, 1]]).bool()
    assert recall_at(scores, relevant, (1, 2, 3)) == {"recall@1": 0.0, "recall@2": 1.0, "recall@3": 1.0}
    assert recall_at(torch.zeros(2, 4), relevant, (1, 2)) == {"recall@1": 0.0, "recall@2": 0.0}


def test_chance_is_what_random_scores_reach():
    relevant = torch.zeros(200, 30, dtype=torch.bool)
    relevant[:, :3] = True
    chance = chance_recall(relevant, (1, 5, 10))
    assert chance["recall@1"] == pytest.approx(0.1)
    assert chance["recall@5"] == pytest.approx(1 - math.comb(27, 5) / math.comb(30, 5))
    generator = torch.Generator().manual_seed(0)
    runs = [
        recall_at(torch.rand(200, 30, generator=generator), relevant, (5,))["recall@5"] for _ in range(20)
    ]
    assert sum(runs) / 20 == pytest.approx(chance["recall@5"], abs=0.03)
    assert chance_recall(torch.ones(1, 3, dtype=torch.bool), (10,)) == {"recall@10": 1.0}


def test_equal_captions_are_all_relevant():
    matches = caption_matches(["a", "b", "a"], ["a", "b"])
    assert matches.tolist() == [[True, False, True], [False, True, False]]


class Knowing:
    """Scores by what the words and the image's centre say, as a perfect ranker would."""

    name, calibration = "knowing", None

    def __init__(self, pairs: Pairs) -> None:
        self.known = {image.tobytes(): i for i, image in enumerate(pairs.images)}
        self.pairs = pairs

    def score_matrix(self, texts, images):
        rows = [self.known[image.tobytes()] for image in images]
        return torch.tensor([[self._score(text, row) for row in rows] for text in texts])

    def _score(self, text: str, row: int) -> float:
        named = [c for c in COLORS if c in text]
        color = self.pairs.colors[row]
        return float(self.pairs.labels[row] in text) + 0.5 * (not named or named[0] == color)


def test_metrics_of_a_perfect_and_of_a_random_ranker(shards, ranker_dir):
    pairs = load_pairs(ShardIndex.open(shards, "val"), AttributeConfig(fact_fields=("label_zh", "color_zh")))
    assert len(pairs.captions) == 24 and set(pairs.labels) == set(KINDS)
    perfect = retrieval_metrics(Knowing(pairs), pairs, KINDS, tuple(COLORS))
    assert perfect["kind_accuracy"] == perfect["color_accuracy"] == perfect["true@1"] == 1.0
    random = retrieval_metrics(load_ranker(ranker_dir), pairs, KINDS, tuple(COLORS))
    assert set(random) == set(perfect) and random["recall@1"] < 0.6
    assert all(0 <= v <= 1 for v in random.values())
    bare = Pairs(pairs.images, pairs.captions, [""] * 24, [""] * 24, torch.zeros(24, 0, dtype=torch.long))
    assert set(retrieval_metrics(Knowing(pairs), bare, (), ())) == {"recall@1", "recall@5", "recall@10"}


def test_unreadable_samples_are_left_out(tmp_path, capsys):
    import io

    from data_tools.ingest.records import Record
    from data_tools.shards.image_shards import ShardWriter

    buffer = io.BytesIO()
    draw("杯子", "红色", 0).save(buffer, "PNG")
    with ShardWriter(tmp_path, "val") as writer:
        writer.write(Record("a", buffer.getvalue(), "png", ("红色杯子",), {}))
        writer.write(Record("b", buffer.getvalue()[:50], "png", ("红色杯子",), {}))
        writer.write(Record("c", buffer.getvalue(), "png", (), {}))
    pairs = load_pairs(ShardIndex.open(tmp_path, "val"), AttributeConfig())
    assert pairs.captions == ["红色杯子"] and "left out 2 samples" in capsys.readouterr().out
