"""The training loop that every stage shares: schedule, logs, evaluation, images, checkpoints, resume.

A task keeps the science: `train_step` shows forward, backward and optimizer order. The loop is a pure function of
(options, step): the data order comes from (seed, sample counter) and the generators are seeded anew from
(seed, step), so a run killed anywhere and started again by the same command repeats the very same steps.
"""

import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image

from common import checkpoint
from common.distributed import World
from common.files import read_json, write_json
from common.lock import alone_in
from common.log import MetricLog, Window, clock, note_keys, say, short
from common.machine.busy_machine import BusyMachine
from common.run_dir import claim, point_best


@dataclass(frozen=True)
class LoopConfig:
    """Where a run lives, how long it is, how often it looks up."""

    run_dir: Path = Path("runs/run")
    """Directory of checkpoints, metrics.jsonl, TensorBoard files and sample grids; all nodes must share it."""
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
    """Checkpoints kept, and the one of the best evaluation; 0 keeps all."""
    patience: int = 0
    """Stop after this many evaluations without a better validation loss; 0 never stops early."""
    seed: int = 0
    """Seed of weights, data order, augmentation and dropout."""
    tensorboard: bool = True
    """Write TensorBoard files."""
    wandb_project: str = ""
    """Also log to this Weights & Biases project; empty: no."""
    log_keys: bool = False
    """Debugging: every process notes the keys of each step's samples in run_dir/keys/RANK_of_PROCESSES.jsonl."""
    resume: bool = True
    """Go on from the newest checkpoint in run_dir; False refuses a run_dir that has one."""

    def __post_init__(self) -> None:
        for name in ("num_steps", "global_batch_size", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed must lie in [0, {2**31}), not {self.seed}")
        for name in ("eval_every", "sample_every", "save_every", "keep_last", "patience"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name)}")


class Task(Protocol):
    """What a script hands to `fit`. All processes call every method but `save`, in the same order."""

    validation_metric: str  # the key of evaluate() that early stopping watches; lower is better

    def train_step(self, batch: dict[str, Any], step: int) -> dict[str, float]:
        """One optimizer step; means over this process's samples. Processes agree on the keys."""

    def evaluate(self, step: int) -> dict[str, float]:
        """`fit` averages the values over processes; unequal shares go through `world.mean(values, weight)` here."""

    def sample(self, step: int) -> dict[str, Image.Image]:
        """Images by name; those of the main process are kept."""

    def state(self) -> dict[str, Any]:
        """All that going on needs, as tensors, numbers, strings, lists and dictionaries.

        Every process calls it, since ZeRO gathers there; only what the main process returns is used.
        """

    def save(self, directory: Path, step: int, state: dict[str, Any]) -> None:
        """Write config.json, model.safetensors and companions into `directory`; the main process alone calls it.

        `state` is what `state()` returned a moment ago: weights come from there, never from a collective here.
        """

    def load_state(self, state: dict[str, Any]) -> None:
        """What `state()` gave, on any number of processes under any engine."""


class NonFiniteLoss(ValueError):
    """Training produced NaN or infinity; the last good checkpoint stands."""


class _StopFlag:
    """Ctrl-C and SIGTERM let the current step end; a second Ctrl-C ends at once.

    Under a launcher one Ctrl-C arrives several times (from the terminal, from the launcher, as SIGINT and SIGTERM), and
    the launcher itself kills what does not end within its grace time: there the first signal is the only one.
    """

    def __init__(self, launched: bool) -> None:
        self.raised, self.launched = False, launched
        self.previous = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self.previous[number] = signal.signal(number, self._handle)
            except ValueError:  # not the main thread: the caller keeps its handlers
                return

    def _handle(self, number: int, frame: Any) -> None:
        if self.raised and not self.launched and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.raised = True

    def restore(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler or signal.SIG_DFL)


def fit(
    task: Task,
    batches: Callable[[int], Iterable[dict[str, Any]]],
    config: LoopConfig,
    world: World,
    options: dict[str, Any],
) -> dict[str, float]:
    """Train `task` to `config.num_steps`; `batches(samples_seen)` yields this process's share of each global batch.

    `options`: JSON-ready options of the whole run, kept in train_config.json. Returns the last evaluation.
    Raises NonFiniteLoss naming the batch, KeyboardInterrupt after a checkpoint when a signal asked to stop.
    """
    claim(config.run_dir, world.is_main)
    with alone_in(config.run_dir, world):
        run = _Run(task, config, world, options)
        run.resume()
        if run.step >= config.num_steps or run.out_of_patience():
            run.say(f"{config.run_dir} is already trained to step {run.step}")
            return {}
        run.stop = _StopFlag(launched=world.launcher != "none")
        try:
            if world.is_main:
                write_json(config.run_dir / "options.json", options)
                run.log = MetricLog(
                    config.run_dir, run.step, config.tensorboard, config.wandb_project, options
                )
            return run.train(batches)
        finally:
            run.close()


