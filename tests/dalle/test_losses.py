"""Losses by hand, and independence from how a batch is split."""

import math

import pytest
import torch
import torch.nn.functional as F
from tiny_generator import tiny_ids, tiny_model

from dalle import sequence
from dalle.losses import LossConfig, dalle_loss, position_losses
from dalle.model import DalleOutput
from dalle.training.captions import drop_captions


def uniform_output(batch_size: int, num_text: int) -> DalleOutput:
    return DalleOutput(torch.zeros(batch_size, 4, 8), torch.zeros(num_text, 16))


def test_uniform_logits_cost_the_logarithm_of_the_vocabulary():
    losses = dalle_loss(
        uniform_output(2, 3),
        torch.zeros(2, 4, dtype=torch.long),
        torch.zeros(3, dtype=torch.long),
        3,
        LossConfig(),
    )
    assert float(losses.image) == pytest.approx(math.log(8)) and float(losses.text) == pytest.approx(
        math.log(16)
    )
    assert float(losses.total) == pytest.approx((math.log(16) + 7 * math.log(8)) / 8)
    assert losses.metrics()["image_bits"] == pytest.approx(3.0)


def test_weights_by_hand():
    config = LossConfig(text_weight=3, image_weight=1)
    losses = dalle_loss(
        uniform_output(1, 2), torch.zeros(1, 4, dtype=torch.long), torch.zeros(2, dtype=torch.long), 2, config
    )
    assert float(losses.total) == pytest.approx((3 * math.log(16) + math.log(8)) / 4)


def test_smoothing_and_z_loss_change_the_objective_and_not_the_log():
    torch.manual_seed(0)
    logits, ids = torch.randn(2, 4, 8), torch.randint(0, 8, (2, 4))
    none = torch.zeros(0, dtype=torch.long)
    plain = dalle_loss(DalleOutput(logits, None), ids, none, 0, LossConfig(text_weight=0))
    smooth = dalle_loss(
        DalleOutput(logits, None), ids, none, 0, LossConfig(text_weight=0, label_smoothing=0.1)
    )
    z = dalle_loss(DalleOutput(logits, None), ids, none, 0, LossConfig(text_weight=0, z_loss=0.5))
    assert float(smooth.image) == float(z.image) == float(plain.image) == float(plain.total)
    log_p = logits.log_softmax(-1)
    chosen = log_p.gather(-1, ids[..., None])[..., 0]
    assert float(smooth.total) == pytest.approx(
        float(-(0.9 * chosen + 0.1 * log_p.mean(-1)).mean()), rel=1e-5
    )
    assert float(z.total - plain.total) == pytest.approx(
        0.5 * float(logits.logsumexp(-1).square().mean()), rel=1e-5
    )


def test_a_batch_of_null_captions_has_no_text_loss_but_gradients():
    model, (text, image) = tiny_model(), tiny_ids()
    null = torch.zeros_like(text)
    losses = dalle_loss(model(null, image), image, sequence.text_targets(null, 0), 0, LossConfig())
    losses.total.backward()
    assert losses.metrics()["text_loss"] == 0.0 and math.isfinite(losses.metrics()["loss"])
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_any_split_of_a_batch_gives_its_gradient():
    """Rows with 7, 4 and 0 text targets: the mean of means would weigh them differently."""
    text, image = tiny_ids()
    count = len(sequence.text_targets(text, 0))
    grads = []
    for parts in ([[0, 1, 2]], [[0], [1], [2]]):
        model = tiny_model()
        for rows in parts:
            output = model(text[rows], image[rows])
            targets = sequence.text_targets(text[rows], 0)
            losses = dalle_loss(output, image[rows], targets, count / len(parts), LossConfig(text_weight=5))
            (losses.total / len(parts)).backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_position_losses_sum_over_the_batch():
    torch.manual_seed(0)
    logits, ids = torch.randn(3, 4, 8), torch.randint(0, 8, (3, 4))
    by_hand = [sum(F.cross_entropy(logits[b, n], ids[b, n]) for b in range(3)) for n in range(4)]
    torch.testing.assert_close(position_losses(logits, ids), torch.stack(by_hand))


def test_caption_dropout_is_a_function_of_seed_step_and_key():
    text = torch.ones(4000, 3, dtype=torch.long)
    keys = [f"{i:06d}" for i in range(4000)]
    dropped = drop_captions(text, keys, 0, 0.1, (0, 5))
    assert float((dropped[:, 0] == 0).float().mean()) == pytest.approx(0.1, abs=0.02)
    assert torch.equal(dropped[1000:], drop_captions(text[1000:], keys[1000:], 0, 0.1, (0, 5)))
    assert not torch.equal(dropped, drop_captions(text, keys, 0, 0.1, (0, 6)))
    assert not torch.equal(dropped, drop_captions(text, keys, 0, 0.1, (1, 5)))
    assert torch.equal(text, drop_captions(text, keys, 0, 0.0, (0, 5)))


@pytest.mark.parametrize(
    "bad", [{"image_weight": 0.0}, {"text_weight": -1.0}, {"label_smoothing": 1.0}, {"z_loss": -1.0}]
)
def test_bad_weights_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        LossConfig(**bad)
