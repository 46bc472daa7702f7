"""What a run says: one line an event on rank 0, metrics.jsonl always, TensorBoard, W&B if asked."""

import json
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from common.console.progress import is_quiet
from common.files import atomic_path, naming_a_full_disk, split_lines

if TYPE_CHECKING:
    from common.distributed import World


def say(text: str) -> None:
    """An event of the run; silent with --quiet."""
    if not is_quiet():
        print(text, flush=True)


def clock(seconds: float) -> str:
    """1:02:03"""
    seconds = int(max(0, seconds))
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def short(value: float) -> str:
    """Four digits: 3.142, 2.90e-04"""
    return f"{value:.2e}" if value and abs(value) < 1e-2 else f"{value:.4g}"


class Window:
    """Means of the training metrics since the last line; a key may be absent from some steps.

    It is part of a checkpoint, so that a resumed run logs the very lines of the uninterrupted one.
    """

    def __init__(self, sums: dict[str, tuple[float, int]] | None = None) -> None:
        self.sums = {name: (float(total), int(count)) for name, (total, count) in (sums or {}).items()}

    def add(self, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            total, count = self.sums.get(name, (0.0, 0))
            self.sums[name] = (total + float(value), count + 1)

    def means(self) -> dict[str, float]:
        return {name: total / count for name, (total, count) in self.sums.items()}

    def mean_over(self, world: "World") -> dict[str, tuple[float, int]]:
        """The sums averaged over processes: with them any number of processes goes on."""
        totals = world.mean({name: total for name, (total, _) in self.sums.items()})
        return {name: (totals[name], count) for name, (_, count) in self.sums.items()}

    def clear(self) -> None:
        self.sums = {}


class MetricLog:
    """Appends one JSON object a call to `run_dir/metrics.jsonl` and mirrors scalars to TensorBoard and W&B."""

    def __init__(
        self, run_dir: Path, start_step: int, tensorboard: bool, wandb_project: str, options: dict[str, Any]
    ) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self.run_dir, self.path = run_dir, run_dir / "metrics.jsonl"
        drop_from_step(self.path, start_step)
        self.file = self.path.open("a", encoding="utf-8")
        self.writer, self.wandb = None, None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start_step)
        if wandb_project:
            self.wandb = _start_wandb(run_dir, wandb_project, options)

    def write(self, step: int, kind: str, values: dict[str, float]) -> None:
        """`kind`: train, val or event."""
        row = {"step": step, "kind": kind, **values}
        with naming_a_full_disk(self.path):
            self.file.write(json.dumps(row, ensure_ascii=False) + "\n")
            self.file.flush()
        numbers = {f"{kind}/{k}": v for k, v in values.items() if isinstance(v, (int, float))}
        if self.writer:
            with naming_a_full_disk(self.run_dir / "tensorboard"):
                for name, value in numbers.items():
                    self.writer.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log(numbers, step=step)

    def image(self, step: int, name: str, image: Image.Image) -> Path:
        path = self.run_dir / "samples" / f"{name}_{step:08d}.png"
        with atomic_path(path) as temporary:
            image.save(temporary, format="PNG")
        if self.writer:
            self.writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")
        if self.wandb:
            from wandb import Image as Shown

            self.wandb.log({name: Shown(image)}, step=step)
        return path

    def close(self) -> None:
        self.file.close()
        if self.writer:
            self.writer.close()
        if self.wandb:
            self.wandb.finish()


def note_keys(run_dir: Path, step: int, keys: Sequence[str], world: "World") -> None:
    """Which samples this process trained on at `step`; a step that is repeated after a kill stands twice."""
    path = run_dir / "keys" / f"{world.rank}_of_{world.size}.jsonl"
    path.parent.mkdir(exist_ok=True)
    with naming_a_full_disk(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, "keys": list(keys)}, ensure_ascii=False) + "\n")


def drop_from_step(path: Path, start_step: int) -> None:
    """A resumed run repeats the steps after its checkpoint: forget what was logged of them, and a half-written line."""
    if not path.is_file():
        return
    kept = []
    for line in split_lines(path.read_bytes().decode("utf-8", errors="replace")):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and row.get("step", start_step) <= start_step:
            kept.append(line)
    with atomic_path(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


def logged_hours(path: Path, step: int, batch_size: int) -> float | None:
    """Hours of training steps up to `step` by the samples a second that a metrics.jsonl logged; None where it does not
    reach that far, or logged none."""
    if not path.is_file():
        return None
    seconds, reached = 0.0, 0
    for line in split_lines(path.read_text("utf-8", errors="replace")):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if not isinstance(row, dict) or row.get("kind") != "train" or not reached < row["step"] <= step:
            continue
        if not row.get("samples_per_second"):
            return None
        seconds += (row["step"] - reached) * batch_size / row["samples_per_second"]
        reached = row["step"]
    return round(seconds / 3600, 4) if reached and step - reached <= 0.05 * step else None


def _start_wandb(run_dir: Path, project: str, options: dict[str, Any]) -> Any:
    """A W&B run with one id for the life of the run directory, so that a resumed run goes on in the same chart.

    Raises ValueError where the package, which nothing else needs, is missing, and when W&B refuses.
    """
    try:
        import wandb
    except ModuleNotFoundError as error:
        raise ValueError("--loop.wandb-project needs the package wandb: pip install wandb") from error
    path = run_dir / "wandb_id"
    if not path.is_file():
        path.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
    identity = path.read_text(encoding="utf-8")
    try:
        return wandb.init(
            project=project, name=run_dir.name, dir=str(run_dir), id=identity, config=options, resume="allow"
        )
    except wandb.Error as error:
        raise ValueError(
            f"Weights & Biases refused: {error} Or keep its files here with WANDB_MODE=offline"
        ) from error
