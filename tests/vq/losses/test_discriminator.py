"""Discriminators: shapes, what is trained and saved, and that each can tell two kinds of images apart."""

import pytest
import torch

from common.distributed import batch_plan, start_world
from vq.losses.adversary import Adversary, AdversaryConfig
from vq.losses.discriminator import DiscriminatorConfig, build_discriminator
from vq.losses.imagenet_features import TRAINING_NETWORK, imagenet_weights


def build(kind: str):
    if kind == "projected":
        try:
            imagenet_weights(TRAINING_NETWORK)
        except FileNotFoundError as error:
            pytest.skip(str(error))
    torch.manual_seed(0)
    return build_discriminator(DiscriminatorConfig(kind=kind, channels=32))


def test_the_projected_one_judges_four_strides_and_saves_its_heads_alone():
    model = build("projected")
    images = torch.rand(2, 3, 96, 64) * 2 - 1
    logits, features = model(images)
    assert [tuple(x.shape) for x in logits] == [(2, 1, 24, 16), (2, 1, 12, 8), (2, 1, 6, 4), (2, 1, 3, 2)]
    assert [x.shape[1] for x in features] == [24, 40, 112, 320]
    assert all(name.startswith("heads.") for name in model.state_dict())
    assert all(p.requires_grad for p in model.parameters()), "the frozen network is no part of it"
    assert sum(p.numel() for p in model.parameters()) < 100_000
    assert next(model.double()._frozen[0].parameters()).dtype == torch.float64, "it moves with the heads"


def test_its_gradient_reaches_the_images_and_not_the_frozen_network():
    model = build("projected")
    images = torch.zeros(1, 3, 64, 64, requires_grad=True)
    logits, _ = model(images + 0.3 * torch.randn(1, 3, 64, 64))
    sum(x.mean() for x in logits).backward()
    assert images.grad.abs().sum() > 0
    assert all(p.grad is None for p in model._frozen[0].parameters())


@pytest.mark.parametrize(("kind", "lr", "steps"), [("patch", 2e-3, 14), ("projected", 2e-2, 24)])
def test_an_adversary_learns_to_tell_blurred_images(kind, lr, steps):
    build(kind)  # skips where its network is not installed
    torch.manual_seed(0)
    config = AdversaryConfig(DiscriminatorConfig(kind=kind, channels=32), lr=lr)
    adversary = Adversary(config, start_world("cpu"), batch_plan(4, 1), "fp32")
    first = last = None
    for step in range(steps):
        real = torch.rand(4, 3, 64, 64) * 2 - 1
        fake = torch.nn.functional.avg_pool2d(real, 5, 1, 2)
        last = adversary.train_step(real, fake, 1.0, step)
        first = first or last
    assert abs(first["disc_loss"] - 1) < 0.3, "of a hinge before it knows anything"
    assert last["disc_loss"] < 0.5 and last["logits_real"] > last["logits_fake"] + 0.5
    state = adversary.state()
    again = Adversary(config, start_world("cpu"), batch_plan(4, 1), "fp32")
    again.load_state(state)
    expected, found = (a.train_step(real, fake, 1.0, steps) for a in (adversary, again))
    assert found == expected


def test_every_head_counts_alike():
    """By hand: hinge terms of two heads of different sizes, means of the means."""
    adversary = Adversary(AdversaryConfig(lecam_weight=0.0), start_world("cpu"), batch_plan(2, 1), "fp32")
    scale = torch.nn.Parameter(torch.ones(()))
    small, large = torch.tensor([2.0, -3.0]).view(2, 1, 1, 1), torch.zeros(2, 1, 4, 4)
    adversary.engine.model = lambda images: ([small * scale, large * scale], [])
    said = adversary.train_step(torch.zeros(1, 3, 64, 64), torch.zeros(1, 3, 64, 64), 1.0, 0)
    # the small head is right on both sides (0), the large one undecided (0.5 * (1 + 1) = 1)
    assert said["disc_loss"] == pytest.approx(0.5)
    assert (said["logits_real"], said["logits_fake"]) == (1.0, -1.5)
