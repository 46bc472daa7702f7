"""`accelerate`: what it takes, and that a changed model is never computed by the kernel of the old one."""

import copy
import pickle

import pytest
import torch
from torch import nn

from dalle.attention import RMSNorm
from dalle.losses import CrossEntropy
from dalle.model import Block, BranchDropout, Dalle, ModelOptions, SwiGLU
from kernels import OFF, accelerate, autograd, compiler, train_block

pytestmark = pytest.mark.skipif(
    bool(compiler.unavailable_reason(train_block.SOURCE)), reason="no compiled training on this machine"
)
LAYERS = 3


@pytest.fixture(autouse=True)
def without_amx(monkeypatch):
    monkeypatch.setattr(compiler, "prefers_torch", lambda: False)


def make(**options) -> Dalle:
    torch.manual_seed(0)
    sizes = ModelOptions(dim=64, num_layers=LAYERS, num_heads=2, **options)
    return Dalle(sizes.config(50, 0, 8, 64, 4)).train()


def compiled_blocks(model: Dalle, monkeypatch) -> int:
    """Blocks of a training step that compiled code computes."""
    calls, run = [], train_block.run_block
    with monkeypatch.context() as patch:
        patch.setattr(train_block, "run_block", lambda *a: calls.append(1) or run(*a))
        with torch.autocast("cpu", torch.bfloat16):
            output = model(torch.randint(1, 50, (4, 8)), torch.randint(64, (4, 16)))
        output.image.float().sum().backward()
    return len(calls)


class MyBlock(Block):
    def forward(self, x, table, mask):
        return super().forward(2 * x, table, mask)


class LoraLinear(nn.Module):
    """A linear layer with an addend of low rank."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.down = base, nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def layer_norm(model, monkeypatch):
    model.blocks[1].attention_norm = nn.LayerNorm(64, bias=False)


def bias_in_qkv(model, monkeypatch):
    model.blocks[1].attention.qkv.bias = nn.Parameter(torch.zeros(192))


def forward_hook(model, monkeypatch):
    model.blocks[1].ffn.register_forward_hook(lambda module, inputs, y: 2 * y)


def subclass(model, monkeypatch):
    model.blocks[1].__class__ = MyBlock


def lora(model, monkeypatch):
    model.blocks[1].attention.out = LoraLinear(model.blocks[1].attention.out)


def parametrised(model, monkeypatch):
    nn.utils.parametrizations.weight_norm(model.blocks[1].ffn.out)


def own_forward(model, monkeypatch):
    model.blocks[1].ffn.forward = lambda x: x


def other_eps(model, monkeypatch):
    model.blocks[1].ffn_norm.eps = 1e-3


def one_more_layer(model, monkeypatch):
    model.blocks[1].ffn.gate_norm = RMSNorm(64)


IN_ONE_BLOCK = [
    layer_norm, bias_in_qkv, forward_hook, subclass, lora, parametrised, own_forward, other_eps, one_more_layer,
]  # fmt: skip


def gelu_for_silu(model, monkeypatch):
    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.out(nn.functional.gelu(gate) * up)

    monkeypatch.setattr(SwiGLU, "forward", forward)


def parallel_residual(model, monkeypatch):
    def forward(self, x, table, mask):
        attended = self.attention(self.attention_norm(x), table, mask)
        return x + self.branch(attended) + self.branch(self.ffn(self.ffn_norm(x)))

    monkeypatch.setattr(Block, "forward", forward)


def norm_with_a_mean(model, monkeypatch):
    def forward(self, x):
        return nn.functional.layer_norm(x, self.weight.shape, self.weight.to(x.dtype), None, self.eps)

    monkeypatch.setattr(RMSNorm, "forward", forward)


IN_ALL_BLOCKS = [gelu_for_silu, parallel_residual, norm_with_a_mean]


def test_an_unchanged_model_is_taken_and_the_report_says_so(monkeypatch):
    model, entropy = make(), CrossEntropy()
    report = accelerate(model, entropy)
    assert f"kernels: {LAYERS} of {LAYERS} blocks by compiled code, 1 of 1 heads by compiled code" in str(
        report
    )
    assert report.record()["level"] == compiler.level()
    assert report.record()["norms"] == f"{4 * LAYERS + 1} of {4 * LAYERS + 1} norms by hand-written passes"
    assert compiled_blocks(model, monkeypatch) == LAYERS
    assert accelerate(model, entropy) == report


@pytest.mark.parametrize("change", IN_ONE_BLOCK)
def test_a_changed_block_is_left_to_pytorch(change, monkeypatch):
    model = make()
    change(model, monkeypatch)
    report = accelerate(model)
    assert f"{LAYERS - 1} of {LAYERS} blocks by compiled code (" in str(report)
    assert compiled_blocks(model, monkeypatch) == LAYERS - 1


@pytest.mark.parametrize("change", IN_ONE_BLOCK)
def test_a_block_that_changes_later_is_left_to_pytorch(change, monkeypatch):
    model = make()
    accelerate(model)
    change(model, monkeypatch)
    assert compiled_blocks(model, monkeypatch) == LAYERS - 1


@pytest.mark.parametrize("change", IN_ALL_BLOCKS)
def test_changed_code_is_left_to_pytorch_loudly(change, monkeypatch, capsys):
    """The classes keep their names and layers; only the comparison with the module's own results shows it."""
    model = make()
    change(model, monkeypatch)
    report = accelerate(model)
    assert f"0 of {LAYERS} blocks by compiled code (not what the kernel computes" in str(report)
    assert "warning: a kernel is not used" in capsys.readouterr().out
    assert compiled_blocks(model, monkeypatch) == 0


