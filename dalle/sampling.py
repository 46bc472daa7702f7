"""Sampling image tokens: small pure functions from logits to an id, and the loop that puts them in a row.

Guidance: Ho and Salimans 2022, equation 6, on logits. Top-k: Fan et al. 2018; top-p: Holtzman et al. 2020; min-p:
Nguyen et al. 2024. A draw is the Gumbel-max trick: argmax(logits + noise) has the distribution softmax(logits), needs
no cumulative sum, and a rounding error changes a draw only where two tokens all but tie.

Image i of seed s is the same in whatever batch it is generated: its noise comes from a generator of its own, and rows
are filled up to a multiple where matrix products would round differently for odd row counts. On a GPU that holds for
one batch size: for another number of rows its libraries may take another product, which rounds otherwise.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from common.machine.one_thread import one_thread
from dalle.lines import LineFeatures
from dalle.options import SamplingOptions, Schedule

ROW_BLOCK = (
    8  # of unpacked products on CPUs: float32 ones differ for rows that are no multiple of 4, bfloat16 for 1
)
LEAST_TEMPERATURE = 1e-6  # colder is the likeliest token, and logits divided by it would leave float32
NOISE_CHUNK = 64  # positions whose noise is made at once; part of what a seed means
JUDGED_CHUNK = 16  # positions whose likelihoods are computed at once: small operations cost too much


class Generator(Protocol):
    """What the loop asks of a model: one of the forms that `dalle.engines.prepare` makes."""

    config: Any  # codebook_size, num_image_tokens
    row_multiple: int  # rows of a pass are filled up to a multiple of this

    def new_cache(self, text_ids: Tensor, lines: Tensor | None = None) -> Any: ...

    def prefill(self, text_ids: Tensor, cache: Any, image_ids: Tensor | None = None) -> Tensor: ...

    def decode_step(self, image_ids: Tensor, position: int, cache: Any) -> Tensor: ...


@dataclass(frozen=True)
class Sampled:
    """Sampled token grids and what the model thought of them, summed over the positions that were sampled."""

    ids: Tensor  # (B, N) long
    log_likelihood: Tensor  # (B,) float32: log p(image | text), without guidance, temperature or filters
    null_log_likelihood: Tensor | None  # (B,) log p(image | no text); None when no such rows were run


@dataclass(frozen=True)
class Canvas:
    """Tokens that stand already: `keep` (B, N) bool marks them in `ids` (B, N).

    The first `prefix_len` positions, kept by every image, are read in one pass. It may not depend on which images
    share a batch, since one pass and many steps round differently.
    """

    ids: Tensor
    keep: Tensor
    prefix_len: int = 0


def guidance_scale(position: int, num_positions: int, scale: float, schedule: Schedule) -> float:
    """The scale at `position` of `num_positions`: constant, or from 1 at the first to `scale` at the last."""
    progress = position / max(1, num_positions - 1)
    if schedule == "constant":
        return scale
    if schedule == "linear":
        return 1 + (scale - 1) * progress
    if schedule == "cosine":
        return 1 + (scale - 1) * (1 - math.cos(math.pi * progress)) / 2
    raise ValueError(f"unknown guidance schedule {schedule!r}")


def guide(logits: Tensor, null_logits: Tensor, scale: float) -> Tensor:
    """(B, V) with text and without -> (B, V)"""
    return torch.lerp(null_logits, logits, scale)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """All but the k largest of each row become -inf; ties with the k-th stay. 0 keeps all."""
    if k == 0 or k >= logits.shape[-1]:
        return logits
    smallest_kept = logits.topk(k, dim=-1).values[..., -1:]
    return logits.masked_fill(logits < smallest_kept, -math.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the smallest set of likeliest tokens whose probability reaches p."""
    if p == 1:
        return logits
    ordered, order = logits.sort(dim=-1, descending=True)
    with one_thread():
        probability = ordered.softmax(-1)
    reached_before = probability.cumsum(-1) - probability >= p  # the sum without this token is enough
    dropped = torch.zeros_like(reached_before).scatter(-1, order, reached_before)
    return logits.masked_fill(dropped, -math.inf)


def keep_min_p(logits: Tensor, min_p: float) -> Tensor:
    """Drop tokens less likely than min_p times the likeliest."""
    if min_p == 0:
        return logits
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(min_p), -math.inf)


