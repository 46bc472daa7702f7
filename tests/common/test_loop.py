"""What the loop does when, what it says, and how it ends."""

import json
import math
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from common import checkpoint
from common.distributed import BatchPlan, World
from common.engine import make_engine
from common.loop import LoopConfig, NonFiniteLoss, fit
from common.optim import OptimConfig, adamw

ALONE = World(0, 1, 0, torch.device("cpu"), "none")


class LineTask:
    """A linear model with drop-out; notes the order of what the loop asks of it."""

    validation_metric = "loss"

    def __init__(self, losses: dict[int, float] | None = None, at: dict[int, Any] | None = None) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.Linear(3, 1))
        self.engine = make_engine(self.model, adamw(self.model, OptimConfig()), ALONE, BatchPlan(4, 4, 1))
        self.losses, self.at = losses or {}, at or {}
        self.calls: list[str] = []

    def train_step(self, batch: dict[str, Any], step: int) -> dict[str, float]:
        if step in self.at:
            self.at[step]()
        loss = self.engine.model(batch["x"]).square().mean()
        self.engine.backward(loss)
        self.engine.step()
        late = {"late": float(step)} if step >= 3 else {}
        return {"loss": loss.item()} | late

    def evaluate(self, step: int) -> dict[str, float]:
        self.calls.append(f"evaluate {step}")
        torch.rand(3)  # draws from the global generator, as sampling does
        return {"loss": self.losses.get(step, 1.0)}

    def sample(self, step: int) -> dict[str, Image.Image]:
        self.calls.append(f"sample {step}")
        return {"grid": Image.new("RGB", (2, 2))}

    def state(self) -> dict[str, Any]:
        return {"weights": self.engine.weights(), "engine": self.engine.state()}

    def save(self, directory: Path, step: int, state: dict[str, Any]) -> None:
        self.calls.append(f"save {step}")
        checkpoint.write_model(directory, "line", {}, state["weights"], step)

    def load_state(self, state: dict[str, Any]) -> None:
        self.engine.load_state(state["weights"], state["engine"])


def endless(start: int, length: int | None = None):
    """Samples numbered from `start`; four a batch."""
    end = None if length is None else start + 4 * length
    while end is None or start < end:
        x = torch.stack([torch.full((3,), math.sin(start + i)) for i in range(4)])
        yield {"x": x, "key": [f"k{start + i}" for i in range(4)]}
        start += 4


def config(run_dir: Path, **changes: Any) -> LoopConfig:
    base = LoopConfig(
        run_dir, 10, 4, log_every=4, eval_every=4, sample_every=5, save_every=3, tensorboard=False
    )
    return replace(base, **changes)


def train(task: LineTask, loop: LoopConfig, batches=endless) -> dict[str, float]:
    return fit(task, batches, loop, ALONE, {"the": "options"})


def rows(run_dir: Path, kind: str = "train") -> list[dict[str, float]]:
    lines = (run_dir / "metrics.jsonl").read_text("utf-8").splitlines()
    speed = ("samples_per_second", "data_share", "eta_seconds", "kind")
    parsed = [json.loads(line) for line in lines]
    return [{k: v for k, v in r.items() if k not in speed} for r in parsed if r["kind"] == kind]


def test_everything_happens_at_its_step_and_once_at_the_end(tmp_path):
    task = LineTask()
    assert train(task, config(tmp_path)) == {"loss": 1.0}
    assert task.calls == [
        "save 3", "evaluate 4", "sample 5", "save 6", "evaluate 8", "save 9", "evaluate 10", "sample 10", "save 10",
    ]  # fmt: skip
    assert [r["step"] for r in rows(tmp_path)] == [1, 4, 8, 10]
    assert [r["step"] for r in rows(tmp_path, "val")] == [4, 8, 10]
    assert "late" not in rows(tmp_path)[0] and rows(tmp_path)[2]["late"] == 5.5
    kept = [d.name for d in checkpoint.step_directories(tmp_path)]
    assert kept == ["step_00000009", "step_00000010"], "the last two; the best, of step 4, was never saved"
    files = sorted(str(p.relative_to(tmp_path / "latest")) for p in (tmp_path / "latest").rglob("*"))
    assert files == [
        "config.json",
        "model.safetensors",
        "train_config.json",
        "training_state",
        "training_state/state.pt",
    ]


def test_a_checkpoint_records_hours_and_images_over_all_starts(tmp_path):
    def costs(step: int) -> tuple[float, int]:
        found = json.loads((tmp_path / f"step_{step:08d}" / "config.json").read_text())
        return found["training_hours"] * 3600, found["images_seen"]

    sleepy = LineTask(at={i: lambda: time.sleep(0.5) for i in range(10)})
    train(sleepy, config(tmp_path, num_steps=6, keep_last=0))
    assert costs(3)[1] == 12 and costs(6)[1] == 24
    assert costs(3)[0] > 1.1 and costs(3)[0] + 1.1 < costs(6)[0], "half a second a step, kept to 0.36 s"
    train(LineTask(at=sleepy.at), config(tmp_path, num_steps=8, keep_last=0))
    assert costs(8)[1] == 32 and costs(6)[0] + 0.6 < costs(8)[0]  # hours have four decimals: 0.36 s
    state = checkpoint.read_training_state(tmp_path / "step_00000008")
    del state["seconds"]  # of a version that counted none
    torch.save(state, tmp_path / "step_00000008" / "training_state" / "state.pt")
    train(LineTask(), config(tmp_path, keep_last=0))
    assert "training_hours" not in json.loads((tmp_path / "latest" / "config.json").read_text())


