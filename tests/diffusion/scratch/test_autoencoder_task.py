import torch

from diffusion.scratch.autoencoder_task import color_loss, color_slope, opponent_colors


def flat(*rgb: float) -> torch.Tensor:
    return torch.tensor(rgb).view(1, 3, 1, 1).expand(1, 3, 8, 8)


def test_opponent_colors_by_hand():
    found = opponent_colors(flat(0.5, -0.25, 0.75))
    assert found.shape == (1, 2, 2, 2)
    torch.testing.assert_close(found[0, :, 0, 0], torch.tensor([0.75, 0.75 - 0.125]))
    assert opponent_colors(flat(0.3, 0.3, 0.3)).abs().max() < 1e-6, "grey has no colour"


def test_the_color_loss_sees_a_lost_hue_and_not_a_lost_brightness():
    red, grey = flat(0.8, -0.8, -0.8), flat(-0.27, -0.27, -0.27)
    torch.testing.assert_close(color_loss(grey, red), torch.tensor((1.6 + 0.8) / 2))
    assert float(color_loss(red + 0.2, red)) < 1e-6


def test_the_color_slope_is_the_strength_of_colors():
    images = torch.cat([flat(0.8, -0.8, -0.8), flat(-0.5, 0.5, 0.1)])
    mean = images.mean(1, keepdim=True)
    torch.testing.assert_close(color_slope(mean + 0.5 * (images - mean), images), torch.tensor(0.5))
    torch.testing.assert_close(color_slope(images, images), torch.tensor(1.0))
    only_blue = images.clone()
    only_blue[:, :2] = images[:, :2].mean(1, keepdim=True)
    assert float(color_slope(only_blue, images)) < 1e-6, "red against green is gone"