def test_a_changed_norm_or_loss_is_left_to_pytorch(monkeypatch, capsys):
    model, entropy = make(), CrossEntropy()
    norm_with_a_mean(model, monkeypatch)
    monkeypatch.setattr(
        CrossEntropy,
        "forward",
        lambda self, x, y: nn.functional.cross_entropy(x.float(), y, reduction="none", label_smoothing=0.2),
    )
    record = accelerate(model, entropy).record()
    for name in ("norms", "heads", "cross-entropies"):
        assert record[name].startswith("0 of "), record[name]
    assert capsys.readouterr().out.count("warning") >= 3


def test_changed_dropout_is_left_to_pytorch(monkeypatch):
    monkeypatch.setattr(BranchDropout, "forward", lambda self, y: y)
    assert accelerate(make(dropout=0.5)).record()["branches"].startswith(f"0 of {LAYERS}")


def test_weights_that_are_not_contiguous_are_left_to_pytorch(monkeypatch):
    model = make()
    weight = model.blocks[1].ffn.out.weight
    weight.data = weight.data.t().contiguous().t()
    assert "weights are not whole" in str(accelerate(model))
    assert compiled_blocks(model, monkeypatch) == LAYERS - 1


def test_float32_and_off():
    model = make()
    assert accelerate(model, in_bf16=False).record()["blocks"].endswith("(computed in float32)")
    assert OFF.record() == {"off": "off: PyTorch computes everything"}


def test_names_and_random_numbers_stay(monkeypatch):
    model = make(dropout=0.1)
    names = list(model.state_dict())
    before = torch.get_rng_state()
    accelerate(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert list(model.state_dict()) == names and type(model.blocks[0]) is Block


def test_a_copy_is_accelerated_by_its_own_weights(monkeypatch):
    model = make()
    accelerate(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert compiled_blocks(other, monkeypatch) == LAYERS
        assert other.blocks[0].attention.qkv.weight.grad is not None
        assert model.blocks[0].attention.qkv.weight.grad is None


def test_a_model_has_the_results_of_pytorch(monkeypatch):
    """With all kernels against without any, a whole pass forward and back."""
    found = []
    for on in (True, False):
        model = make()
        if on:
            accelerate(model)
        text, image = torch.randint(1, 50, (4, 8)), torch.randint(64, (4, 16))
        text[1, 3:] = 0
        with torch.autocast("cpu", torch.bfloat16):
            output = model(text, image)
        (output.image.float().square().mean() + output.text.float().square().mean()).backward()
        found.append({n: p.grad for n, p in model.named_parameters()})
    for name, gradient in found[1].items():
        assert (found[0][name] - gradient).norm() < 0.05 * gradient.norm() + 1e-6, name


def test_structures_of_another_size_are_refused(monkeypatch):
    class Wrong(train_block._Shape):
        _fields_ = (("more", train_block._integer),)

    source = compiler.Source("train_block.cpp", (Wrong, *train_block.SOURCE.structures[1:]))
    assert "bytes in train_block.cpp" in compiler.unavailable_reason(source)
    monkeypatch.setattr(compiler, "ABI_VERSION", compiler.ABI_VERSION + 1)
    with pytest.raises(compiler.AbiMismatch, match="has version"):
        compiler.load.__wrapped__(train_block.SOURCE)


def test_layouts_that_cpp_cannot_read_are_refused():
    square = torch.zeros(4, 4)
    assert compiler.address(square, torch.float32) == square.data_ptr()
    for wrong in (square.t()[:, :2], square.double(), square[:, ::2]):
        with pytest.raises(ValueError, match="contiguous"):
            compiler.address(wrong, torch.float32)


def test_the_branch_mask_is_what_the_module_multiplies_with():
    branch = BranchDropout(0.5, 0.5).train()
    torch.manual_seed(0)
    mask = autograd.branch_mask(branch, torch.ones(40, 3, 8))
    samples = (mask != 0).flatten(1).any(1).float().mean()
    assert 0.2 < samples < 0.8 and set(mask.unique().tolist()) == {0.0, 4.0}
    assert autograd.branch_mask(branch.eval(), torch.ones(2, 3, 8)) is None
