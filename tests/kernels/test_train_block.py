"""Compiled training passes of a block against the same block in float32, and against PyTorch's in bfloat16."""

import weakref

import pytest
import torch

from common import precision
from dalle.attention import CausalMask
from dalle.model import Dalle, ModelOptions
from kernels import accelerate, compiler, train_block
from kernels.compiler import level

pytestmark = pytest.mark.skipif(not level(), reason="a CPU without AVX2")
needs_native = pytest.mark.skipif(
    bool(compiler.unavailable_reason(train_block.SOURCE)), reason="no C++ compiler"
)
CASES = [
    dict(num_heads=2, length=40),
    dict(dim=128, num_heads=4, num_kv_heads=2, length=45, text_lens=(9, 1, 5)),  # padding, and an odd length
    dict(num_heads=2, dim=128, length=101, text_lens=(20, 3, 20)),  # heads of two registers each
    dict(num_heads=2, length=64, batch=5, dropout=0.2, stochastic_depth=0.5),
]


@pytest.fixture(autouse=True)
def without_amx(monkeypatch):
    monkeypatch.setattr(compiler, "prefers_torch", lambda: False)


def make_block(dim=64, length=40, text_lens=(8, 8, 8), batch=3, seed=0, **changes):
    """The last block of a model whose gains and matrices all say something, inputs for it, and a gradient."""
    torch.manual_seed(seed)
    text_len = max(text_lens)
    options = ModelOptions(dim=dim, **dict(num_layers=2, num_heads=2) | changes)
    model = Dalle(options.config(50, 0, text_len, 64, 16)).train()
    for parameter in model.parameters():
        mean, spread = (1, 0.2) if parameter.ndim == 1 else (0, parameter.shape[1] ** -0.5)
        torch.nn.init.normal_(parameter, mean, spread)
    lens = torch.tensor(text_lens * batch)[:batch]
    visible = torch.arange(text_len) < lens[:, None]
    x, dy = torch.randn(2, batch, length, dim).unbind()
    accelerate(model.blocks[1].branch)  # so that PyTorch's passes drop the same elements
    return model.blocks[1], x, model.rotary[:, :length], CausalMask(visible, length), dy


def passes(block, x, table, mask, dy, bf16, native):
    """The result, and the gradients of the input and of all weights."""
    block.zero_grad()
    x = x.clone().requires_grad_()
    torch.manual_seed(7)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        assert not native or train_block.supports(block, x)
        y = train_block.forward(block, x, table, mask) if native else block(x, table, mask)
    y.backward(dy)
    return {"y": y.detach(), "x": x.grad} | {n: p.grad.clone() for n, p in block.named_parameters()}


@needs_native
@pytest.mark.parametrize("case", CASES)
def test_as_exact_as_pytorch_in_bf16(case):
    inputs = make_block(**case)
    exact = passes(*inputs, bf16=False, native=False)
    rounded = passes(*inputs, bf16=True, native=False)
    found = passes(*inputs, bf16=True, native=True)
    assert found.keys() == exact.keys() and len(found) == 10
    for name, expected in exact.items():
        mine, theirs = ((x[name] - expected).norm() / expected.norm() for x in (found, rounded))
        most = 1.2 if expected.ndim > 1 else 1.6  # gains of heads are few numbers
        assert 0 < mine < min(0.02, most * theirs), (name, mine, theirs)


@needs_native
def test_the_same_twice_and_in_any_company():
    inputs = make_block(batch=6)
    block, x, table, mask, dy = inputs
    first, second = passes(*inputs, bf16=True, native=True), passes(*inputs, bf16=True, native=True)
    assert all(torch.equal(first[name], second[name]) for name in first)
    some = slice(2, 5)
    few = passes(block, x[some], table, CausalMask(mask.visible[some], mask.length), dy[some], True, True)
    assert torch.equal(few["y"], first["y"][some]) and torch.equal(few["x"], first["x"][some])
    try:
        torch.set_num_threads(3)
        shared = passes(*inputs, bf16=True, native=True)
        again = passes(*inputs, bf16=True, native=True)
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(shared[name], again[name]) for name in shared)
    assert torch.equal(shared["y"], first["y"]) and torch.equal(shared["x"], first["x"])
    torch.testing.assert_close(shared, first, rtol=1e-4, atol=1e-3)  # weights: sums in another order


@needs_native
def test_padding_is_never_seen():
    block, x, table, mask, dy = make_block(text_lens=(9, 4, 4))
    changed = x.clone()
    changed[1:, 4:9] = 100.0
    one = passes(block, x, table, mask, dy, bf16=True, native=True)
    other = passes(block, changed, table, mask, dy, bf16=True, native=True)
    assert torch.equal(one["y"][:, 9:], other["y"][:, 9:]) and torch.equal(one["y"][0], other["y"][0])


@needs_native
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_shows(value):
    """The trainer stops at a loss that is not finite: none of the passes may hide it."""
    block, x, table, mask, dy = make_block()
    x[1, 7, 5] = value
    found = passes(block, x, table, mask, dy, bf16=True, native=True)
    assert not found["y"][1, 7].isfinite().all() and found["y"][0].isfinite().all()
    assert not found["attention.qkv.weight"].isfinite().all()


@needs_native
@pytest.mark.parametrize("gain", [2.0, 6.0, 100.0])
def test_scores_too_large_to_be_exponents(gain):
    """Gains of more than about 3.4 each let scores of heads of 32 pass 100: their rows' maxima are taken off."""
    block, *others = make_block(num_heads=2, length=45, text_lens=(9, 1, 5))
    with torch.no_grad():
        block.attention.q_norm.weight.mul_(gain), block.attention.k_norm.weight.mul_(gain)
    exact = passes(block, *others, bf16=False, native=False)
    rounded = passes(block, *others, bf16=True, native=False)
    found = passes(block, *others, bf16=True, native=True)
    for name, expected in exact.items():
        mine, theirs = ((x[name] - expected).norm() / expected.norm() for x in (found, rounded))
        assert found[name].isfinite().all()
        if gain < 10:  # beyond, bf16 itself says nothing
            assert mine < 1.5 * theirs + 0.01, (name, mine, theirs)