def test_zero_means_only_at_the_end(tmp_path):
    task = LineTask()
    train(task, config(tmp_path, eval_every=0, sample_every=0, save_every=0))
    assert task.calls == ["evaluate 10", "sample 10", "save 10"]


def test_a_signal_saves_and_the_same_command_goes_on(tmp_path, capsys):
    """Interrupted off every rhythm; losses, logs and weights are those of the run that was not."""
    before = signal.getsignal(signal.SIGINT)
    whole, task = LineTask(), LineTask(at={6: lambda: signal.raise_signal(signal.SIGINT)})
    train(whole, config(tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        train(task, config(tmp_path / "run"))
    assert task.calls[-1] == "save 7"
    assert "stopped at step 7, saved: run the same command again to go on" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is before
    task = LineTask()
    train(task, config(tmp_path / "run"))
    assert f"going on from {tmp_path}/run/step_00000007" in capsys.readouterr().out
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")
    assert rows(tmp_path / "run", "val") == rows(tmp_path / "whole", "val")
    assert all(
        torch.equal(a, b) for a, b in zip(task.model.parameters(), whole.model.parameters(), strict=True)
    )


def test_a_second_ctrl_c_ends_at_once_but_not_under_a_launcher(tmp_path):
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    task = LineTask(at={1: twice})
    with pytest.raises(KeyboardInterrupt):
        train(task, config(tmp_path / "a"))
    assert task.calls == []
    task = LineTask(at={1: twice})
    with pytest.raises(KeyboardInterrupt):
        fit(task, endless, config(tmp_path / "b"), replace(ALONE, launcher="torchrun"), {})
    assert task.calls == ["save 2"]


def test_the_end_of_the_data_is_a_sentence(tmp_path):
    with pytest.raises(ValueError, match="the data ended after step 6 of 10"):
        train(LineTask(), config(tmp_path), lambda start: endless(start, 6))


def test_the_loader_is_closed(tmp_path):
    closed = []

    def batches(start: int):
        try:
            yield from endless(start)
        finally:
            closed.append(start)

    train(LineTask(), config(tmp_path / "a"), batches)
    with pytest.raises(KeyboardInterrupt):
        train(LineTask(at={0: lambda: signal.raise_signal(signal.SIGTERM)}), config(tmp_path / "b"), batches)
    assert closed == [0, 0]


def test_a_bad_number_names_the_samples_and_keeps_the_checkpoint(tmp_path):
    def batches(start: int):
        for batch in endless(start):
            if batch["key"][0] == "k16":
                batch["x"][1, 1] = float("inf")
            yield batch

    with pytest.raises(
        NonFiniteLoss, match=r"loss \(samples k16, k17, k18, k19 \.\.\.\) is not finite at step 4"
    ):
        train(LineTask(), config(tmp_path), batches)
    assert checkpoint.resolve(tmp_path).name == "step_00000003"
    weights = checkpoint.read_weights(checkpoint.resolve(tmp_path))
    assert all(torch.isfinite(w).all() for w in weights.values())


def test_early_stop_keeps_the_best_and_does_not_go_on(tmp_path, capsys):
    losses = {2: 3.0, 4: 1.0, 6: 2.0, 8: 1.5}
    loop = config(
        tmp_path, num_steps=100, eval_every=2, save_every=2, sample_every=0, keep_last=1, patience=2
    )
    task = LineTask(losses)
    train(task, loop)
    assert task.calls[-3:] == ["evaluate 8", "save 8", "sample 8"]
    assert [d.name for d in checkpoint.step_directories(tmp_path)] == ["step_00000004", "step_00000008"]
    task = LineTask(losses)
    assert train(task, loop) == {} and task.calls == []
    assert capsys.readouterr().out.count("already trained to step 8") == 1


def test_a_finished_run_is_not_repeated_but_can_be_longer(tmp_path):
    train(LineTask(), config(tmp_path))
    task = LineTask()
    assert train(task, config(tmp_path)) == {} and task.calls == []
    train(task, config(tmp_path, num_steps=12))
    assert task.calls == ["evaluate 12", "sample 12", "save 12"]


def test_another_batch_size_goes_on_at_the_same_sample(tmp_path):
    starts = []

    def batches(start: int):
        starts.append(start)
        return endless(start)

    train(LineTask(), config(tmp_path, num_steps=4, global_batch_size=4), batches)
    train(LineTask(), config(tmp_path, num_steps=6, global_batch_size=8), batches)
    train(LineTask(), config(tmp_path, num_steps=8, global_batch_size=4), batches)
    assert starts == [0, 16, 32]


def test_a_run_directory_in_use_is_refused_if_asked(tmp_path):
    train(LineTask(), config(tmp_path))
    with pytest.raises(ValueError, match=r"already holds a run: choose another --loop\.run-dir"):
        train(LineTask(), config(tmp_path, resume=False))


@pytest.mark.parametrize(
    "bad", [{"num_steps": 0}, {"global_batch_size": 0}, {"log_every": 0}, {"save_every": -1}]
)
def test_impossible_options_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        LoopConfig(**bad)
