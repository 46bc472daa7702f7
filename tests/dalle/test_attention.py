"""The hand-written passes against PyTorch's own, rotary positions, and the cache."""

import pytest
import torch
import torch.nn.functional as F

from dalle import sequence
from dalle.attention import Attention, CausalMask, RMSNorm, new_cache, rotary_table, rotate
from kernels import autograd
from kernels.autograd import CausalAttentionFunction, RMSNormFunction


def padding_of(lengths: list[int], text_len: int) -> torch.Tensor:
    return torch.arange(text_len)[None] >= torch.tensor(lengths)[:, None]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("length", [5, 96, 200])
def test_causal_attention_is_sdpa_forward_and_backward(length, padded):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, length, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    grad = torch.randn(2, 3, length, 8, dtype=torch.float64)
    padding = padding_of([4, 2], 4) if padded else None
    visible = torch.ones(2, 4, dtype=torch.bool) if padding is None else ~padding
    bias = sequence.attention_bias(visible, length - 4, torch.float64)
    expected = F.scaled_dot_product_attention(q, k, v, bias, is_causal=bias is None)
    y = CausalAttentionFunction.apply(q, k, v, padding, 0.0)
    torch.testing.assert_close(y, expected)
    for mine, reference in zip(
        torch.autograd.grad(y, (q, k, v), grad), torch.autograd.grad(expected, (q, k, v), grad), strict=True
    ):
        torch.testing.assert_close(mine, reference)


def test_block_size_does_not_matter(monkeypatch):
    q, k, v = torch.randn(3, 1, 2, 50, 8, dtype=torch.float64).unbind()
    one = CausalAttentionFunction.apply(q, k, v, None, 0.0)
    monkeypatch.setattr(autograd, "BLOCK", 7)
    torch.testing.assert_close(CausalAttentionFunction.apply(q, k, v, None, 0.0), one)


def test_gradients_through_attention_dropout():
    """Against finite differences, the same mask drawn each time."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 9, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    padding = padding_of([2], 3)

    def attend(*inputs: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(1)
        return CausalAttentionFunction.apply(*inputs, padding, 0.3)

    assert not torch.allclose(attend(q, k, v), CausalAttentionFunction.apply(q, k, v, padding, 0.0))
    torch.autograd.gradcheck(attend, (q, k, v))


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5])
def test_dropout_keeps_the_mean_and_drops_its_share(p):
    torch.manual_seed(0)
    y = autograd.dropout_mask(torch.ones(1000, 501), p)
    assert float((y == 0).float().mean()) == pytest.approx(p, abs=0.003)
    assert float(y.mean()) == pytest.approx(1, abs=0.003)
    bytes_of = (y == 0).flatten()[: 1000 * 500].view(-1, 8).float().mean(0)
    assert bytes_of.tolist() == pytest.approx([p] * 8, abs=0.005)  # every byte of a draw is fair


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_is_pytorchs_forward_and_backward(dtype):
    torch.manual_seed(0)
    x = torch.randn(3, 5, 16, dtype=dtype, requires_grad=True)
    weight, grad = torch.rand(16, requires_grad=True), torch.randn(3, 5, 16, dtype=dtype)
    y = RMSNormFunction.apply(x, weight, 1e-6)
    expected = F.rms_norm(x.double(), (16,), weight.double(), 1e-6)
    close = {"rtol": 2e-2, "atol": 3e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    assert y.dtype == dtype
    torch.testing.assert_close(y, expected.to(dtype), **close)
    mine = torch.autograd.grad(y, (x, weight), grad)
    reference = torch.autograd.grad(expected, (x, weight), grad.double())
    for a, b in zip(mine, reference, strict=True):
        torch.testing.assert_close(a, b, **close)


def test_rms_norm_by_hand():
    norm = RMSNorm(2, eps=0.0)
    torch.testing.assert_close(norm(torch.tensor([[3.0, 4.0]])), torch.tensor([[3.0, 4.0]]) / 12.5**0.5)


def test_rotary_scores_depend_on_the_distance_alone_in_each_axis():
    torch.manual_seed(0)
    q, k = torch.randn(2, 8, dtype=torch.float64)

    def score(a: tuple[int, int], b: tuple[int, int]) -> float:
        table = rotary_table(torch.tensor([a, b]), 8, 100.0).double()
        turned = rotate(torch.stack([q, k])[None, :, None], table)[0, :, 0]
        return float(turned[0] @ turned[1])

    assert score((3, 7), (1, 4)) == pytest.approx(score((12, 9), (10, 6)), rel=1e-5)
    assert score((3, 7), (1, 4)) != pytest.approx(score((3, 8), (1, 4)), rel=1e-3)
    assert score((3, 7), (1, 4)) != pytest.approx(score((4, 7), (1, 4)), rel=1e-3)


def test_rotary_keeps_lengths():
    table = rotary_table(torch.tensor([[5, 9]]), 12, 100.0)
    x = torch.randn(1, 1, 2, 12)
    torch.testing.assert_close(rotate(x, table).norm(dim=-1), x.norm(dim=-1))


def test_grouped_queries_are_heads_with_repeated_keys():
    torch.manual_seed(0)
    grouped = Attention(16, 4, 2, 8, 0.0)
    full = Attention(16, 4, 4, 8, 0.0)
    q, k, v = grouped.qkv.weight.split([32, 16, 16])
    repeated = [w.view(2, 8, 16).repeat_interleave(2, 0).flatten(0, 1) for w in (k, v)]
    full.load_state_dict(grouped.state_dict() | {"qkv.weight": torch.cat([q, *repeated])})
    x, table = torch.randn(2, 6, 16), rotary_table(sequence.positions(1, 2), 8, 100.0)
    mask = CausalMask(torch.ones(2, 2, dtype=torch.bool), 6)
    torch.testing.assert_close(grouped(x, table, mask), full(x, table, mask))


@pytest.mark.parametrize("as_tensor", [False, True])
def test_decode_equals_the_whole_pass(as_tensor):
    torch.manual_seed(0)
    attention = Attention(16, 4, 2, 4, 0.0)
    x, table = torch.randn(2, 6, 16), rotary_table(sequence.positions(1, 2), 4, 100.0)
    visible = torch.tensor([[True, True], [True, False]])
    with torch.no_grad():
        whole = attention(x, table, CausalMask(visible, 6))
        cache = new_cache(1, 2, 4, visible, 4, torch.float32)
        first = attention.prefill(x[:, :3], table[:, :3], CausalMask(visible, 3), cache, 0)
        torch.testing.assert_close(first, whole[:, :3])
        for i in range(3, 6):
            index = torch.tensor(i) if as_tensor else i
            y = attention.decode(x[:, i : i + 1], table[:, i : i + 1], cache.bias_at(index), cache, 0, index)
            torch.testing.assert_close(y, whole[:, i : i + 1])


def test_attention_dropout_matters_in_training_alone():
    torch.manual_seed(0)
    attention = Attention(16, 4, 4, 4, 0.5)
    x, table = torch.randn(1, 6, 16), rotary_table(sequence.positions(1, 2), 4, 100.0)
    mask = CausalMask(torch.ones(1, 2, dtype=torch.bool), 6)
    assert torch.equal(attention.eval()(x, table, mask), attention(x, table, mask))
    attention.train()
    assert not torch.equal(attention(x, table, mask), attention(x, table, mask))
