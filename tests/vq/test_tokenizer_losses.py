import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vq.losses.reconstruction import (
    adaptive_weight,
    color_shift,
    discriminator_loss,
    feature_matching_loss,
    generator_loss,
    grid_loss,
    lecam_loss,
    multiscale_l1,
    pixel_loss,
    psnr,
    shifted,
    shrunk_or_cropped,
)


def test_pixel_losses_by_hand():
    images = torch.zeros(1, 3, 16, 16)
    reconstruction = torch.full_like(images, 0.5)
    assert pixel_loss("l1", reconstruction, images).item() == pytest.approx(0.5)
    assert pixel_loss("l2", reconstruction, images).item() == pytest.approx(0.25)
    assert pixel_loss("smooth_l1", reconstruction, images).item() == pytest.approx(0.5 - 0.05)
    assert multiscale_l1(reconstruction, images).item() == pytest.approx(1.5)  # pixels, blocks of 4, of 16
    with pytest.raises(ValueError, match="unknown pixel loss"):
        pixel_loss("l3", reconstruction, images)


def test_multiscale_l1_sees_a_colour_cast_that_noise_of_equal_size_is_not():
    torch.manual_seed(0)
    images = torch.zeros(2, 3, 32, 32)
    noise = torch.where(torch.rand_like(images) < 0.5, -0.1, 0.1)
    cast = torch.full_like(images, 0.1)
    assert pixel_loss("l1", noise, images).item() == pytest.approx(pixel_loss("l1", cast, images).item())
    assert multiscale_l1(cast, images) > 2 * multiscale_l1(noise, images)


def test_weights_move_the_loss_to_where_they_are():
    images = torch.zeros(1, 3, 16, 16)
    reconstruction = images.clone()
    reconstruction[..., :8, :] = 1.0
    weight = torch.full((1, 1, 16, 16), 0.5)
    weight[..., :8, :] = 1.5
    assert pixel_loss("l1", reconstruction, images, weight).item() == pytest.approx(0.75)
    assert multiscale_l1(reconstruction, images, weight) > multiscale_l1(reconstruction, images)


def test_adversarial_losses_by_hand():
    real, fake = torch.tensor([2.0, 0.0]), torch.tensor([-2.0, 1.0])
    assert discriminator_loss("hinge", real, fake).item() == pytest.approx(0.5 * (0.5 + 1.0))
    expected = 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())
    assert discriminator_loss("non_saturating", real, fake).item() == pytest.approx(expected.item())
    assert generator_loss("hinge", fake).item() == pytest.approx(0.5)
    assert generator_loss("non_saturating", fake).item() == pytest.approx(F.softplus(-fake).mean().item())
    assert lecam_loss(real, fake, real_average=1.0, fake_average=-1.0).item() == pytest.approx(
        (9 + 1) / 2 + 9 / 2  # relu(real + 1)^2, relu(1 - fake)^2
    )


def test_feature_matching_is_zero_for_equal_features_and_has_no_scale():
    torch.manual_seed(0)
    real, fake = [torch.randn(2, 4, 3, 3)], [torch.randn(2, 4, 3, 3)]
    assert feature_matching_loss(real, real).item() == 0
    scaled = feature_matching_loss([100 * real[0]], [100 * fake[0]])
    assert scaled.item() == pytest.approx(feature_matching_loss(real, fake).item(), rel=1e-5)


def test_adaptive_weight_is_the_ratio_of_plain_gradients_at_the_last_layer():
    torch.manual_seed(0)
    decoder = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 3, 3, padding=1))
    judge = nn.Conv2d(3, 1, 4)
    images, latents = torch.randn(2, 3, 8, 8), torch.randn(2, 4, 8, 8)
    last = decoder[2].weight

    def rec(x):
        return (x - images).abs().mean()

    def gen(x):
        return -judge(x).mean()

    outputs = decoder(latents)
    (by_rec,) = torch.autograd.grad(rec(outputs), last, retain_graph=True)
    (by_gen,) = torch.autograd.grad(gen(outputs), last, retain_graph=True)
    expected = by_rec.norm() / (by_gen.norm() + 1e-4)

    leaf = outputs.detach().requires_grad_()
    (rec_gradient,) = torch.autograd.grad(rec(leaf), leaf)
    (gen_gradient,) = torch.autograd.grad(gen(leaf), leaf)
    found = adaptive_weight(outputs, last, rec_gradient, gen_gradient, cap=1e4)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert adaptive_weight(outputs, last, rec_gradient, gen_gradient, cap=1e-3).item() == pytest.approx(1e-3)


def test_psnr_and_color_shift_by_hand():
    images = torch.zeros(2, 3, 8, 8)
    reconstruction = images.clone()
    reconstruction[1, 0] = 2 / 127.5
    assert psnr(reconstruction, images)[1].item() == pytest.approx(
        -10 * torch.log10(torch.tensor((2 / 255) ** 2 / 3)).item(), abs=1e-3
    )
    assert color_shift(reconstruction, images).tolist() == [[0, 0, 0], [pytest.approx(2.0), 0, 0]]


def test_shifts_cut_a_pair_alike_and_reach_every_phase():
    rows, columns = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    images = torch.stack([rows, columns])[None]
    corners = set()
    for step in range(900):
        seen = shifted(images, 8, 32, (0, step))
        assert seen.shape == (1, 2, 56, 56) and torch.equal(seen, shifted(images, 8, 32, (0, step)))
        corners.add((int(seen[0, 0, 0, 0]), int(seen[0, 1, 0, 0])))
        assert seen[0, 0, 0, 0] + 55 == seen[0, 0, -1, -1]
    assert len(corners) == 64
    assert shifted(images, 1, 32, (0, 0)) is images
    assert shifted(images, 8, 57, (0, 0)) is images, "too small to lose its margins"
    leaf = images.clone().requires_grad_()
    shifted(leaf, 8, 32, (0, 5)).sum().backward()
    assert float(leaf.grad.sum()) == 2 * 56 * 56


def test_grid_loss_is_of_dots_and_not_of_detail():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 64, 64, generator=generator)
    dots = torch.zeros(64, 64)
    dots[::4, ::4] = 0.32
    assert float(grid_loss(images + dots, images)) == pytest.approx(0.32 / 16, rel=1e-4)
    detail = 0.02 * torch.randn(2, 3, 64, 64, generator=generator)
    assert float(grid_loss(images + detail, images)) < 0.25 * float(detail.abs().mean()) * 1.1
    assert float(grid_loss(images[..., :31], images[..., 1:32])) == 0.0, "no 4 x 4 places of 8 pixels"
    assert float(grid_loss(images[..., :63, :] + 0.5, images[..., :63, :])) == pytest.approx(0.5)


def test_the_perceptual_view_of_larger_images_is_shrunk_at_even_steps_and_a_crop_at_odd_ones():
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert shrunk_or_cropped(images, 0, (0, 1)) is images and shrunk_or_cropped(images, 64, (0, 1)) is images
    shrunk = shrunk_or_cropped(images, 32, (0, 4))
    torch.testing.assert_close(shrunk.mean((2, 3)), images.mean((2, 3)), atol=5e-3, rtol=0)
    crops = [shrunk_or_cropped(images, 32, (0, step)) for step in (1, 3)]
    assert not torch.equal(*crops)
    windows = images.unfold(2, 32, 1).unfold(3, 32, 1)  # (B, C, 33, 33, 32, 32)
    for crop in crops:
        assert (windows == crop[:, :, None, None]).all((0, 1, 4, 5)).sum() == 1
