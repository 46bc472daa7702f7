import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from common.distributed import World
from common.engines.plain import PlainEngine
from rankers.training.objective import Features, LossWeights, large_batch_step, ranker_loss
from rankers.training.pairs import describes, facts_of, number

WORLD = World(0, 1, 0, torch.device("cpu"), "none")


def random_features(count: int, labels: int = 3, dim: int = 6) -> Features:
    generator = torch.Generator().manual_seed(0)
    image, caption, twin = (
        F.normalize(torch.randn(count, dim, generator=generator), dim=1) for _ in range(3)
    )
    label = F.normalize(torch.randn(labels, dim, generator=generator), dim=1)
    return Features(image, caption, twin, label, torch.tensor(5.0))


def batch_of(captions, metas, twins=(), labels=(), fields=("kind", "color")):
    twins = list(twins) or [None] * len(captions)
    twin_rows = [(t or (c, m)) for t, c, m in zip(twins, captions, metas, strict=True)]
    return {
        "caption": torch.tensor(
            [[number(c), number(t[0])] for c, t in zip(captions, twin_rows, strict=True)]
        ),
        "facts": torch.tensor(
            [[facts_of(m, fields), facts_of(t[1], fields)] for m, t in zip(metas, twin_rows, strict=True)]
        ),
        "has_twin": torch.tensor([t is not None for t in twins]),
        "label": torch.tensor(list(labels) or [-1] * len(captions)),
    }


def test_a_caption_is_true_of_images_that_have_all_it_states():
    metas = [
        {"kind": "T", "color": "red"},
        {"kind": "T", "color": None},
        {"kind": "T", "color": "blue"},
        {"kind": "cap", "color": "red"},
        {},
    ]
    texts = ["red T", "T", "blue T", "red cap", "something"]
    numbers = torch.tensor([number(t) for t in texts])
    facts = torch.tensor([facts_of(m, ("kind", "color")) for m in metas])
    true = describes(numbers, facts, numbers, facts)  # images x captions
    assert true.tolist() == [
        [True, True, False, False, False],
        [False, True, False, False, False],
        [False, True, True, False, False],
        [False, False, False, True, False],
        [False, False, False, False, True],
    ]


def test_loss_of_distinct_captions_is_clips_own():
    features = random_features(4)
    metas = [{"kind": str(i)} for i in range(4)]
    found = ranker_loss(features, batch_of([f"c{i}" for i in range(4)], metas), LossWeights(label_weight=0.0))
    import open_clip

    expected = open_clip.ClipLoss()(features.image, features.caption, features.scale)
    torch.testing.assert_close(found["loss"], expected)


def test_true_captions_are_no_negatives_and_wrong_colours_are():
    features = random_features(3)
    captions = ["T", "T", "red T"]
    metas = [{"kind": "T"}, {"kind": "T"}, {"kind": "T", "color": "red"}]
    twins = [None, None, ("blue T", {"kind": "T", "color": "blue"})]
    found = ranker_loss(features, batch_of(captions, metas, twins), LossWeights(label_weight=0.0))["loss"]
    logits = (features.scale * features.image @ features.caption.T).exp()
    twin = (features.scale * features.image @ features.twin[2]).exp()
    # image 0 and 1 carry the same caption; "T" is also true of image 2, "red T" not of 0 and 1
    to_text = [
        logits[0, 0] / (logits[0, 0] + logits[0, 2] + twin[0]),
        logits[1, 1] / (logits[1, 1] + logits[1, 2] + twin[1]),
        logits[2, 2] / (logits[2, 2] + twin[2]),
    ]
    to_image = [torch.ones(()), torch.ones(()), logits[2, 2] / (logits[0, 2] + logits[1, 2] + logits[2, 2])]
    expected = -(sum(map(torch.log, to_text)) + sum(map(torch.log, to_image))) / 6
    torch.testing.assert_close(found, expected)


def test_naming_the_kind_counts_labelled_images_only():
    features = random_features(3)
    metas = [{"kind": str(i)} for i in range(3)]
    batch = batch_of(["a", "b", "c"], metas, labels=[2, -1, 0])
    weights = LossWeights(label_weight=0.5, label_smoothing=0.0)
    parts = ranker_loss(features, batch, weights)
    log_p = (features.scale * features.image @ features.label.T).log_softmax(1)
    expected = -(log_p[0, 2] + log_p[2, 0]) / 2
    torch.testing.assert_close(parts["label"], expected)
    torch.testing.assert_close(parts["loss"], parts["contrastive"] + 0.5 * expected)
    with pytest.raises(ValueError, match="label_smoothing"):
        LossWeights(label_smoothing=1.0)


class Tiny(nn.Module):
    """Two linear towers, dropout in the text's."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(5, 4), nn.Linear(3, 4)
        self.dropout = nn.Dropout(dropout)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(7.0)))

    def forward(self, images, texts):
        image, text = F.normalize(self.image(images), dim=1), self.text(self.dropout(texts))
        return image, F.normalize(text, dim=1), self.logit_scale.exp()


def forward(model, micro, label_ids):
    count = len(micro["image"])
    image, text, scale = model(micro["image"], torch.cat([micro["text"].flatten(0, 1), label_ids]))
    pairs = text[: 2 * count].view(count, 2, -1)
    return Features(image, pairs[:, 0], pairs[:, 1], text[2 * count :], scale)


def gradients(parts: int, dropout: float = 0.0) -> tuple[dict[str, torch.Tensor], float]:
    torch.manual_seed(1)
    model = Tiny(dropout)
    engine = PlainEngine(model, torch.optim.SGD(model.parameters(), lr=0.1), WORLD, 0.0)
    captions = ["T", "T", "red T", "cap", "shoe", "red cap"]
    metas = [{"kind": c.split()[-1], "color": "red" if "red" in c else None} for c in captions]
    batch = batch_of(captions, metas, [None, None, ("x", {"kind": "T", "color": "x"}), None, None, None])
    batch |= {"label": torch.tensor([0, 0, 0, 1, -1, 1])}
    batch |= {"image": torch.randn(6, 5), "text": torch.randn(6, 2, 3)}
    size = 6 // parts
    micros = [{n: v[i : i + size] for n, v in batch.items()} for i in range(0, 6, size)]
    metrics = large_batch_step(engine, micros, torch.randn(2, 3), LossWeights(), WORLD, 11, forward)
    return {n: p.grad for n, p in model.named_parameters()}, metrics["loss"]


@pytest.mark.parametrize("parts", [2, 3, 6])
def test_features_gathered_over_micro_batches_give_the_gradient_of_the_whole_batch(parts):
    whole, loss = gradients(1)
    cut, cut_loss = gradients(parts)
    assert cut_loss == pytest.approx(loss, abs=1e-6)
    assert {n for n, g in whole.items() if g.abs().max() > 1e-4} == set(whole)
    for name, gradient in whole.items():
        torch.testing.assert_close(cut[name], gradient, atol=1e-6, rtol=1e-5)


def test_both_passes_see_the_same_dropout():
    torch.manual_seed(3)
    first, loss = gradients(2, dropout=0.5)
    torch.manual_seed(99)
    second, again = gradients(2, dropout=0.5)
    assert loss == again
    for name in first:
        torch.testing.assert_close(first[name], second[name])
