import pytest
import torch

from gan.augment import NUM_UNIFORM, AugmentConfig, Strength, augment, uniform


def fixed(count: int, **values: float) -> torch.Tensor:
    """Random numbers with every gate shut and every amount neutral, but for `values` by column (c0, c1 ...)."""
    u = torch.full((count, NUM_UNIFORM), 0.5)
    u[:, :6] = 1.0
    for name, value in values.items():
        u[:, int(name[1:])] = value
    return u


def test_nothing_happens_at_p_0_or_behind_shut_gates():
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    assert augment(images, torch.rand(3, NUM_UNIFORM), 0.0) is images
    torch.testing.assert_close(augment(images, fixed(3), 0.5), images, atol=1e-6, rtol=1e-5)


def test_brightness_saturation_and_contrast_by_hand():
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    brighter = augment(images, fixed(2, c0=0.0, c6=0.75), 0.5)
    torch.testing.assert_close(brighter, images + 0.125, atol=1e-5, rtol=1e-5)
    grey = augment(images, fixed(2, c1=0.0, c7=0.0), 0.5)
    torch.testing.assert_close(grey, (images + images.mean(1, keepdim=True)) / 2, atol=1e-5, rtol=1e-5)
    mean = images.mean((1, 2, 3), keepdim=True)
    flat = augment(images, fixed(2, c2=0.0, c8=0.0), 0.5)
    torch.testing.assert_close(flat, mean + (images - mean) / 2, atol=1e-5, rtol=1e-5)


def test_translation_moves_by_whole_pixels_and_continues_the_edge():
    images = torch.rand(1, 3, 16, 16)
    moved = augment(images, fixed(1, c3=0.0, c9=0.75), 0.5)  # an eighth of a half side: one pixel
    torch.testing.assert_close(moved[..., :-1], images[..., 1:], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(moved[..., -1], images[..., -1], atol=1e-4, rtol=1e-4)


def test_cutout_is_a_grey_square_of_a_third():
    found = augment(torch.ones(1, 3, 30, 30), fixed(1, c5=0.0), 0.5)
    assert int((found[0, 0] == 0).sum()) == 100 and float(found[0, :, 15, 15].abs().max()) == 0


def test_a_sample_depends_on_its_own_numbers_and_gradients_pass():
    images = (torch.rand(4, 3, 16, 16) * 2 - 1).requires_grad_()
    u = uniform(4, torch.Generator().manual_seed(0))
    found = augment(images, u, 0.8)
    torch.testing.assert_close(found[2:], augment(images[2:], u[2:], 0.8))
    found.sum().backward()
    assert bool(images.grad.isfinite().all()) and float(images.grad.abs().sum()) > 0
    assert torch.equal(u, uniform(4, torch.Generator().manual_seed(0)))


def test_ada_holds_the_mean_sign_at_its_target():
    strength = Strength(AugmentConfig(mode="ada", every=2, images_per_unit=1000, max_p=0.25), batch_size=50)
    for sign in (1.0, 0.9):
        strength.follow(sign)
    assert strength.p == pytest.approx(0.1)
    for _ in range(6):
        strength.follow(1.0)
    assert strength.p == 0.25
    for _ in range(8):
        strength.follow(0.2)
    assert strength.p == 0.0
    strength.follow(1.0)
    again = Strength(strength.config, 50)
    again.load_state(strength.state())
    again.follow(1.0)
    assert again.p == pytest.approx(0.1)


def test_fixed_and_off_stay_as_they_are():
    for config in (AugmentConfig(mode="fixed", p=0.3), AugmentConfig(mode="off")):
        strength = Strength(config, 100_000)
        for _ in range(8):
            strength.follow(1.0)
        assert strength.p == config.p


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"p": 1.5}, r"must lie in \[0, 1\]"),
        ({"mode": "off", "p": 0.5}, "no effect with mode off"),
        ({"mode": "fixed"}, "needs a p above 0"),
        ({"target": 1.0}, "target"),
    ],
)
def test_bad_options_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        AugmentConfig(**values)


@pytest.mark.parametrize(
    ("config", "p"), [(AugmentConfig(mode="off"), 0.0), (AugmentConfig(mode="fixed", p=0.3), 0.3)]
)
def test_a_run_that_goes_on_without_ada_takes_the_strength_of_its_options(config, p):
    strength = Strength(config, 50)
    strength.load_state({"p": 0.7, "signs": [1.0]})
    assert strength.p == p
