"""Batches divide exactly, engines step alike, states go round."""

import copy
import os

import pytest
import torch
from processes import CONTEXT, SECONDS, difference, launcher_env, run, trace, training_state, weights
from torch import nn

from common import precision
from common.distributed import BatchPlan, World, batch_plan, pick_device, start_world, stop_world
from common.engine import make_engine
from common.engines.plain import split_batch
from common.optim import OptimConfig, adamw
from common.precision import autocast, has_native_bf16

ALONE = World(0, 1, 0, torch.device("cpu"), "none")


def test_a_plan_divides_exactly():
    plan = batch_plan(48, 4, 3)
    assert (plan.rank_batch_size, plan.accumulation) == (12, 4)
    assert batch_plan(48, 4).accumulation == 1


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((10, 4), "10 does not divide over 4 processes: use a multiple of 4"),
        ((12, 2, 4), "choose micro_batch_size among the divisors of 6"),
        ((0, 1), "must be at least 1, not 0"),
        ((8, 1, 0), "must be at least 1, not 8 and 0"),
        ((2, 4), "does not divide over 4"),
    ],
)
def test_a_batch_that_does_not_divide_is_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        batch_plan(*sizes)


def test_micro_batches_are_slices_in_order():
    batch = {"x": torch.arange(6), "key": list("abcdef")}
    parts = list(split_batch(batch, 3))
    assert [p["x"].tolist() for p in parts] == [[0, 1], [2, 3], [4, 5]]
    assert [p["key"] for p in parts] == [["a", "b"], ["c", "d"], ["e", "f"]]
    for bad in ({"x": torch.arange(5)}, {"x": torch.arange(6), "y": [1, 2, 3]}, {"x": []}):
        with pytest.raises(ValueError, match="does not split into 3 equal"):
            list(split_batch(bad, 3))


def test_cuda_is_the_gpu_of_this_process(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: chosen.append(int(index)))
    for name, local_rank, index in (("cuda", 0, 0), ("cuda", 1, 1), ("auto", 1, 1), ("cuda:1", 0, 1)):
        assert pick_device(name, local_rank) == torch.device("cuda", index) and chosen[-1] == index
    with pytest.raises(ValueError, match="cuda:2 was asked for, but this machine has 2 GPUs"):
        pick_device("cuda:2")


def small() -> tuple[nn.Module, object]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Tanh(), nn.Linear(7, 1))
    return model, make_engine(
        model, adamw(model, OptimConfig(lr=0.1)), ALONE, BatchPlan(8, 8, 1), grad_clip=0.3
    )


def take_step(engine, data: torch.Tensor, accumulation: int = 1) -> float:
    for micro in engine.micro_batches({"x": data}, accumulation):
        engine.backward(engine.model(micro["x"]).square().mean())
    return engine.step()


def test_accumulation_equals_the_whole_batch():
    data = torch.randn(8, 5)
    (one, whole), (other, split) = small(), small()
    norms = take_step(whole, data), take_step(split, data, 4)
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    assert difference(dict(one.state_dict()), dict(other.state_dict())) < 1e-6


def test_the_norm_is_that_before_clipping_and_the_update_that_after():
    """With SGD at rate 1 the update is the clipped gradient."""
    model = nn.Linear(3, 1, bias=False)
    before = model.weight.detach().clone()
    engine = make_engine(model, torch.optim.SGD(model.parameters(), lr=1.0), ALONE, BatchPlan(2, 2, 1), 0.5)
    data = torch.tensor([[3.0, 0.0, 4.0], [3.0, 0.0, 4.0]])
    engine.backward(engine.model(data).mean())
    assert engine.step() == pytest.approx(5.0)
    assert torch.allclose(before - model.weight, torch.tensor([[0.3, 0.0, 0.4]]), atol=1e-5)
    assert model.weight.grad is None


def test_a_bad_gradient_leaves_the_weights_alone():
    model, engine = small()
    before = copy.deepcopy(model.state_dict())
    engine.backward(engine.model(torch.full((2, 5), float("nan"))).mean())
    assert not torch.isfinite(torch.tensor(engine.step()))
    assert difference(dict(before), dict(model.state_dict())) == 0.0


def test_the_rate_reaches_every_group_with_its_scale():
    _, engine = small()
    engine.optimizer.param_groups[1]["lr_scale"] = 0.1
    engine.set_lr(0.5)
    assert [g["lr"] for g in engine.optimizer.param_groups] == [0.5, 0.05]


