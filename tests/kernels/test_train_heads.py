"""The compiled end of the generator against float32 and against PyTorch's bfloat16; cross-entropies of its logits."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F

from dalle import sequence
from dalle.attention import RMSNorm
from dalle.losses import CrossEntropy, LossConfig, dalle_loss
from dalle.model import Dalle, ModelOptions
from kernels import accelerate, compiler, train_heads
from kernels.compiler import level

pytestmark = pytest.mark.skipif(not level(), reason="a CPU without AVX2")
needs_native = pytest.mark.skipif(
    bool(compiler.unavailable_reason(train_heads.SOURCE)), reason="no C++ compiler"
)


@pytest.fixture(autouse=True)
def without_amx(monkeypatch):
    monkeypatch.setattr(compiler, "prefers_torch", lambda: False)


def make_end(dim=64, widths=(96, 50), counts=(300, 41), seed=0):
    """Hidden states, a norm, weights of heads, the rows that each looks at, and gradients of their logits."""
    torch.manual_seed(seed)
    total = sum(counts) + 9
    norm = RMSNorm(dim)
    torch.nn.init.normal_(norm.weight, 1, 0.2)
    weights = [torch.randn(width, dim).div_(dim**0.5).requires_grad_() for width in widths]
    rows = list(torch.randperm(total)[: sum(counts)].split(counts))
    given = [torch.randn(n, width) for n, width in zip(counts, widths, strict=True)]
    return 2 * torch.randn(total, dim), norm, weights, rows, given


def ends(x, norm, weights, rows, given, bf16, native):
    """Logits, and gradients of the hidden states, the gain and the weights."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        if native:
            assert train_heads.supports(x, norm, weights)
            logits = train_heads.run_heads(x, norm.weight, norm.eps, weights, rows)
        else:
            logits = [F.linear(norm(x[r]), w) for r, w in zip(rows, weights, strict=True)]
    total = sum((y.float() * dy).sum() for y, dy in zip(logits, given, strict=True))
    return [*(y.detach().float() for y in logits), *torch.autograd.grad(total, [x, norm.weight, *weights])]


@needs_native
@pytest.mark.parametrize(
    "case",
    [
        dict(),  # a last group of weights that is not whole, and an odd number of rows
        dict(dim=96, widths=(1000, 64), counts=(33, 600)),  # several blocks of rows
        dict(widths=(5000,), counts=(12,)),  # more outputs than are summed over at a time
    ],
)
def test_as_exact_as_pytorch_in_bf16(case):
    inputs = make_end(**case)
    exact = ends(*inputs, bf16=False, native=False)
    rounded = ends(*inputs, bf16=True, native=False)
    found = ends(*inputs, bf16=True, native=True)
    for i, expected in enumerate(exact):
        mine, theirs = ((x[i] - expected).norm() / expected.norm() for x in (found, rounded))
        assert 0 < mine < min(0.01, 1.2 * theirs), (i, mine, theirs)


@needs_native
def test_the_same_twice_and_with_more_threads():
    inputs = make_end(counts=(700, 41))
    first, second = ends(*inputs, bf16=True, native=True), ends(*inputs, bf16=True, native=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    try:
        torch.set_num_threads(3)
        shared, again = ends(*inputs, bf16=True, native=True), ends(*inputs, bf16=True, native=True)
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(shared, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first[:3], shared[:3], strict=True))  # logits, hidden states
    torch.testing.assert_close(first, shared, rtol=1e-4, atol=1e-3)


@needs_native
def test_a_head_without_a_loss_and_states_that_no_head_sees():
    x, norm, weights, rows, given = make_end()
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        first, _ = train_heads.run_heads(x, norm.weight, norm.eps, weights, rows)
    (first.float() * given[0]).sum().backward()
    assert weights[0].grad.norm() > 0 and weights[1].grad is None
    unseen = torch.ones(len(x), dtype=torch.bool)
    unseen[rows[0]] = False
    assert (x.grad[unseen] == 0).all() and (x.grad[~unseen] != 0).any(1).all()