@needs_native
def test_goes_back_once_and_uses_its_memory_again():
    block, x, table, mask, dy = make_block()
    accelerate(block)
    free = train_block._buffers._free
    with torch.autocast("cpu", torch.bfloat16):
        y = block(x.clone().requires_grad_(), table, mask)
        y.backward(dy, retain_graph=True)
        kept = len(free)
        with pytest.raises(RuntimeError, match="goes back once"):
            y.backward(dy)
        again = block(x.clone().requires_grad_(), table, mask)
    assert kept > 0 and len(free) == kept - 1 and torch.equal(again, y)
    again.backward(dy)
    assert len(free) == kept


@needs_native
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_checkpointing_keeps_nothing(monkeypatch, checkpointing):
    buffers = weakref.WeakSet()
    memory = train_block.memory

    def counted(size):
        buffers.add(buffer := memory(size))
        return buffer

    sizes = ModelOptions(dim=64, num_layers=3, num_heads=2, gradient_checkpointing=checkpointing)
    model = Dalle(sizes.config(50, 0, 8, 64, 4)).train()
    accelerate(model)
    monkeypatch.setattr(train_block, "memory", counted)
    monkeypatch.setattr(train_block, "_buffers", train_block._Buffers())
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(torch.randint(1, 50, (4, 8)), torch.randint(64, (4, 16))).image
    assert len(buffers) == (0 if checkpointing else 3)
    logits.float().sum().backward()
    assert len(train_block._buffers._free) == (1 if checkpointing else 3)


@needs_native
def test_a_model_learns_as_with_pytorch():
    """The first steps of training, gradient checkpointing included, follow the same path."""
    losses = {}
    for native, checkpointing in ((True, False), (True, True), (False, False)):
        torch.manual_seed(0)
        sizes = ModelOptions(dim=64, num_layers=2, num_heads=2, gradient_checkpointing=checkpointing)
        model = Dalle(sizes.config(50, 0, 8, 64, 4)).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        text, image = torch.randint(1, 50, (4, 8)), torch.randint(64, (4, 16))
        text[1, 3:] = 0
        trace = []
        if native:
            assert [t.count for t in accelerate(model).taken][:2] == [2, 1]  # blocks, heads
        for _ in range(12):
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(text, image).image
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), image.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            trace.append(float(loss.detach()))
        losses[native, checkpointing] = trace
    assert losses[True, False] == losses[True, True]
    assert losses[True, False] == pytest.approx(losses[False, False], rel=0.02)
    assert losses[True, False][-1] < 0.8 * losses[True, False][0]


@needs_native
def test_what_it_leaves_to_pytorch():
    def takes(x_dtype=torch.float32, autocast=True, **changes):
        block, x, *_ = make_block(**changes)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return train_block.supports(block, x.to(x_dtype))

    assert takes()
    assert not takes(autocast=False)
    assert not takes(x_dtype=torch.bfloat16)
    assert not takes(attention_dropout=0.1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "prefers_torch", lambda: True)
        assert not takes()
        patch.setattr(compiler, "prefers_torch", lambda: False)
        patch.setattr(train_block, "MOST_SUMS", 1000)
        assert not takes()
    assert not takes(num_heads=4)  # heads of 16
    assert not takes(dim=96, num_heads=2)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert takes(batch=3) and not takes(batch=2)
    finally:
        torch.set_num_threads(threads)
    with torch.no_grad():
        assert not takes()
    block, x, *_ = make_block()
    block.attention.qkv.weight.data = torch.empty(0)  # as ZeRO-3 leaves it between uses
    with torch.autocast("cpu", torch.bfloat16):
        assert not train_block.supports(block, x)


def test_without_a_compiler_pytorch_trains(no_compiler):
    block, x, table, mask, _ = make_block()
    with torch.autocast("cpu", torch.bfloat16):
        report = accelerate(block)
        assert block(x, table, mask).isfinite().all() and not train_block.supports(block, x)
    assert "0 of 1 blocks by compiled code (compiling train_block.cpp failed: exit code 1)" in str(report)


@needs_native
def test_kernels_compute_in_bf16_where_pytorch_would_emulate_it(monkeypatch):
    """On a CPU without bf16 the kernels take what `autocast` covers, also where it is computed a second time."""
    monkeypatch.setattr(precision, "has_native_bf16", lambda _: False)
    text, image = torch.randint(1, 50, (4, 8)), torch.randint(0, 64, (4, 256))
    calls, run = [], train_block.run_block
    monkeypatch.setattr(train_block, "run_block", lambda *a: calls.append(1) or run(*a))

    def gradients(name, checkpointing):
        torch.manual_seed(0)
        options = ModelOptions(dim=64, num_layers=2, num_heads=2, gradient_checkpointing=checkpointing)
        model = Dalle(options.config(50, 0, 8, 64, 16)).train()
        accelerate(model)
        calls.clear()
        with precision.autocast(torch.device("cpu"), name):
            output = model(text, image)
        output.image.float().square().mean().backward()
        return len(calls), model.blocks[0].attention.qkv.weight.grad

    (count, plain), (counted_twice, again) = gradients("auto", False), gradients("auto", True)
    assert (count, counted_twice) == (2, 4) and torch.equal(plain, again)
    none, exact = gradients("fp32", False)
    assert none == 0 and 0 < (plain - exact).norm() < 0.05 * exact.norm()
