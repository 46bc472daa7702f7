"""Muon against the definition by singular values, its groups, and the engines that carry it."""

import pytest
import torch
from torch import nn

from common.distributed import BatchPlan, World
from common.engine import make_engine
from common.engines.muon import MOMENTUM, NEWTON_SCHULZ, ROUNDS, UPDATE_SIZE, Muon, orthogonalized
from common.optim import OptimConfig, adamw, make_optimizer

ALONE = World(0, 1, 0, torch.device("cpu"), "none")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.fused = nn.Linear(8, 24, bias=False)
        self.head = nn.Linear(24, 5)

    @property
    def hidden_layers(self) -> list[nn.Module]:
        return [*self.blocks, self.fused]

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block(x).tanh()
        return self.head(self.fused(x).tanh())


def loss_of(model: Net, seed: int) -> torch.Tensor:
    ids = torch.randint(7, (16,), generator=torch.Generator().manual_seed(seed))
    return nn.functional.cross_entropy(model(ids), ids % 5)


@pytest.mark.parametrize("shape", [(3, 24, 24), (1, 16, 24), (1, 16, 40), (2, 40, 16)])
def test_singular_values_become_one(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-3
    values = torch.linalg.svdvals(orthogonalized(matrices).float())
    assert values.quantile(0.1) > 0.5 and values.max() < 1.3  # the tiniest of a square rise more slowly
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    cosine = nn.functional.cosine_similarity(orthogonalized(matrices).float().flatten(1), (u @ v).flatten(1))
    assert cosine.min() > 0.95, "the nearest orthogonal matrix"


def test_rounds_put_together_keep_small_singular_values():
    generator = torch.Generator().manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(2, 32, 96, generator=generator), full_matrices=False)
    matrices = u * torch.logspace(0, -2.5, 32) @ v  # as steep as the momenta of a trained convolution
    x = matrices / matrices.norm(dim=(1, 2), keepdim=True)
    a, b, c = NEWTON_SCHULZ
    for _ in range(ROUNDS):  # as published, in float32
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    result = orthogonalized(matrices).float()
    assert nn.functional.cosine_similarity(result.flatten(1), x.flatten(1)).min() > 0.995
    torch.testing.assert_close(torch.linalg.svdvals(result), torch.linalg.svdvals(x), rtol=0.1, atol=0.05)


def test_a_step_is_the_definition():
    model = nn.Linear(8, 24, bias=False)  # three squares
    before = model.weight.detach().clone()
    options = {"lr": 0.1, "weight_decay": 0.5, "lr_scale": 1.0}
    optimizer = Muon([{"params": [model.weight], "orthogonal": True, **options}], lr=0.1)
    gradient = torch.randn(24, 8, generator=torch.Generator().manual_seed(1))
    model.weight.grad = gradient.clone()
    optimizer.step()
    momentum = (1 - MOMENTUM) * gradient
    ahead = (1 - MOMENTUM) * gradient + MOMENTUM * momentum
    blocks = orthogonalized(ahead.view(3, 8, 8)).float()
    expected = before * (1 - 0.1 * 0.5) - 0.1 * UPDATE_SIZE * 8**0.5 * blocks.reshape(24, 8)
    torch.testing.assert_close(model.weight.detach(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(optimizer.state[model.weight]["momentum"], momentum)
    size = (model.weight.detach() - before * 0.95).square().mean().sqrt()
    assert float(size) == pytest.approx(0.1 * UPDATE_SIZE, rel=0.2), "entries as large as AdamW's"


def test_kernels_are_matrices_of_their_outputs():
    kernel = nn.Parameter(torch.zeros(6, 2, 3, 3))
    optimizer = Muon([{"params": [kernel], "orthogonal": True, "weight_decay": 0.0}], lr=1.0)
    kernel.grad = torch.randn(6, 2, 3, 3, generator=torch.Generator().manual_seed(2))
    optimizer.step()
    values = torch.linalg.svdvals(kernel.detach().flatten(1)) / (UPDATE_SIZE * 18**0.5)
    assert values.min() > 0.5 and values.max() < 1.3


def test_hidden_matrices_are_orthogonal_and_the_rest_is_adamw():
    model = Net()
    optimizer = make_optimizer(model, OptimConfig(name="muon", lr=0.1, weight_decay=0.4, muon_lr_ratio=4.0))
    matrices, decay, plain = optimizer.param_groups
    hidden = [*(b.weight for b in model.blocks), model.fused.weight]
    assert [id(p) for p in matrices["params"]] == [id(p) for p in hidden]
    assert matrices["lr_scale"] * matrices["weight_decay"] == pytest.approx(decay["weight_decay"])
    assert [id(p) for p in decay["params"]] == [id(model.head.weight)]
    assert plain["weight_decay"] == 0.0 and len(plain["params"]) == 4
    other = Net()
    other.load_state_dict(model.state_dict())
    reference = adamw(other, OptimConfig(lr=0.1, weight_decay=0.4))
    for each, net in ((optimizer, model), (reference, other)):
        loss_of(net, 0).backward()
        each.step()
    torch.testing.assert_close(model.head.weight, other.head.weight)
    torch.testing.assert_close(model.embed.weight, other.embed.weight)
    assert not torch.allclose(model.fused.weight, other.fused.weight)


def test_it_learns():
    torch.manual_seed(0)
    model = Net()
    optimizer = make_optimizer(model, OptimConfig(name="muon", lr=0.01))
    losses = []
    for step in range(60):
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0]


def engine(model: nn.Module, config: OptimConfig):
    return make_engine(model, make_optimizer(model, config), ALONE, BatchPlan(16, 16, 1))


def trained(model: Net, each, steps: range) -> dict[str, torch.Tensor]:
    for step in steps:
        each.set_lr(0.01)
        for _ in each.micro_batches({"x": torch.zeros(1)}):
            each.backward(loss_of(model, step))
        each.step()
    return each.weights()


def test_a_resumed_run_is_the_same_bit_for_bit():
    config = OptimConfig(name="muon", lr=0.01)
    torch.manual_seed(0)
    whole, half, rest = Net(), Net(), Net()
    half.load_state_dict(whole.state_dict())
    expected = trained(whole, engine(whole, config), range(6))
    first = engine(half, config)
    trained(half, first, range(3))
    second = engine(rest, config)
    second.load_state(first.weights(), first.state())
    found = trained(rest, second, range(3, 6))
    assert all(torch.equal(found[n], expected[n]) for n in expected)


def test_another_optimizers_moments_are_refused():
    model = Net()
    state = engine(model, OptimConfig()).state()
    with pytest.raises(ValueError, match=r"trained with adamw, not with muon: set --optim\.name adamw"):
        engine(model, OptimConfig(name="muon")).load_state(model.state_dict(), state)


def test_models_without_hidden_layers_are_refused():
    with pytest.raises(ValueError, match="use adamw here"):
        make_optimizer(nn.Linear(2, 2), OptimConfig(name="muon"))
