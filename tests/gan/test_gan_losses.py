import torch

from gan.losses import sameness


def flat(*values: float) -> torch.Tensor:
    """Grey images of these values."""
    return torch.tensor(values)[:, None, None, None].expand(-1, 3, 32, 32)


def halves(*values: float) -> torch.Tensor:
    """Images of these values on the left and of their negatives on the right."""
    signs = torch.ones(32).index_fill(0, torch.arange(16, 32), -1.0)
    return flat(*values) * signs


def test_sameness_by_hand():
    real = halves(0.0, 1.0)  # differ by 1
    loss, difference = sameness(halves(0.2, 0.0), halves(0.3, 0.8), real, least=0.5)  # by 0.1 and 0.8
    torch.testing.assert_close(loss, torch.tensor((0.8 + 0.0) / 2))
    torch.testing.assert_close(difference, torch.tensor(0.45))


def test_sameness_pushes_equal_images_apart_and_leaves_others_alone():
    images = halves(0.2, 0.0).clone().requires_grad_()
    sameness(images, halves(0.3, 0.8), halves(0.0, 1.0), least=0.5)[0].backward()
    assert bool((images.grad[0] * halves(1.0)[0] > 0).all()) and not images.grad[1].any()


def test_an_even_change_of_brightness_is_no_difference():
    _, difference = sameness(halves(0.2), halves(0.2) + 0.5, halves(0.0, 1.0), least=0.5)
    assert float(difference) < 1e-6


def test_fine_grain_is_no_difference():
    torch.manual_seed(0)
    grain = (
        torch.randint(0, 2, (1, 3, 16, 16)).float().repeat_interleave(2, 3).repeat_interleave(2, 2) * 2 - 1
    )
    checks = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(16, 16)
    _, difference = sameness(flat(0.0), grain * checks, halves(0.0, 1.0), least=0.5)
    assert float(difference) < 1e-6