def test_a_fresh_engine_goes_on_bit_for_bit(tmp_path):
    data = torch.randn(6, 8, 5)
    (model, engine), (other, fresh) = small(), small()
    for batch in data[:3]:
        take_step(engine, batch)
    torch.save({"weights": engine.weights(), "engine": engine.state()}, tmp_path / "s.pt")
    saved = torch.load(tmp_path / "s.pt", weights_only=True)
    fresh.load_state(saved["weights"], saved["engine"])
    for batch in data[3:]:
        assert take_step(engine, batch) == take_step(fresh, batch)
    assert difference(dict(model.state_dict()), dict(other.state_dict())) == 0.0
    assert difference(engine.state(), fresh.state()) == 0.0
    assert difference(saved["weights"], dict(model.state_dict())) > 0.0, "what was saved did not move along"


def test_ddp_gives_the_plain_run(tmp_path, tokens, plain_run):
    flags = ("--loop.micro-batch-size", "2")  # gradients meet at the last micro-batch only
    directory = run(tmp_path / "run", tokens, *flags, size=2, launcher="torchrun")
    assert difference(trace(directory, "loss", "grad_norm"), trace(plain_run, "loss", "grad_norm")) < 2e-5
    assert difference(weights(directory), weights(plain_run)) < 2e-5
    assert difference(training_state(directory)["task"], training_state(plain_run)["task"]) < 2e-5


def _reductions(env: dict[str, str], results) -> None:
    os.environ.update(env)
    world = start_world("cpu")
    rank = world.rank
    mean = world.mean({"b": 1.0 + rank, "a": 10.0})
    weighted = world.mean({"x": 4.0 if rank else float("nan")}, weight=3.0 * rank)
    spread = world.mean({"x": 2.0 + rank}, weight=1.0 + 2 * rank)
    flags = world.any({"only_one": rank == 1, "none": False})
    total = world.sum_(torch.tensor([1.0 + rank])).item()
    first = world.from_main_(torch.tensor([7.0 - rank])).item()
    world.barrier()
    stop_world()
    results.put((rank, mean, list(mean), weighted, spread, flags, total, first))


def test_processes_agree():
    results = CONTEXT.Queue()
    env = launcher_env("torchrun", 2)
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    processes = [CONTEXT.Process(target=_reductions, args=(env | rank, results)) for rank in ranks]
    for process in processes:
        process.start()
    got = sorted(results.get(timeout=SECONDS) for _ in processes)
    assert [row[0] for row in got] == [0, 1]
    for _, mean, order, weighted, spread, flags, total, first in got:
        assert mean == {"b": 1.5, "a": 10.0} and order == ["b", "a"]
        assert weighted == {"x": 4.0}, "a process without samples has no say"
        assert spread == {"x": 2.75}
        assert flags == {"only_one": True, "none": False}
        assert (total, first) == (3.0, 7.0)


def test_one_process_needs_no_group():
    assert ALONE.mean({"a": 1.0}) == {"a": 1.0} and ALONE.any({"a": True}) == {"a": True}
    assert ALONE.sum_(torch.ones(1)).item() == 1.0 and ALONE.from_main_(torch.ones(1)).item() == 1.0
    assert ALONE.is_main
    assert start_world("cpu").launcher == "none"


def test_devices_that_are_not_there_are_refused():
    assert pick_device("cpu").type == "cpu"
    with pytest.raises(ValueError, match="unknown device 'gpu7'"):
        pick_device("gpu7")
    if not torch.cuda.is_available():
        assert pick_device("auto").type == "cpu"
        with pytest.raises(ValueError, match="has no usable GPU: use --device cpu"):
            pick_device("cuda")


def test_apples_gpu_is_chosen_where_it_is_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device("auto") == pick_device("mps") == torch.device("mps")
    assert not has_native_bf16(torch.device("mps"))
    monkeypatch.setenv("WORLD_SIZE", "2")  # gloo cannot reduce its tensors
    assert pick_device("auto").type == "cpu"
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device("auto").type == "cpu"
    with pytest.raises(ValueError, match="no GPU of Apple's: use --device cpu"):
        pick_device("mps")


def test_autocast_computes_in_the_precision_asked_for(monkeypatch):
    layer, cpu = nn.Linear(2, 2), torch.device("cpu")
    for native in (
        True,
        False,
    ):  # PyTorch would only emulate bf16 on the other CPU: there it is for kernels alone
        monkeypatch.setattr(precision, "has_native_bf16", lambda _, native=native: native)
        for name, kernels in (("bf16", True), ("auto", True), ("fp32", False)):
            with autocast(cpu, name):
                in_bf16 = layer(torch.ones(1, 2)).dtype == torch.bfloat16
                assert in_bf16 == (kernels and native)
                assert precision.trains_in_bf16() == kernels
        assert not precision.trains_in_bf16()
