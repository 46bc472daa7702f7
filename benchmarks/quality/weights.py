"""What 16-bit and 8-bit weights change: tokens, images and scores against float32, on the same prompts and seeds.

    python -m benchmarks.quality.weights
    python -m benchmarks.quality.weights --num-images 4 --contenders cpu_kernel_int8

Three comparisons with the torch engine in float32. Agreement: the share of tokens that are the same where both read the
tokens of float32 (each position alone, the same noise). Own images: PSNR between the images that each samples for
itself; after the first token that differs they are other images of the same text, so this says how far a seed is
reproduced, not how good it is. Score: mean of the ranker, which says whether they are as good.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.config import command, parse_options
from common.log import say
from dalle import default_checkpoint
from dalle.engines import FastOptions, prepare
from dalle.model import Dalle
from dalle.pipeline import GeneratedImage, TextToImage
from dalle.sampling import (
    NOISE_CHUNK,
    Generator,
    SamplingOptions,
    choose,
    fill_rows,
    guidance_scale,
    guide,
    gumbel_noise,
    noise_generator,
)
from rankers import default_ranker, load_ranker

PROMPTS = (
    *(
        "一件红色的T恤",
        "一条蓝色牛仔裤",
        "一双黑色的鞋",
        "一条碎花连衣裙",
        "金冠苹果",
        "一盒牛奶",
        "香蕉",
        "胡萝卜",
    ),
    *(
        "一件白色的衬衫",
        "一个棕色的包",
        "一双白色的运动鞋",
        "一条黑色的裤子",
        "一件绿色的外套",
        "一条红色的裙子",
    ),
    *("橙子", "西红柿", "一双红色的凉鞋", "一件灰色的毛衣", "黄瓜", "一顶黑色的帽子"),
)
Contender = Literal[
    "torch_bfloat16", "packed_bfloat16", "packed_int8", "cpu_kernel_bfloat16", "cpu_kernel_int8"
]


@dataclass(frozen=True)
class Options:
    """Compare weights."""

    checkpoint: str = ""
    """Generator; empty: the newest of runs/, else the one that ships."""
    ranker: str = ""
    """Ranker of the scores; empty: the newest one, else the one that ships; none: no scores."""
    contenders: tuple[Contender, ...] = ("cpu_kernel_bfloat16", "cpu_kernel_int8")
    """Engine and weights, compared with torch in float32."""
    num_images: int = 2
    """Images of each of the 20 prompts."""
    prompts: int = len(PROMPTS)
    """Prompts that take part, the first ones."""

    def __post_init__(self) -> None:
        if self.num_images < 1 or not 1 <= self.prompts <= len(PROMPTS):
            raise ValueError(f"num_images must be at least 1 and prompts lie in [1, {len(PROMPTS)}]")


@torch.inference_mode()
def tokens_after(
    engine: Generator, pipeline: TextToImage, images: Sequence[GeneratedImage], options: SamplingOptions
) -> Tensor:
    """(B, N) what `engine` chooses at each position when it reads the tokens of `images` before it."""
    ids = torch.stack([p.ids for p in images])  # (B, N)
    text_ids = torch.cat([pipeline.encode_text(p.text)[0] for p in images])
    sides = [text_ids, pipeline.null_ids().expand(len(text_ids), -1)][: 1 + options.is_guided]
    rows = fill_rows(torch.cat(sides), engine.row_multiple)
    generators = [noise_generator(p.seed, p.index) for p in images]
    cache, chosen, num_tokens = engine.new_cache(rows), [], ids.shape[1]
    logits = engine.prefill(rows, cache)
    for n in range(num_tokens):
        if n % NOISE_CHUNK == 0:
            noise = gumbel_noise(generators, engine.config.codebook_size, ids.device)
        parts = logits[: len(ids) * len(sides)].float().chunk(len(sides))
        scale = guidance_scale(n, num_tokens, options.cfg_scale, options.cfg_schedule)
        chosen.append(
            choose(guide(*parts, scale) if len(sides) > 1 else parts[0], noise[n % NOISE_CHUNK], options)
        )
        if n + 1 < num_tokens:
            row_ids = fill_rows(ids[:, n].repeat(len(sides)), engine.row_multiple)
            logits = engine.decode_step(row_ids, n, cache)
    return torch.stack(chosen, 1)


def psnr(first: Image.Image, second: Image.Image) -> float:
    """In dB; equal images count as 60."""
    error = np.mean((np.asarray(first, np.float64) - np.asarray(second, np.float64)) ** 2)
    return min(60.0, 10 * float(np.log10(255**2 / max(error, 1e-9))))


@command
def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Compare; returns agreement, psnr, same_images and score of each contender."""
    options = parse_options(Options, argv, description=__doc__)
    checkpoint, sampling = options.checkpoint or default_checkpoint(), SamplingOptions()
    pipeline = TextToImage.from_pretrained(checkpoint, "cpu", FastOptions("torch", "float32"))
    model = Dalle.from_pretrained(pipeline.directory)
    ranker = None if options.ranker == "none" else load_ranker(options.ranker or default_ranker(), "cpu")
    texts = PROMPTS[: options.prompts]

    def scored(images: Sequence[GeneratedImage]) -> float:
        if ranker is None:
            return float("nan")
        return float(np.mean([ranker.score(p.text, [p.image]).item() for p in images]))

    expected = list(pipeline.generate(texts, options.num_images, 0, sampling))
    found = {"torch_float32": {"agreement": 1.0, "psnr": 60.0, "same_images": 1.0, "score": scored(expected)}}
    for contender in options.contenders:
        engine, weights = contender.rsplit("_", 1)
        pipeline.generator = prepare(model.eval(), FastOptions(engine, weights))
        own = list(pipeline.generate(texts, options.num_images, 0, sampling))
        batches = [expected[i : i + 8] for i in range(0, len(expected), 8)]
        same = torch.cat([tokens_after(pipeline.generator, pipeline, b, sampling) for b in batches])
        found[contender] = {
            "agreement": float((same == torch.stack([p.ids for p in expected])).float().mean()),
            "psnr": float(np.median([psnr(a.image, b.image) for a, b in zip(expected, own, strict=True)])),
            "same_images": float(
                np.mean([bool((a.ids == b.ids).all()) for a, b in zip(expected, own, strict=True)])
            ),
            "score": scored(own),
        }
    for name, row in found.items():
        say(f"{name}: " + " | ".join(f"{what} {value:.4f}" for what, value in row.items()))
    return found


if __name__ == "__main__":
    main()
