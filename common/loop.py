"""The training loop that every stage shares: schedule, logs, evaluation, pictures, checkpoints, resume.

A task keeps the science: `train_step` shows forward, backward and optimizer order. The loop is a pure function of
(options, step): the data order comes from (seed, sample counter) and the generators are seeded anew from
(seed, step), so a run killed anywhere and started again by the same command repeats the very same steps.
"""

import math
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image

from common import checkpoint
from common.distributed import World
from common.files import ensure_writable_directory, write_json
from common.log import MetricLog, clock, say


@dataclass(frozen=True)
class LoopConfig:
    """Where a run lives, how long it is, how often it looks up."""

    run_dir: Path = Path("runs/run")
    """Directory of checkpoints, metrics.jsonl, TensorBoard files and sample grids."""
    num_steps: int = 1000
    """Optimizer steps of the whole run: the horizon of the schedule."""
    global_batch_size: int = 32
    """Samples a step over all processes and accumulation."""
    micro_batch_size: int | None = None
    """Samples of one forward pass; None takes the whole share of a process. Must divide it exactly."""
    log_every: int = 20
    """Steps between lines in the console and in metrics.jsonl."""
    eval_every: int = 500
    """Steps between evaluations on the validation shards; 0: only at the end."""
    sample_every: int = 500
    """Steps between sample grids; 0: only at the end."""
    save_every: int = 500
    """Steps between checkpoints; 0: only at the end."""
    keep_last: int = 2
    """Checkpoints kept; 0 keeps all."""
    patience: int = 0
    """Stop after this many evaluations without a better validation loss; 0 never stops early."""
    seed: int = 0
    """Seed of weights, data order, augmentation and dropout."""
    tensorboard: bool = True
    """Write TensorBoard files."""
    wandb_project: str = ""
    """Also log to this Weights & Biases project; empty: no."""
    resume: bool = True
    """Go on from the newest checkpoint in run_dir; False refuses a run_dir that has one."""

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, not {self.num_steps}")
        for name in ("log_every", "eval_every", "sample_every", "save_every", "keep_last", "patience"):
            if getattr(self, name) < 0 or (name == "log_every" and self.log_every == 0):
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")


class Task(Protocol):
    """What a script hands to `fit`."""

    validation_metric: str  # the key of evaluate() that early stopping watches; lower is better

    def train_step(self, batch: dict[str, Any], step: int) -> dict[str, float]: ...

    def evaluate(self, step: int) -> dict[str, float]: ...

    def sample(self, step: int) -> dict[str, Image.Image]: ...

    def save(self, directory: Path, step: int) -> None: ...

    def state(self) -> dict[str, Any]: ...

    def load_state(self, state: dict[str, Any]) -> None: ...


class NonFiniteLoss(ValueError):
    """Training produced NaN or infinity; the last good checkpoint stands."""


class _StopFlag:
    """Ctrl-C and SIGTERM let the current step end; a second Ctrl-C ends at once."""

    def __init__(self) -> None:
        self.raised = False
        self.previous = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self.previous[number] = signal.signal(number, self._handle)
            except ValueError:  # not the main thread: the caller keeps its handlers
                return

    def _handle(self, number: int, frame: Any) -> None:
        if self.raised:
            raise KeyboardInterrupt
        self.raised = True

    def restore(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)


def fit(
    task: Task,
    batches: Callable[[int], Iterable[dict[str, Any]]],
    config: LoopConfig,
    world: World,
    options: dict[str, Any],
) -> dict[str, float]:
    """Train `task` to `config.num_steps`; `batches(samples_seen)` yields this process's share of each global batch.

    `options`: JSON-ready options of the whole run, kept in train_config.json. Returns the last evaluation.
    Raises NonFiniteLoss naming the batch.
    """
    ensure_writable_directory(config.run_dir)
    start_step, best = _resume(task, config, world)
    if start_step >= config.num_steps:
        say(f"{config.run_dir} is already trained to step {start_step}")
    log = None
    if world.is_main:
        write_json(config.run_dir / "options.json", options)
        log = MetricLog(config.run_dir, start_step, config.tensorboard, config.wandb_project, options)
    run = _Run(task, config, world, options, log, best)
    try:
        return run.train(batches, start_step)
    finally:
        run.stop.restore()
        if log:
            log.close()


def _resume(task: Task, config: LoopConfig, world: World) -> tuple[int, dict[str, float]]:
    found = checkpoint.step_directories(config.run_dir)
    if not found:
        return 0, {}
    if not config.resume:
        raise ValueError(f"{config.run_dir} already holds a run: choose another --loop.run-dir, or resume it")
    state = checkpoint.read_training_state(found[-1])
    task.load_state(state["task"])
    if world.is_main and int(state["step"]) < config.num_steps:
        say(f"going on from {found[-1]}")
    return int(state["step"]), dict(state["best"])