@needs_native
@pytest.mark.parametrize(
    "changes",
    [{}, dict(tie_image_head=True, tie_text_head=True), dict(text_embed_dim=32), dict(no_text=True)],
)
def test_a_model_has_the_losses_of_pytorchs_end(changes):
    torch.manual_seed(0)
    changes = dict(changes)
    text_head = not changes.pop("no_text", False)
    config = ModelOptions(dim=64, num_layers=1, num_heads=2, **changes).config(50, 0, 8, 64, 4)
    config = dataclasses.replace(config, text_head=text_head)
    model = Dalle(config).train()
    text, image = torch.randint(1, 50, (3, 8)), torch.randint(64, (3, 16))
    text[1, 3:] = 0
    targets = sequence.text_targets(text, 0)
    found = []
    for native in (True, False):
        copied, cross_entropy = copy.deepcopy(model), CrossEntropy()
        if native:
            accelerate(copied.heads, copied.norm, cross_entropy)
        with torch.autocast("cpu", torch.bfloat16):
            output = copied(text, image)
        assert output.image.shape == (3, 16, 64) and (output.text is None) == (not config.text_head)
        losses = dalle_loss(output, image, targets, len(targets), LossConfig(), cross_entropy)
        losses.total.backward()
        gradients = {n: p.grad for n, p in copied.named_parameters() if p.grad is not None}
        found.append((losses.image, losses.text, gradients))
    (image_loss, text_loss, gradients), expected = found
    torch.testing.assert_close((image_loss, text_loss), expected[:2], rtol=2e-3, atol=1e-3)
    assert gradients.keys() == expected[2].keys()
    for name, gradient in gradients.items():
        assert (gradient - expected[2][name]).norm() < 0.03 * expected[2][name].norm() + 1e-5, name


@needs_native
def test_what_it_leaves_to_pytorch():
    def takes(x=None, autocast=True, **changes):
        states, norm, weights, *_ = make_end(**changes)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return train_heads.supports(states if x is None else x, norm, weights)

    assert takes()
    assert not takes(autocast=False)
    assert not takes(x=torch.zeros(4, 64, dtype=torch.bfloat16))
    assert not takes(dim=48)
    assert not takes(widths=(96, 51))
    with torch.no_grad():
        assert not takes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "prefers_torch", lambda: True)
        assert not takes()
    states, norm, weights, *_ = make_end()
    with torch.autocast("cpu", torch.bfloat16):
        assert not train_heads.supports(
            states, norm, [weights[0], torch.empty(0)]
        )  # as ZeRO-3 leaves it between uses


@needs_native
@pytest.mark.parametrize("width", [16, 50, 1024, 21128])
def test_cross_entropy_is_pytorchs(width):
    torch.manual_seed(0)
    logits = (torch.randn(37, width) * 4).bfloat16().requires_grad_()
    targets, weights = torch.randint(width, (37,)), torch.rand(37)
    targets[0], targets[1] = width - 1, 0
    losses = train_heads.run_entropy(logits, targets)
    expected = F.cross_entropy(logits.float(), targets, reduction="none")
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    mine, theirs = (torch.autograd.grad((x * weights).sum(), logits)[0] for x in (losses, expected))
    assert mine.dtype == torch.bfloat16
    torch.testing.assert_close(mine, theirs, rtol=0.01, atol=1e-6)
    assert train_heads.run_entropy(logits[:0], targets[:0]).shape == (0,)
    with pytest.raises(IndexError, match="targets must lie"):
        train_heads.run_entropy(logits, targets + width)


@needs_native
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_shows(value):
    logits = torch.randn(4, 64).bfloat16()
    logits[2] = value
    losses = train_heads.run_entropy(logits, torch.arange(4))
    assert losses[[0, 1, 3]].isfinite().all() and not losses[2].isfinite()
    x, norm, weights, rows, given = make_end()
    x[rows[0][5], 3] = value
    logits, *_ = ends(x, norm, weights, rows, given, bf16=True, native=True)
    assert not logits[5].isfinite().any() and logits[:5].isfinite().all()


def test_without_a_compiler_pytorch_trains(no_compiler):
    states, norm, weights, *_ = make_end()
    with torch.autocast("cpu", torch.bfloat16):
        assert not train_heads.supports(states, norm, weights)
    entropy = CrossEntropy()
    accelerate(entropy)
    losses = entropy(torch.zeros(2, 32, dtype=torch.bfloat16), torch.arange(2))
    torch.testing.assert_close(losses, torch.full((2,), 32.0).log())


@needs_native
def test_a_batch_without_text_has_gradients_of_zero():
    x, norm, weights, rows, given = make_end()
    *_, by_image, by_text = ends(
        x, norm, weights, [rows[0], rows[1][:0]], [given[0], given[1][:0]], True, True
    )
    assert by_image.norm() > 0 and (by_text == 0).all()
