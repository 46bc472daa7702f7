"""Line drawings in a training of the generator: what of a batch the model gets, where it starts, and what it shows."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from common.checkpoint import load_weights
from common.image import make_grid
from dalle.lines import LineControl
from dalle.model import Dalle, read_model_config
from dalle.options import SamplingOptions
from dalle.training.captions import keep_drawings
from dalle.training.data import TrainData

if TYPE_CHECKING:
    from dalle.pipeline import TextToImage

SHOWN = 4  # drawings of a sample grid


def line_inputs(batch: dict[str, Any], share: float, salt: tuple[int, int]) -> dict[str, Tensor]:
    """What a step adds to the model's inputs: drawings (B, 1, S, S) uint8, and which are shown (B,) bool.

    share: of those that are hidden; salt: (seed, step).
    """
    return {"drawings": batch["line"], "has_drawing": keep_drawings(batch["key"], share, salt)}


def to_model(inputs: dict[str, Any], device: torch.device) -> dict[str, Tensor]:
    """Of a micro-batch, as `Dalle.forward` takes them; empty where there are no drawings."""
    if "drawings" not in inputs:
        return {}
    drawings = inputs["drawings"].to(device).float() / 255
    return {"drawings": drawings, "has_drawing": inputs["has_drawing"].to(device)}


def load_init(model: Dalle, directory: Path) -> None:
    """The weights of a generator; one that follows no drawings leaves the new encoder as it is, which adds zeros.

    Raises ValueError where anything else differs.
    """
    if model.line_encoder is None or read_model_config(directory).line_factor:
        load_weights(model, directory)
        return
    plain = Dalle(replace(model.config, line_factor=0))
    load_weights(plain, directory)
    encoder = {n: t for n, t in model.state_dict().items() if n.startswith("line_encoder.")}
    model.load_state_dict(plain.state_dict() | encoder)


def sample_lines(
    pipeline: "TextToImage", data: TrainData, num_images: int, seed: int, options: SamplingOptions
) -> Image.Image:
    """A row for each of the first validation drawings: the drawing, then images of its caption that follow it."""
    batch = next(iter(data.val_batches(SHOWN, SHOWN)))
    rows: list[Image.Image] = []
    for text, lines in zip(batch["text"], batch["line"][:, 0].numpy(), strict=True):
        rows.append(Image.fromarray(lines).convert("RGB"))
        rows += _images(pipeline, text, num_images, seed, options, LineControl(lines))
    return make_grid(rows, columns=1 + num_images)


def _images(
    pipeline: "TextToImage", text: str, count: int, seed: int, options: SamplingOptions, line: LineControl
) -> Sequence[Image.Image]:
    return [p.image for p in pipeline.generate([text], count, seed, options, line=line)]