def choose(logits: Tensor, noise: Tensor, options: SamplingOptions) -> Tensor:
    """Guided logits (B, V) float32 and Gumbel noise (B, V) -> ids (B,)"""
    if options.temperature < LEAST_TEMPERATURE:
        return logits.argmax(-1)
    if options.temperature != 1:
        logits = logits / options.temperature
    logits = keep_min_p(keep_top_p(keep_top_k(logits, options.top_k), options.top_p), options.min_p)
    return (logits + noise).argmax(-1)


def noise_generator(seed: int, index: int) -> torch.Generator:
    """The source of all randomness of image `index` of `seed`, on the CPU: the same on every device."""
    state = np.random.SeedSequence((seed, index)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def gumbel_noise(generators: Sequence[torch.Generator], vocab_size: int, device: torch.device) -> Tensor:
    """Gumbel noise for the next NOISE_CHUNK positions: (NOISE_CHUNK, B, V) float32.

    -log(-log(u)) of uniform numbers, five times as fast as PyTorch's exponential ones, which take two draws of doubles
    each. u comes in steps of 2^-24; half a step stands for 0, so that every number is finite.
    """
    uniform = [torch.rand(NOISE_CHUNK, vocab_size, generator=g) for g in generators]
    with one_thread():
        noise = torch.stack(uniform, dim=1).clamp_(min=2.0**-25).log_().neg_().log_().neg_()
    if device.type == "cuda":  # from pinned memory, so that the copy waits for nothing
        return noise.pin_memory().to(device, non_blocking=True)
    return noise.to(device)


def fill_rows(ids: Tensor, multiple: int) -> Tensor:
    """Repeat the last row until the number of rows is a multiple: (R, ...) -> (R', ...)"""
    missing = -len(ids) % multiple
    return torch.cat([ids, ids[-1:].expand(missing, *ids.shape[1:])]) if missing else ids


def sample_ids(
    model: Generator,
    text_ids: Tensor,
    null_ids: Tensor,
    generators: Sequence[torch.Generator],
    options: SamplingOptions,
    canvas: Canvas | None = None,
    lines: LineFeatures | None = None,
) -> Sampled:
    """Sample a token grid for each row of `text_ids` (B, T).

    null_ids: (B, T), what guidance leads away from: null captions or negative prompts; not run when cfg_scale is 1.
    generators: one a row (`noise_generator`). canvas: tokens to keep. lines: a drawing that all follow, also the
    likelihoods. Nothing in the loop waits for the device.
    """
    with torch.inference_mode():
        sampled = _sample_codes(model, text_ids, null_ids, generators, options, canvas, lines)
    return Sampled(*(None if t is None else t.clone() for t in sampled))  # clones may take part in training


def _sample_codes(
    model: Generator,
    text_ids: Tensor,
    null_ids: Tensor,
    generators: Sequence[torch.Generator],
    options: SamplingOptions,
    canvas: Canvas | None,
    lines: LineFeatures | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """ids (B, N), log-likelihoods (B,) with and without text."""
    batch_size, num_tokens, device = len(text_ids), model.config.num_image_tokens, text_ids.device
    parts = _parts(text_ids, null_ids, options, lines)
    rows = fill_rows(torch.cat(parts), model.row_multiple)  # (R, T): with text, without text, filling
    to_rows = partial(_to_rows, num_rows=len(rows), num_parts=len(parts))
    start = canvas.prefix_len if canvas else 0
    ids = (
        canvas.ids.clone() if canvas else torch.zeros(batch_size, num_tokens, dtype=torch.long, device=device)
    )
    likelihood = torch.zeros(len(rows), num_tokens, device=device)  # of each token
    seen = torch.empty(JUDGED_CHUNK, len(rows), model.config.codebook_size, device=device)  # logits

    cache = (
        model.new_cache(rows)
        if lines is None
        else model.new_cache(rows, _line_rows(lines, rows, batch_size * len(parts) - batch_size))
    )
    logits = model.prefill(rows, cache, to_rows(ids[:, :start]) if start else None)
    noise = _noise_from(generators, model.config.codebook_size, device, start)
    for n in range(start, num_tokens):
        if n > start and n % NOISE_CHUNK == 0:
            noise = gumbel_noise(generators, model.config.codebook_size, device)
        seen[n % JUDGED_CHUNK] = logits
        logits = seen[n % JUDGED_CHUNK]  # (R, V) float32
        scale = guidance_scale(n, num_tokens, options.cfg_scale, options.cfg_schedule)
        guided = _guided(logits[: batch_size * len(parts)].chunk(len(parts)), scale, options, lines)
        sampled = choose(guided, noise[n % NOISE_CHUNK], options)  # (B,)
        if canvas:
            sampled = torch.where(canvas.keep[:, n], ids[:, n], sampled)
        ids[:, n] = sampled
        row_ids = to_rows(sampled)
        if n + 1 < num_tokens:
            logits = model.decode_step(row_ids, n, cache)
        if (n + 1) % JUDGED_CHUNK == 0 or n + 1 == num_tokens:
            some = slice(max(start, n // JUDGED_CHUNK * JUDGED_CHUNK), n + 1)
            chunk = seen[some.start % JUDGED_CHUNK : n % JUDGED_CHUNK + 1]
            likelihood[:, some] = token_likelihoods(chunk, to_rows(ids[:, some]))
    if canvas:
        likelihood.masked_fill_(to_rows(canvas.keep), 0.0)
    total = likelihood.sum(-1)  # (R,)
    return ids, total[:batch_size], total[batch_size : 2 * batch_size] if options.is_guided else None


def token_likelihoods(logits: Tensor, ids: Tensor) -> Tensor:
    """log p of the sampled tokens: logits (n, R, V), ids (R, n) -> (R, n)"""
    chosen = logits.gather(-1, ids.t()[..., None])[..., 0]  # (n, R)
    with one_thread():
        return (chosen - logits.logsumexp(-1)).t()


def _parts(
    text_ids: Tensor, null_ids: Tensor, options: SamplingOptions, lines: LineFeatures | None
) -> list[Tensor]:
    """Texts (B, T) of the rows of a pass: with text, without text, and the last of them without the drawing."""
    parts = [text_ids] + [null_ids] * options.is_guided
    return parts + parts[-1:] * (lines is not None and lines.is_guided)


def _guided(
    parts: Sequence[Tensor], scale: float, options: SamplingOptions, lines: LineFeatures | None
) -> Tensor:
    """Logits (B, V) of each part of the rows -> those to choose from.

    With a drawing that is guided too (Brooks et al. 2023, arXiv:2211.09800, equation 3): first from no drawing towards
    the drawing, without text, then on towards the text, with the drawing.
    """
    if lines is None or not lines.is_guided:
        return guide(*parts, scale) if options.is_guided else parts[0]
    followed = guide(parts[-2], parts[-1], lines.cfg_scale)
    return followed + scale * (parts[0] - parts[1]) if options.is_guided else followed


def _line_rows(lines: LineFeatures, rows: Tensor, first_without: int) -> Tensor:
    """Features for all rows of a pass, (R, N, D): where the drawing is guided, zeros from `first_without` on."""
    features = lines.features.expand(len(rows), -1, -1)
    if not lines.is_guided:
        return features
    has_drawing = torch.ones(len(rows), 1, 1, device=rows.device)
    has_drawing[first_without:] = 0
    return features * has_drawing


def _to_rows(values: Tensor, num_rows: int, num_parts: int) -> Tensor:
    """What belongs to the B images, for all rows of a pass: once a part, then the filling."""
    repeated = torch.cat([values] * num_parts) if num_parts > 1 else values
    return fill_rows(repeated, num_rows)


def _noise_from(
    generators: Sequence[torch.Generator], vocab_size: int, device: torch.device, start: int
) -> Tensor:
    """The chunk that holds position `start`; the chunks before it are made and dropped."""
    for _ in range(start // NOISE_CHUNK):
        gumbel_noise(generators, vocab_size, torch.device("cpu"))
    return gumbel_noise(generators, vocab_size, device)


@torch.no_grad()
def log_likelihood(model: Any, text_ids: Tensor, image_ids: Tensor) -> Tensor:
    """log p(image | text) of given images in one pass: text_ids (B, T), image_ids (B, N) -> (B,) float32."""
    logits = model(text_ids, image_ids).image.float()  # (B, N, V)
    chosen = logits.gather(-1, image_ids[..., None])[..., 0]  # (B, N)
    return (chosen - logits.logsumexp(-1)).sum(-1)
