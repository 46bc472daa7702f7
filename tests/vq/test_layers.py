import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vq.layers import WRITTEN_OUT_PLACES, GroupNorm, attend
from vq.losses.perceptual import _UnitDistance


def channels_last(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype).to(memory_format=torch.channels_last).requires_grad_()


@pytest.mark.parametrize(("channels", "groups", "side"), [(8, 4, 5), (64, 32, 8), (6, 1, 3)])
def test_group_norm_has_the_gradients_of_torch(channels, groups, side):
    torch.manual_seed(0)
    own, plain = GroupNorm(groups, channels, eps=1e-6), nn.GroupNorm(groups, channels, eps=1e-6)
    for layer in (own, plain):
        with torch.no_grad():
            layer.weight.copy_(torch.linspace(0.5, 2, channels))
            layer.bias.copy_(torch.linspace(-1, 1, channels))
    x = channels_last(3, channels, side, side + 1)
    upstream = torch.randn(3, channels, side, side + 1)
    found, expected = own(x * 1.0 + 3), plain(x * 1.0 + 3)
    torch.testing.assert_close(found, expected)
    by_own = torch.autograd.grad(found, [x, own.weight, own.bias], upstream)
    by_plain = torch.autograd.grad(expected, [x, plain.weight, plain.bias], upstream)
    for a, b in zip(by_own, by_plain, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def test_group_norm_takes_the_plain_road_elsewhere_and_bf16():
    torch.manual_seed(0)
    layer = GroupNorm(4, 8)
    x = torch.randn(2, 8, 4, 4, requires_grad=True)  # not channels_last
    assert (
        "GroupNorm" in type(layer(x).grad_fn).__name__ and "_GroupNorm" not in type(layer(x).grad_fn).__name__
    )
    x = channels_last(2, 8, 6, 6, dtype=torch.bfloat16)
    (gradient,) = torch.autograd.grad(layer(x).float().square().sum(), x)
    exact = x.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(F.group_norm(exact, 4).square().sum(), exact)
    assert (gradient.double() - expected).abs().max() < 0.05


@pytest.mark.parametrize("places", [9, WRITTEN_OUT_PLACES + 24])
def test_attention_equals_torch(places):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, places, 8) for _ in range(3))
    torch.testing.assert_close(attend(q, k, v), F.scaled_dot_product_attention(q, k, v), atol=1e-5, rtol=1e-4)


def test_unit_distance_has_the_gradient_of_its_formula():
    torch.manual_seed(0)
    a = torch.randn(2, 5, 3, 4, dtype=torch.float32, requires_grad=True)
    b, weight, floor = torch.randn(2, 5, 3, 4), torch.rand(5), torch.tensor(0.3)

    def formula(a):
        unit_a, unit_b = (t / (t.square().sum(1, keepdim=True) + floor).sqrt() for t in (a, b))
        return (weight.view(1, -1, 1, 1) * (unit_a - unit_b).square()).sum(1).mean((1, 2))

    found, expected = _UnitDistance.apply(a, b, weight, floor), formula(a)
    torch.testing.assert_close(found, expected)
    upstream = torch.tensor([1.0, -2.0])
    (by_own,) = torch.autograd.grad(found, a, upstream)
    (by_formula,) = torch.autograd.grad(expected, a, upstream)
    torch.testing.assert_close(by_own, by_formula, atol=1e-6, rtol=1e-4)
