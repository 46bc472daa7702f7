"""What each choice of the image tokenizer is worth: one row a variant, the same number of steps for all.

    python -m vq.train_perceptual --data ../shared/data/goods
    python -m vq.train_perceptual --data ../shared/data/goods --loop.run-dir runs/perceptual_eval --loop.seed 1
    python -m vq.train_perceptual --data ../shared/data/goods --loop.run-dir runs/perceptual_caption --target caption
    python -m benchmarks.quality.tokenizer_ablation --data ../shared/data/goods --num-steps 600
    python -m benchmarks.quality.tokenizer_ablation --data DATA --rows base no_l2 adversary

Every row trains train_vqgan.py into a run directory of its own, so an interrupted table goes on where it stopped. The
perceptual column is measured with a network of another seed than the one trained with. Writes table.md for docs/log/.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import train_vqgan
from common.config import command, parse_options
from common.files import atomic_path, read_json, write_json
from common.log import say
from vq import evaluate

JUDGE = ["--preset", "vqgan", "--loss.perceptual", "{perceptual}", "--adversary.rollback-share", "0"]
ROWS: dict[str, list[str]] = {
    "base": [],
    "no_l2": ["--model.l2-normalize", "False"],
    "dim_4": ["--model.codebook-dim", "4"],
    "dim_16": ["--model.codebook-dim", "16"],
    "dim_64": ["--model.codebook-dim", "64"],
    "no_kmeans": ["--kmeans-step", "0"],
    "no_revival": ["--revive-every", "0"],
    "ema_codes": ["--model.quantizer", "ema"],
    "gumbel": ["--model.quantizer", "gumbel", "--model.codebook-dim", "64"],
    "fsq": ["--model.quantizer", "fsq"],
    "plain_l1": ["--loss.pixel", "l1"],
    "l2_pixels": ["--loss.pixel", "l2"],
    "no_ema": ["--ema-decay", "0"],
    "muon": ["--optim.name", "muon"],
    "perceptual": ["--loss.perceptual", "{perceptual}"],
    "perceptual_untrained": ["--loss.perceptual", "{untrained}"],
    "perceptual_caption": ["--loss.perceptual", "{caption}"],
    "adversary": JUDGE,
    "adversary_features": [*JUDGE, "--adversary.feature-weight", "1"],
    "foreground_3": ["--loss.foreground-weight", "3"],
}
COLUMNS = ("psnr", "psnr_goods", "ssim", "perceptual", "usage", "perplexity", "color_shift")


@dataclass(frozen=True)
class Options:
    """Train one tokenizer a row and compare."""

    data: str
    """Image shards (train-*.tar, val-*.tar)."""
    rows: tuple[str, ...] = tuple(ROWS)
    """Which variants, by name."""
    num_steps: int = 600
    """Steps of every row."""
    batch_size: int = 16
    """Images a step."""
    image_size: int = 128
    """Side in pixels."""
    codebook_size: int = 1024
    """Codes."""
    lr: float = 6e-4
    """Peak learning rate of every row."""
    perceptual: str = "runs/perceptual"
    """Network to train with."""
    perceptual_caption: str = "runs/perceptual_caption"
    """Network trained on captions instead of labels, for its row."""
    perceptual_eval: str = "runs/perceptual_eval"
    """Network to measure with."""
    perceptual_weight: float = 2.0
    """Weight of the perceptual loss in the rows that have one."""
    out: Path = Path("runs/tokenizer_ablation")
    """Directory of the rows' runs and of table.md."""
    seed: int = 0
    """Seed of every row."""

    def __post_init__(self) -> None:
        unknown = sorted(set(self.rows) - set(ROWS))
        if unknown:
            raise ValueError(f"unknown row {', '.join(unknown)} (known: {', '.join(ROWS)})")


def flags(row: str, options: Options) -> list[str]:
    """Flags of train_vqgan.py for one row."""
    untrained = options.out / "untrained"
    special = [
        f.format(perceptual=options.perceptual, untrained=untrained, caption=options.perceptual_caption)
        for f in ROWS[row]
    ]
    if any("perceptual" in flag for flag in special):
        special += ["--loss.perceptual-weight", str(options.perceptual_weight)]
    if "vqgan" in special:
        start = options.num_steps // 3
        special += [
            "--adversary.start-step",
            str(start),
            "--adversary.warmup-steps",
            str(options.num_steps // 10),
        ]
        special += ["--adversary.ramp-steps", str(options.num_steps // 10)]
    fixed = {
        "--data": options.data,
        "--model.image-size": options.image_size,
        "--model.codebook-size": options.codebook_size,
        "--loop.run-dir": options.out / row,
        "--loop.num-steps": options.num_steps,
        "--loop.global-batch-size": options.batch_size,
        "--loop.eval-every": 0,
        "--loop.sample-every": 0,
        "--loop.save-every": 200,
        "--loop.keep-last": 1,
        "--loop.seed": options.seed,
        "--optim.lr": options.lr,
        "--optim.warmup-steps": max(1, options.num_steps // 12),
    }
    sizes = ["--model.fast.channels", "128", "256", "--model.fast.encoder-blocks", "1", "2"]
    sizes += ["--model.fast.decoder-blocks", "3", "3"]
    return [*(str(part) for pair in fixed.items() for part in pair), *sizes, *special]


def write_untrained(directory: Path) -> None:
    """A perceptual network with random weights: what training it is worth."""
    import torch

    from vq.losses.perceptual import FeatureConfig, PerceptualDistance

    if not (directory / "config.json").is_file():
        directory.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        PerceptualDistance(FeatureConfig(trained_on="un")).write(directory, 0)


def run(row: str, options: Options) -> dict[str, Any]:
    """Train and evaluate one row; a finished one is read."""
    metrics_path = options.out / row / "evaluation" / "figures.json"
    if not metrics_path.is_file():
        train_vqgan.main(flags(row, options))
        where = ["--out", str(metrics_path.parent), "--show", "48"]
        evaluate.main([str(options.out / row), options.data, "--perceptual", options.perceptual_eval, *where])
    return read_json(metrics_path)


def table(metrics: dict[str, dict[str, Any]], options: Options) -> str:
    """Markdown."""
    kind = next(iter(metrics.values()))["perceptual_kind"]
    head = (
        f"{options.num_steps} steps of {options.batch_size}, {options.image_size} px, seed {options.seed}; "
    )
    lines = [
        f"{head}perceptual: {kind}",
        "",
        f"| row | {' | '.join(COLUMNS)} |",
        "| --- |" + " ---: |" * len(COLUMNS),
    ]
    for row, found in metrics.items():
        lines.append(f"| {row} | {' | '.join(f'{found[c]:.4g}' for c in COLUMNS)} |")
    return "\n".join(lines) + "\n"


@command
def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """Train the rows, print and write the table."""
    options = parse_options(Options, argv, description=__doc__)
    write_untrained(options.out / "untrained")
    metrics = {}
    for row in options.rows:
        say(f"== {row}")
        metrics[row] = run(row, options)
        with atomic_path(options.out / "table.md") as temporary:
            temporary.write_text(table(metrics, options), encoding="utf-8")
    write_json(options.out / "table.json", metrics)
    say(table(metrics, options))
    return metrics


if __name__ == "__main__":
    main()
