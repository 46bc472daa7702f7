"""Pairs for a ControlNet: from any source with or without drawings to latents with the drawing of each view beside."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from common.distributed import World
from common.log import say
from data_tools.images.line_drawings import LINE_MEMBER
from data_tools.lines import LinesConfig, lines
from data_tools.shards.captions import ANY_LINE, CaptionChoice
from data_tools.shards.encode import Views
from data_tools.shards.index import ShardIndex, ShardSource
from data_tools.shards.line_views import LineSource
from data_tools.shards.loader import Augment, Batch, CorruptSample, view_lines
from data_tools.shards.remote import RemoteOptions
from diffusion.base import DiffusionBase
from diffusion.scratch.latents import MEMBER, encode_latents, read_latents


def image_shards(data: str, image_size: int, run_dir: Path, world: World) -> str:
    """`data` where it holds shards; else shards of its pairs in run_dir/pairs, made by data_tools.lines.

    As published, a drawing of another aspect is squashed onto its image's square.
    """
    path = Path(data)
    if not path.exists() or any(path.glob("train-*.tar")):
        return data
    target = run_dir / "pairs"
    if world.is_main:
        say(f"pairs: {data} -> {target}")
        report = lines(
            LinesConfig(path, str(target), method="given", fit="stretch", size=image_size, workers=0)
        )
        if not report["splits"].get("train"):
            raise ValueError(
                f"{data} holds no whole pair of drawing, image and title: see {target}/dropped.jsonl"
            )
        say(f"pairs: {report['kept']} kept, {report['dropped']} dropped: {report['reasons']}")
    world.barrier()
    return str(target)


def prepare_pairs(
    base: DiffusionBase,
    source: str,
    target: Path,
    image_size: int,
    count: int,
    augment: Augment,
    source_of_lines: LineSource,
    world: World,
) -> dict[str, int]:
    """Latent shards with drawings in `target`; whole ones are kept. Raises ValueError where drawings are missing."""
    if source_of_lines == "given" and not ShardIndex.open(source, "train").has(LINE_MEMBER):
        raise ValueError(
            f"{source} holds no drawings: make them with `python -m data_tools.lines`, or choose --lines mixed"
        )
    views = Views(image_size, count, augment, 16, source_of_lines)
    return encode_latents(base.vae, ShardSource(source, RemoteOptions()), target, views, world)


@dataclass(frozen=True)
class DecodePairs:
    """Latent-shard sample -> moments (2C, h, w) float32, line (1, S, S) uint8, text, key; of one view."""

    shape: tuple[int, int, int]
    first_view: bool = False
    captions: CaptionChoice = ANY_LINE

    def __call__(self, index: ShardIndex, i: int, rng: np.random.Generator) -> Batch:
        members = index.read(i, (MEMBER, LINE_MEMBER, *self.captions.members))
        views = read_latents(members.get(MEMBER, b""))
        if views.shape[1:] != self.shape:
            raise CorruptSample(f"its latents have shape {views.shape[1:]}, not {self.shape}")
        view = 0 if self.first_view else int(rng.integers(len(views)))
        return {
            "moments": torch.from_numpy(views[view].astype(np.float32)),
            "line": view_lines(members, view, len(views)),
            "text": self.captions.pick(members, None if self.first_view else rng),
            "key": index.samples[i].key,
        }
