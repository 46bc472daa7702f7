"""A run killed anywhere and started again is the run that was never killed."""

import json
import random
import signal
import time
from pathlib import Path

import pytest
from processes import Run, difference, run, start, trace, training_state, weights
from test_launchers import wait_for_step

DROPOUT = ("--dropout", "0.1")


def kill_often(rng: random.Random, directory: Path, data: Path, *flags: str, size: int, kills: int) -> None:
    """Start, SIGKILL after a random step or amid one, start again; the last start runs to the end."""
    launcher = "torchrun" if size > 1 else "none"
    step = 0
    for _ in range(kills):
        step = rng.randint(max(1, step - 3), min(11, step + 5))
        started = start(directory, data, *flags, "--pause", "0.05", size=size, launcher=launcher)
        wait_for_step(directory, step)
        time.sleep(rng.uniform(0, 0.1))
        started.signal(signal.SIGKILL)
        assert set(started.wait()) <= {-signal.SIGKILL, 0}
    run(directory, data, *flags, size=size, launcher=launcher)


@pytest.mark.parametrize(("size", "kills"), [(1, 5), pytest.param(2, 3, marks=pytest.mark.slow)])
def test_sigkill_at_random_points_changes_no_bit(size, kills, tmp_path, tokens):
    launcher = "torchrun" if size > 1 else "none"
    whole = run(tmp_path / "whole", tokens, *DROPOUT, size=size, launcher=launcher)
    rng = random.Random(time.time_ns())
    kill_often(rng, tmp_path / "killed", tokens, *DROPOUT, size=size, kills=kills)
    assert difference(weights(tmp_path / "killed"), weights(whole)) == 0.0
    assert difference(training_state(tmp_path / "killed"), training_state(whole)) == 0.0
    assert trace(tmp_path / "killed", "loss") == trace(whole, "loss")


def interrupt(started: Run, step: int) -> None:
    wait_for_step(started.directory, step)
    started.signal(signal.SIGINT)


@pytest.mark.parametrize("size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_ctrl_c_saves_and_says_how_to_go_on(size, tmp_path, tokens):
    launcher = "torchrun" if size > 1 else "none"
    whole = run(tmp_path / "whole", tokens, *DROPOUT, size=size, launcher=launcher)
    flags = (*DROPOUT, "--loop.save-every", "0", "--num-workers", "1")
    started = start(tmp_path / "run", tokens, *flags, "--pause", "0.1", size=size, launcher=launcher)
    interrupt(started, 2)
    assert started.wait() == [130] * size, started.output()
    assert "saved: run the same command again to go on" in started.output()
    assert training_state(tmp_path / "run")["step"] < 12
    run(tmp_path / "run", tokens, *flags, size=size, launcher=launcher)
    assert difference(weights(tmp_path / "run"), weights(whole)) == 0.0


def seen(directory: Path, start_step: int, stop_step: int) -> list[str]:
    """Keys of the steps start_step <= s < stop_step, over all ranks; of a step that was repeated, the last time."""
    by_rank_and_step = {}
    for path in sorted((directory / "keys").glob("*.jsonl"), key=lambda p: p.stat().st_mtime):
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        size = int(path.stem.split("_of_")[1])
        for row in rows:
            if start_step <= row["step"] < stop_step:
                by_rank_and_step.setdefault(row["step"], {}).setdefault(size, {})[path.stem] = row["keys"]
    last = [max(sizes.items(), key=lambda item: -item[0])[1] for _, sizes in sorted(by_rank_and_step.items())]
    return [key for ranks in last for rank in sorted(ranks) for key in ranks[rank]]


def test_killed_in_mid_epoch_on_two_processes_goes_on_with_one(tmp_path, tokens, plain_run):
    """An epoch is six steps; saved after step 4, killed after step 5: each sample of both epochs is seen once."""
    started = start(tmp_path / "run", tokens, "--pause", "0.2", size=2, launcher="torchrun")
    wait_for_step(tmp_path / "run", 5)
    started.signal(signal.SIGKILL)
    started.wait()
    assert training_state(tmp_path / "run")["step"] == 4
    run(tmp_path / "run", tokens)
    every = sorted(f"s{i:03d}" for i in range(48))
    assert sorted(seen(tmp_path / "run", 0, 6)) == every
    assert sorted(seen(tmp_path / "run", 6, 12)) == every
    assert seen(tmp_path / "run", 0, 12) == seen(plain_run, 0, 12), "also in the same order"
    assert difference(trace(tmp_path / "run", "loss"), trace(plain_run, "loss")) < 2e-5
    assert difference(weights(tmp_path / "run"), weights(plain_run)) < 2e-5