class _Run:
    """The moving parts of one `fit`."""

    def __init__(self, task, config: LoopConfig, world: World, options, log: MetricLog | None, best) -> None:
        self.task, self.config, self.world, self.options, self.log = task, config, world, options, log
        self.best: dict[str, float] = best
        self.last_eval: dict[str, float] = {}
        self.saved_step = -1
        self.stop = _StopFlag()
        self.window: list[dict[str, float]] = []
        self.seconds = {"data": 0.0, "step": 0.0}
        self.window_start = time.perf_counter()

    def train(self, batches: Callable[[int], Iterable[dict[str, Any]]], start_step: int) -> dict[str, float]:
        config = self.config
        step = start_step
        iterator = iter(batches(start_step * config.global_batch_size)) if step < config.num_steps else iter(())
        self.window_start = time.perf_counter()
        while step < config.num_steps:
            fetched = time.perf_counter()
            batch = next(iterator)
            started = time.perf_counter()
            torch.manual_seed((config.seed * 1_000_003 + step) * 131 + self.world.rank)
            metrics = self.task.train_step(batch, step)
            self._check_finite(metrics, batch, step)
            self.seconds["data"] += started - fetched
            self.seconds["step"] += time.perf_counter() - started
            self.window.append(metrics)
            step += 1
            self._periodic(step, start_step)
            if self._stopped() and step < config.num_steps:
                self._save(step)
                if self.world.is_main:
                    say(f"stopped at step {step}: run the same command again to go on")
                raise KeyboardInterrupt
            if config.patience and self.best.get("misses", 0) >= config.patience:
                if self.world.is_main:
                    say(f"no better {self.task.validation_metric} in {config.patience} evaluations: stopping early")
                break
        if start_step < config.num_steps:
            self._finish(step)
        return self.last_eval

    def _periodic(self, step: int, start_step: int) -> None:
        config = self.config
        if step % config.log_every == 0 or step == start_step + 1:
            self._log(step, start_step)
        if step == config.num_steps:
            return
        if config.eval_every and step % config.eval_every == 0:
            self._evaluate(step)
        if config.sample_every and step % config.sample_every == 0:
            self._sample(step)
        if config.save_every and step % config.save_every == 0:
            self._save(step)

    def _finish(self, step: int) -> None:
        self._evaluate(step)
        self._sample(step)
        if self.saved_step != step:
            self._save(step)

    def _stopped(self) -> bool:
        """Every process must take the same turn, so the flag is shared once a step."""
        if self.world.size == 1:
            return self.stop.raised
        flag = torch.tensor([float(self.stop.raised)], device=self.world._reduce_device)
        return bool(self.world.sum_(flag).item() > 0)

    def _check_finite(self, metrics: dict[str, float], batch: dict[str, Any], step: int) -> None:
        bad = [name for name, value in metrics.items() if not math.isfinite(value)]
        if bad:
            keys = ", ".join(map(str, batch.get("key", [])[:8]))
            raise NonFiniteLoss(
                f"{', '.join(bad)} is not finite at step {step} (samples {keys} ...): the last checkpoint in "
                f"{self.config.run_dir} is whole; lower the learning rate or look at these samples"
            )

    def _log(self, step: int, start_step: int) -> None:
        metrics = {n: sum(m[n] for m in self.window) / len(self.window) for n in self.window[-1]}
        metrics = self.world.mean(metrics)
        elapsed = time.perf_counter() - self.window_start
        rate = len(self.window) * self.config.global_batch_size / elapsed
        total = sum(self.seconds.values()) or 1.0
        metrics |= {"samples_per_second": rate, "data_share": self.seconds["data"] / total}
        eta = (self.config.num_steps - step) * elapsed / len(self.window)
        if self.world.is_main and self.log:
            self.log.write(step, "train", metrics)
            shown = " | ".join(f"{n} {_short(v)}" for n, v in metrics.items() if n != "samples_per_second")
            say(f"step {step}/{self.config.num_steps} | {shown} | {rate:.1f} samples/s | eta {clock(eta)}")
        self.window.clear()
        self.seconds = {"data": 0.0, "step": 0.0}
        self.window_start = time.perf_counter()

    def _evaluate(self, step: int) -> None:
        started = time.perf_counter()
        self.last_eval = self.world.mean(self.task.evaluate(step))
        value = self.last_eval.get(self.task.validation_metric)
        if value is not None:
            if value < self.best.get("value", math.inf):
                self.best = {"value": value, "step": step, "misses": 0}
            else:
                self.best["misses"] = self.best.get("misses", 0) + 1
        if self.world.is_main and self.log and self.last_eval:
            self.log.write(step, "val", self.last_eval)
            say(f"step {step} | validation | " + " | ".join(f"{n} {_short(v)}" for n, v in self.last_eval.items()))
        self.window_start += time.perf_counter() - started

    def _sample(self, step: int) -> None:
        started = time.perf_counter()
        pictures = self.task.sample(step)
        if self.world.is_main and self.log:
            for name, image in pictures.items():
                say(f"step {step} | wrote {self.log.picture(step, name, image, self.config.run_dir)}")
        self.world.barrier()
        self.window_start += time.perf_counter() - started

    def _save(self, step: int) -> None:
        started = time.perf_counter()
        state = {"step": step, "best": self.best, "task": self.task.state()}
        if self.world.is_main:
            with checkpoint.new_step_directory(self.config.run_dir, step) as directory:
                self.task.save(directory, step)
                write_json(directory / "train_config.json", self.options)
                checkpoint.write_training_state(directory, state)
            checkpoint.prune(self.config.run_dir, self.config.keep_last)
        self.saved_step = step
        self.world.barrier()
        self.window_start += time.perf_counter() - started


def _short(value: float) -> str:
    return f"{value:.2e}" if value and abs(value) < 1e-2 else f"{value:.4g}"
