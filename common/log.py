"""What a run says: one line an event on rank 0, metrics.jsonl always, TensorBoard, W&B if asked."""

import json
from pathlib import Path
from typing import Any

from PIL import Image


def say(text: str) -> None:
    print(text, flush=True)


def clock(seconds: float) -> str:
    """1:02:03"""
    seconds = int(max(0, seconds))
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


class MetricLog:
    """Appends one JSON object a call to `run_dir/metrics.jsonl` and mirrors scalars to TensorBoard and W&B."""

    def __init__(
        self, run_dir: Path, start_step: int, tensorboard: bool, wandb_project: str, options: dict[str, Any]
    ) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self.path = run_dir / "metrics.jsonl"
        drop_from_step(self.path, start_step)
        self.file = self.path.open("a", encoding="utf-8")
        self.writer, self.wandb = None, None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start_step)
        if wandb_project:
            import wandb

            self.wandb = wandb.init(project=wandb_project, name=run_dir.name, config=options, resume="allow")

    def write(self, step: int, kind: str, values: dict[str, float]) -> None:
        """`kind`: train, val or event."""
        row = {"step": step, "kind": kind, **{k: v for k, v in values.items()}}
        self.file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.file.flush()
        numbers = {f"{kind}/{k}": v for k, v in values.items() if isinstance(v, (int, float))}
        if self.writer:
            for name, value in numbers.items():
                self.writer.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log(numbers, step=step)

    def picture(self, step: int, name: str, image: Image.Image, run_dir: Path) -> Path:
        path = run_dir / "samples" / f"{name}_{step:08d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
        return path

    def close(self) -> None:
        self.file.close()
        if self.writer:
            self.writer.close()
        if self.wandb:
            self.wandb.finish()


def drop_from_step(path: Path, start_step: int) -> None:
    """A resumed run repeats the steps after its checkpoint: forget what was logged of them, and a half-written line."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if row["step"] <= start_step:
            kept.append(line)
    path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
