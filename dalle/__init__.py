"""The generator: an autoregressive transformer over [text | image] and all that turns a sentence into images."""

from pathlib import Path

import common  # noqa: F401 (before torch: Ctrl-C meanwhile leaves no traceback)

DEFAULT_GENERATOR = "pretrained/goods-128/generator"


def default_checkpoint(runs: Path = Path("runs"), pretrained: Path | None = None) -> Path:
    """The generator trained last, else the one that ships. Raises FileNotFoundError naming the command to run."""
    from common.files import shipped
    from common.run_dir import newest_run

    found = newest_run("generator", runs)
    if found:
        return found
    pretrained = pretrained or shipped(DEFAULT_GENERATOR)
    if (pretrained / "config.json").is_file():
        return pretrained
    raise FileNotFoundError(
        f"no generator was trained yet under {runs}/: run python train_dalle.py, or name one with --checkpoint DIR"
    )
