"""ZeRO gives the run of the plain process, in the same checkpoint directory, and goes on from any other."""

from pathlib import Path

import pytest
import torch
from processes import difference, run, trace, training_state, weights
from torch import nn

from common.distributed import BatchPlan, World
from common.engine import make_engine
from common.engines.deepspeed import DeepSpeedConfig
from common.optim import OptimConfig, adamw

TOLERANCE = 2e-5  # twelve AdamW steps; sums are taken in another order


def zero(stage: int) -> tuple[str, ...]:
    return "--engine", "deepspeed", "--deepspeed.zero-stage", str(stage)


def assert_same_run(directory: Path, reference: Path) -> None:
    """Losses, gradient norms, weights, moments, averages and files."""
    assert difference(trace(directory, "loss"), trace(reference, "loss")) < TOLERANCE
    assert difference(trace(directory, "grad_norm"), trace(reference, "grad_norm")) < TOLERANCE
    assert difference(weights(directory), weights(reference)) < TOLERANCE
    state, expected = training_state(directory), training_state(reference)
    assert difference(state["task"], expected["task"]) < TOLERANCE
    assert state["step"] == expected["step"] and state["samples"] == expected["samples"]
    files = [sorted(str(p.relative_to(d)) for p in d.rglob("step_*/**/*")) for d in (directory, reference)]
    assert files[0] == files[1]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_processes_give_the_plain_run(stage, tmp_path, tokens, plain_run):
    assert trace(plain_run, "grad_norm")[0][1] > 0.5, "clipping must matter"
    assert_same_run(run(tmp_path / "run", tokens, *zero(stage), size=2, launcher="deepspeed"), plain_run)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_one_process_without_launcher_gives_the_plain_run(stage, tmp_path, tokens, plain_run):
    assert_same_run(run(tmp_path / "run", tokens, *zero(stage)), plain_run)


@pytest.mark.parametrize(
    "stage", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)]
)
def test_accumulation_gives_the_plain_run(stage, tmp_path, tokens, plain_run):
    flags = (*zero(stage), "--loop.micro-batch-size", "2")
    assert_same_run(run(tmp_path / "run", tokens, *flags, size=2, launcher="torchrun"), plain_run)


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ((3, 2), (1, 1)),
        pytest.param((1, 1), (3, 2), marks=pytest.mark.slow),
        ((None, 1), (2, 2)),
        pytest.param((2, 2), (None, 1), marks=pytest.mark.slow),
    ],
)
def test_a_run_goes_on_under_another_engine_and_number_of_processes(first, then, tmp_path, tokens, plain_run):
    """Six steps of `first`, saved in the middle of an epoch, then six of `then`: (ZeRO stage or None, processes)."""
    for (stage, size), steps in ((first, "7"), (then, "12")):
        flags = zero(stage) if stage is not None else ()
        # the horizon of the schedule stays 12: the first half ends by a signal in real life, here by its length
        flags = (*flags, "--loop.num-steps", steps, "--optim.schedule", "constant")
        run(tmp_path / "run", tokens, *flags, size=size, launcher="torchrun" if size > 1 else "none")
    whole = run(tmp_path / "whole", tokens, "--optim.schedule", "constant")
    rows = [
        row for row in trace(tmp_path / "run", "loss") if row[0] != -7
    ]  # the first half ended in an evaluation
    assert difference(rows, trace(whole, "loss")) < TOLERANCE
    assert difference(weights(tmp_path / "run"), weights(whole)) < TOLERANCE
    assert difference(training_state(tmp_path / "run")["task"], training_state(whole)["task"]) < TOLERANCE


MUON = ("--optim.name", "muon")
# Orthogonal matrices are found in bf16, where a sum in another order may round up or down. Momenta that get lost on the
# way change weights by 0.07.
BF16_TOLERANCE = 1e-2


def assert_same_muon_run(directory: Path, reference: Path) -> None:
    (*_, last), (*_, expected) = trace(directory, "loss"), trace(reference, "loss")
    assert last[0] == expected[0] and last[1] == pytest.approx(expected[1], rel=BF16_TOLERANCE)
    assert difference(weights(directory), weights(reference)) < BF16_TOLERANCE
    state, whole = training_state(directory)["task"], training_state(reference)["task"]
    assert difference(state, whole) < BF16_TOLERANCE
    assert "momentum" in state["engine"]["moments"]["block.linear1.weight"]


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_muon_steps_whole_matrices(stage, size, tmp_path, tokens, muon_run):
    run(tmp_path / "run", tokens, *zero(stage), *MUON, size=size, launcher="deepspeed")
    assert_same_muon_run(tmp_path / "run", muon_run)


@pytest.mark.parametrize(
    ("first", "then"), [pytest.param((3, 2), (2, 2), marks=pytest.mark.slow), ((1, 2), (None, 1))]
)
def test_muon_goes_on_under_another_engine(first, then, tmp_path, tokens):
    for (stage, size), steps in ((first, "7"), (then, "12")):
        flags = (*(zero(stage) if stage is not None else ()), *MUON, "--optim.schedule", "constant")
        run(tmp_path / "run", tokens, *flags, "--loop.num-steps", steps, size=size, launcher="torchrun")
    whole = run(tmp_path / "whole", tokens, *MUON, "--optim.schedule", "constant")
    assert_same_muon_run(tmp_path / "run", whole)


def small_engine(name: str, **options) -> tuple[nn.Module, object]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1))
    world = World(0, 1, 0, torch.device("cpu"), "none")
    engine = make_engine(
        model, adamw(model, OptimConfig()), world, BatchPlan(4, 4, 1), 1.0, name, DeepSpeedConfig(**options)
    )
    return model, engine


def test_options_that_an_engine_cannot_follow_are_refused():
    with pytest.raises(ValueError, match="cpu_offload needs"):
        small_engine("deepspeed", cpu_offload=True)
    with pytest.raises(ValueError, match="cpu_offload needs"):
        small_engine("plain", cpu_offload=True)
    with pytest.raises(ValueError, match="unknown engine"):
        small_engine("horovod")