class _Run:
    """The moving parts of one `fit`."""

    def __init__(self, task: Task, config: LoopConfig, world: World, options: dict[str, Any]) -> None:
        self.task, self.config, self.world, self.options = task, config, world, options
        self.batches: Iterator[dict[str, Any]] = iter(())
        self.stop: _StopFlag | None = None
        self.machine = BusyMachine(alone=world.size == 1)
        self.log: MetricLog | None = None
        self.step = self.samples = 0
        # of all steps, over all starts; None where the run was begun by a version that did not count them
        self.seconds: float | None = 0.0
        self.best: dict[str, float] = {}
        self.last_eval: dict[str, float] = {}
        self.window = Window()
        self.saved_step = self.evaluated_step = self.sampled_step = -1
        self._restart_clock()

    def say(self, text: str) -> None:
        if self.world.is_main:
            say(text)

    def _restart_clock(self) -> None:
        self.window_start, self.steps_timed = time.perf_counter(), 0
        self.data_seconds = self.step_seconds = 0.0

    def close(self) -> None:
        """Also ends the loader's processes now: they ignore the signals that would end them later."""
        if hasattr(self.batches, "close"):
            self.batches.close()
        self.stop.restore()
        self.machine.restore()
        if self.log:
            self.log.close()

    def resume(self) -> None:
        """Take up the newest checkpoint, if there is one."""
        if self.world.is_main:
            checkpoint.clean(self.config.run_dir)
        self.world.barrier()
        found = checkpoint.step_directories(self.config.run_dir)
        newest = int(found[-1].name.removeprefix("step_")) if found else 0
        if self.world.mean({"newest": float(newest)})["newest"] != newest:
            raise ValueError(
                f"the processes do not see the same checkpoints in {self.config.run_dir}: put --loop.run-dir on a file "
                "system that all nodes share"
            )
        if not found:
            return
        if not self.config.resume:
            raise ValueError(
                f"{self.config.run_dir} already holds a run: choose another --loop.run-dir, or resume it"
            )
        state = checkpoint.read_training_state(found[-1])
        if state.get("seed", self.config.seed) != self.config.seed:
            raise ValueError(
                f"{self.config.run_dir} was started with seed {state['seed']}, not {self.config.seed}: its samples "
                "would come in another order; choose another --loop.run-dir"
            )
        self.step, self.samples, self.best = int(state["step"]), int(state["samples"]), dict(state["best"])
        self.seconds = state.get("seconds")
        self.saved_step = self.step
        if self.step >= self.config.num_steps or self.out_of_patience():
            return
        self.window = Window(state["window"])
        self.task.load_state(state["task"])
        self.say(f"going on from {found[-1]}")

    def train(self, batches: Callable[[int], Iterable[dict[str, Any]]]) -> dict[str, float]:
        config, start_step = self.config, self.step
        self.batches = iter(batches(self.samples))
        self._restart_clock()
        while self.step < config.num_steps and not self.out_of_patience():
            fetched = time.perf_counter()
            batch = next(self.batches, None)
            if batch is None:
                raise ValueError(
                    f"the data ended after step {self.step} of {config.num_steps}: batches must not end"
                )
            started = time.perf_counter()
            if config.log_keys:
                note_keys(config.run_dir, self.step, batch["key"], self.world)
            if changed := self.machine.follow():
                self.say(changed)
            torch.manual_seed((config.seed * 1_000_003 + self.step) * 131 + self.world.rank)
            metrics = self.task.train_step(batch, self.step)
            stop = self._agree(metrics, batch)
            self.data_seconds += started - fetched
            self.step_seconds += time.perf_counter() - started
            if self.seconds is not None:
                self.seconds += time.perf_counter() - fetched
            self.window.add(metrics)
            self.step += 1
            self.steps_timed += 1
            self.samples += config.global_batch_size
            self._periodic(first=self.step == start_step + 1)
            if stop and self.step < config.num_steps:
                self._save()
                self.say(f"stopped at step {self.step}, saved: run the same command again to go on")
                raise KeyboardInterrupt
        if self.step < config.num_steps:
            self.say(
                f"no better {self.task.validation_metric} in {config.patience} evaluations: stopping early"
            )
        self._evaluate()
        self._sample()
        self._save()
        return self.last_eval

    def _periodic(self, first: bool) -> None:
        config, step = self.config, self.step
        if step % config.log_every == 0 or step in (1, config.num_steps):
            self._log()
        elif first:
            self._print_line(self.world.mean(self.window.means()))
        if step == config.num_steps:
            return
        if config.eval_every and step % config.eval_every == 0:
            self._evaluate()
        if config.sample_every and step % config.sample_every == 0:
            self._sample()
        if config.save_every and step % config.save_every == 0:
            self._save()

    def out_of_patience(self) -> bool:
        return 0 < self.config.patience <= self.best.get("misses", 0)

    def _agree(self, metrics: dict[str, float], batch: dict[str, Any]) -> bool:
        """Whether any process was asked to stop; all raise when one has met a number that is not finite."""
        bad = sorted(name for name, value in metrics.items() if not math.isfinite(value))
        anywhere = self.world.any({"stop": self.stop.raised, "bad": bool(bad)})
        if anywhere["bad"]:
            keys = ", ".join(map(str, batch.get("key", [])[:8]))
            what = f"{', '.join(bad)} (samples {keys} ...)" if bad else "a value on another process"
            found = checkpoint.step_directories(self.config.run_dir)
            stands = f"the checkpoint {found[-1]} is whole" if found else "nothing was saved yet"
            raise NonFiniteLoss(
                f"{what} is not finite at step {self.step}: {stands}; lower the learning rate or look at these samples"
            )
        return anywhere["stop"]

    def _log(self) -> None:
        metrics = self.world.mean(self.window.means())
        rate = self._print_line(metrics)
        if self.log:
            share = self.data_seconds / max(1e-9, self.data_seconds + self.step_seconds)
            eta = (self.config.num_steps - self.step) * self.config.global_batch_size / max(1e-9, rate)
            speed = {"samples_per_second": rate, "data_share": share, "eta_seconds": eta}
            self.log.write(self.step, "train", metrics | speed)
        self.window.clear()
        self._restart_clock()

    def _print_line(self, metrics: dict[str, float]) -> float:
        """Returns samples a second since the last line or the start."""
        elapsed = time.perf_counter() - self.window_start
        rate = self.steps_timed * self.config.global_batch_size / elapsed
        eta = (self.config.num_steps - self.step) * elapsed / self.steps_timed
        share = self.data_seconds / max(1e-9, self.data_seconds + self.step_seconds)
        shown = " | ".join(f"{n} {short(v)}" for n, v in metrics.items())
        line = f"step {self.step}/{self.config.num_steps} | {shown} | data {share:.1%} | {rate:.1f} samples/s"
        self.say(f"{line} | eta {clock(eta)}")
        return rate

    def _evaluate(self) -> None:
        if self.evaluated_step == self.step:
            return
        started = time.perf_counter()
        self.last_eval = self.world.mean(self.task.evaluate(self.step))
        value = self.last_eval.get(self.task.validation_metric)
        if value is not None and value < self.best.get("value", math.inf):
            self.best = {"value": value, "step": self.step, "misses": 0}
        elif value is not None:
            self.best = self.best | {"misses": self.best.get("misses", 0) + 1}
        if self.log and self.last_eval:
            self.log.write(self.step, "val", self.last_eval)
        if self.last_eval:
            shown = " | ".join(f"{n} {short(v)}" for n, v in self.last_eval.items())
            self.say(f"step {self.step} | validation | {shown}")
        self.evaluated_step = self.step
        self.window_start += time.perf_counter() - started

    def _sample(self) -> None:
        if self.sampled_step == self.step:
            return
        started = time.perf_counter()
        images = self.task.sample(self.step)
        if self.log:
            for name, image in images.items():
                self.say(f"step {self.step} | wrote {self.log.image(self.step, name, image)}")
        self.sampled_step = self.step
        self.world.barrier()
        self.window_start += time.perf_counter() - started

    def _save(self) -> None:
        if self.saved_step == self.step:
            return
        started = time.perf_counter()
        window = self.window.mean_over(self.world)
        state = {"step": self.step, "samples": self.samples, "best": self.best, "window": window}
        state |= {"seed": self.config.seed, "seconds": self.seconds}
        state["task"] = self.task.state()
        if self.world.is_main:
            run_dir = self.config.run_dir
            checkpoint.ensure_space(run_dir, state)
            with checkpoint.new_step_directory(run_dir, self.step) as directory:
                self.task.save(directory, self.step, state["task"])
                self._note_costs(directory)
                write_json(directory / "train_config.json", self.options)
                checkpoint.write_training_state(directory, state)
            best = checkpoint.step_directory(run_dir, int(self.best.get("step", 0)))
            if self.best.get("step") and (best / "config.json").is_file():
                point_best(run_dir, best.name)
            checkpoint.prune(run_dir, self.config.keep_last, keep=(best,))
        self.saved_step = self.step
        self.world.barrier()
        self.window_start += time.perf_counter() - started

    def _note_costs(self, directory: Path) -> None:
        """Hours of all steps, evaluations and checkpoints left out, and images seen into the checkpoint's config.json,
        where the task has not put its own there."""
        path = directory / "config.json"
        if not path.is_file():
            return
        costs = {"images_seen": self.samples}
        if self.seconds is not None:
            costs["training_hours"] = round(self.seconds / 3600, 4)
        write_json(path, costs | read_json(path))
