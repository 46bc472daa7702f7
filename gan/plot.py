"""Plot the log of one or several GAN runs: logits of training and validation images, distance, diversity, augmentation.

    python -m gan.plot runs/goods_128_gan
    python -m gan.plot runs/gan_ada runs/gan_off --out overfitting.png           # augmentation on and off, side by side

A discriminator that overfits takes validation images for generated ones: their curve leaves that of the training images
and joins the generated ones.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from common.config import command, parse_options
from common.files import atomic_path
from common.log import say

LOGITS = {
    "logits_train": "training images",
    "logits_val": "validation images",
    "logits_fake": "generated images",
}
OTHERS = ("frechet_distance", "diversity", "overfit")


@dataclass(frozen=True)
class Options:
    """Plot the logs of GAN runs."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run directories, one column each."""
    out: Path = Path("gan.png")
    """The image to write."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("name at least one run directory: python -m gan.plot runs/gan")
        if self.out.suffix.lower() not in (".png", ".svg", ".pdf"):
            raise ValueError(f"the plot is written as .png, .svg or .pdf, not {self.out.name}")


def read_log(run: Path, source: str) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl of `source` (train or val). Raises FileNotFoundError or ValueError naming the run."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{run} holds no metrics.jsonl: it is no run directory")
    rows = [json.loads(line) for line in path.read_text("utf-8").split("\n") if line.startswith("{")]
    return [row for row in rows if row.get("kind") == source]


def augmentation_of(run: Path) -> str:
    """What options.json says of it."""
    path = run / "options.json"
    values = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    return values.get("d_augment", {}).get("mode", "unknown")


def curve(axis: Any, rows: list[dict[str, Any]], name: str, label: str) -> None:
    found = [(row["step"], row[name]) for row in rows if name in row]
    axis.plot([step for step, _ in found], [value for _, value in found], label=label, linewidth=1.2)


@command
def main(argv: Sequence[str] | None = None) -> Path:
    """Plot; returns the image's path."""
    options = parse_options(Options, argv, description=__doc__)
    from matplotlib.figure import Figure

    evaluations = {run: read_log(run, "val") for run in options.runs}
    for run, rows in evaluations.items():
        if not any("logits_val" in row for row in rows):
            raise ValueError(f"{run} has no evaluation of a GAN in its log yet")
    figure = Figure(figsize=(5 * len(options.runs), 11), layout="constrained")
    grid = figure.subplots(3, len(options.runs), squeeze=False, sharey="row")
    for column, (run, rows) in zip(grid.T, evaluations.items(), strict=True):
        column[0].set_title(f"{run.name} (augmentation {augmentation_of(run)})")
        for name, label in LOGITS.items():
            curve(column[0], rows, name, label)
        column[0].set_ylabel("mean logit")
        curve(column[1], rows, OTHERS[0], "to validation images")
        column[1].set_ylabel("Frechet distance")
        for name in OTHERS[1:]:
            curve(column[2], rows, name, name)
        curve(column[2], read_log(run, "train"), "augment_p", "augmentation p")
        for axis in column:
            axis.set_xlabel("step")
            axis.legend(fontsize=8)
            axis.grid(alpha=0.3)
    with atomic_path(options.out) as temporary:
        figure.savefig(temporary, format=options.out.suffix[1:].lower(), dpi=110)
    say(f"wrote {options.out}")
    return options.out


if __name__ == "__main__":
    main()
