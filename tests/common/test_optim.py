"""The learning-rate curve, decay groups, and the moving average."""

import itertools
import math

import pytest
import torch
from torch import nn

from common.optim import Ema, OptimConfig, adamw, learning_rate


def test_the_curve_warms_up_and_falls_to_its_floor():
    config = OptimConfig(lr=1.0, min_lr_ratio=0.1, warmup_steps=4)
    rates = [learning_rate(config, step, 104) for step in range(105)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and rates[4] == 1.0
    assert rates[54] == pytest.approx(0.1 + 0.9 * 0.5)  # half-way down the cosine
    assert rates[104] == pytest.approx(0.1) and min(rates[4:]) == rates[104]
    assert all(a >= b for a, b in itertools.pairwise(rates[4:]))
    linear = OptimConfig(lr=1.0, min_lr_ratio=0.0, warmup_steps=0, schedule="linear")
    assert learning_rate(linear, 25, 100) == pytest.approx(0.75)
    constant = OptimConfig(lr=0.3, warmup_steps=0, schedule="constant")
    assert learning_rate(constant, 99, 100) == 0.3


@pytest.mark.parametrize("bad", [{"lr": 0}, {"min_lr_ratio": 1.5}, {"warmup_steps": -1}, {"grad_clip": -1.0}])
def test_impossible_options_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        OptimConfig(**bad)


def test_only_matrices_that_are_no_embeddings_decay():
    model = nn.ModuleDict(
        {"e": nn.Embedding(3, 4), "l": nn.Linear(4, 4), "n": nn.LayerNorm(4), "c": nn.Conv2d(1, 1, 3)}
    )
    model["l"].bias.requires_grad_(False)
    decay, plain = adamw(model, OptimConfig(weight_decay=0.3)).param_groups
    assert decay["weight_decay"] == 0.3 and plain["weight_decay"] == 0.0
    assert {id(p) for p in decay["params"]} == {id(model["l"].weight), id(model["c"].weight)}
    others = [model["e"].weight, model["n"].weight, model["n"].bias, model["c"].bias]
    assert {id(p) for p in plain["params"]} == {id(p) for p in others}


def test_a_step_is_adamw_by_hand():
    """Loshchilov and Hutter 2019, algorithm 2, first step: the moments' bias corrections cancel to the sign."""
    model = nn.Linear(2, 1, bias=False)
    before = model.weight.detach().clone()
    optimizer = adamw(model, OptimConfig(lr=0.1, weight_decay=0.5))
    model(torch.tensor([[1.0, -2.0]])).sum().backward()
    optimizer.step()
    expected = before * (1 - 0.1 * 0.5) - 0.1 * torch.tensor([[1.0, -1.0]])
    assert torch.allclose(model.weight, expected, atol=1e-6)


def test_the_average_is_the_hand_computed_one():
    model = nn.Linear(1, 1, bias=False)
    model.register_buffer("count", torch.tensor(0))
    nn.init.constant_(model.weight, 1.0)
    ema, average = Ema(model, 0.5), 1.0
    for n, value in enumerate([2.0, 4.0, 8.0], 1):
        nn.init.constant_(model.weight, value)
        model.count.fill_(n)
        ema.update(model)
        decay = min(0.5, (1 + n) / (10 + n))
        average = decay * average + (1 - decay) * value
    assert float(ema.shadow["weight"]) == pytest.approx(average)
    assert int(ema.shadow["count"]) == 3, "what is no float is copied"
    fresh = Ema(nn.Linear(1, 1, bias=False), 0.5)
    fresh.shadow["count"] = torch.tensor(0)
    fresh.load_state(ema.state())
    assert fresh.state() == {
        "num_updates": 3,
        "shadow.weight": ema.shadow["weight"],
        "shadow.count": torch.tensor(3),
    }
    assert math.isclose(fresh.decay, 0.5)
    for decay in (-0.1, 1.0):
        with pytest.raises(ValueError, match="ema decay"):
            Ema(model, decay)
