"""Continuous batching: images of different texts, options and lengths share decode steps; each joins and leaves alone.

Orca (Yu et al. 2022, section 3.1) calls it iteration-level scheduling. A row of the key-value cache is one sequence: an
image has one with its text and, under guidance, one without. Active rows stand at the front of the cache, each at a
position of its own; the last one takes the place of one that leaves. An image has the bytes that `TextToImage` gives
for its seed and index: its noise comes from a generator of its own, and no row's numbers depend on the others.
"""

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dalle.engines.cpu_kernel import CpuKernelDecoder
from dalle.engines.eager import TorchDecoder
from dalle.inpaint import Source
from dalle.lines import LineControl, encode_control
from dalle.model import Dalle
from dalle.pipeline import Request, TextToImage
from dalle.sampling import (
    NOISE_CHUNK,
    SamplingOptions,
    choose,
    fill_rows,
    guidance_scale,
    guide,
    gumbel_noise,
    noise_generator,
)


@dataclass(frozen=True)
class Job:
    """Images asked for together."""

    requests: tuple[Request, ...]
    seed: int = 0
    options: SamplingOptions = field(default_factory=SamplingOptions)
    negative: str = ""
    source: Source | None = None
    """An image that these start from."""
    line: LineControl | None = None
    """A drawing that these follow."""


@dataclass(frozen=True)
class Finished:
    """An image whose tokens are complete."""

    job: int
    """What `submit` returned."""
    number: int
    """Which of the job's requests."""
    ids: Tensor
    """(N,) long"""
    log_likelihood: float
    """log p(image | text) in nats, over the tokens that were sampled."""


@dataclass(eq=False)
class _Image:
    """An image on its way."""

    job: int
    number: int
    options: SamplingOptions
    rows_ids: Tensor  # (1 or 2, T) long: its text, and what guidance leads away from
    generator: torch.Generator
    canvas: tuple[Tensor, Tensor, int] | None  # ids (N,), keep (N,) bool, length of the prefix
    lines: Tensor | None = None  # (N, D) features of its drawing
    slot: int = -1
    position: int = 0
    log_likelihood: float = 0.0


class ContinuousBatcher:
    """Steps many jobs forward together; one thread drives it."""

    def __init__(self, pipeline: TextToImage, max_images: int = 16) -> None:
        """max_images: images that share a step. Raises ValueError for a generator whose rows cannot come and go."""
        if max_images < 1:
            raise ValueError(f"max_images must be at least 1, not {max_images}")
        engine = pipeline.generator
        if not isinstance(engine, (CpuKernelDecoder, TorchDecoder)):
            raise ValueError(
                f"continuous batching needs the cpu_kernel or torch engine, not {pipeline.fast.engine}"
            )
        if isinstance(engine, TorchDecoder) and not isinstance(engine.model, Dalle):
            raise ValueError("an imported generator cannot be batched continuously")
        self.pipeline, self.engine, self.max_images = pipeline, engine, max_images
        config, device = pipeline.config, pipeline.device
        self.num_tokens, self.codebook_size = config.num_image_tokens, config.codebook_size
        capacity = -(-2 * max_images // engine.row_multiple) * engine.row_multiple
        with torch.inference_mode():
            self.cache = engine.new_rows(capacity)
            self.logits = torch.zeros(capacity, self.codebook_size, device=device)
            self.ids = torch.zeros(max_images, self.num_tokens, dtype=torch.long, device=device)
            self.noise = torch.zeros(max_images, NOISE_CHUNK, self.codebook_size, device=device)
        self.rows: list[tuple[_Image, int]] = []  # of the cache: the image, 0 with its text and 1 without
        self.free = list(range(max_images))
        self.active: list[_Image] = []
        self.waiting: deque[_Image] = deque()
        self.numbers = itertools.count()

    @property
    def is_idle(self) -> bool:
        return not (self.active or self.waiting)

    @property
    def num_unfinished(self) -> int:
        """Images that wait or are being sampled."""
        return len(self.active) + len(self.waiting)

    def submit(self, job: Job) -> int:
        """Put a job in the queue; returns its number. Raises ValueError for a text or options that cannot be."""
        images = list(self._images_of(job))
        number = next(self.numbers)
        for image in images:
            image.job = number
        self.waiting.extend(images)
        return number

    @torch.inference_mode()
    def cancel(self, job: int) -> None:
        """Forget what is left of a job; an unknown or finished one is no error."""
        self.waiting = deque(image for image in self.waiting if image.job != job)
        for image in [image for image in self.active if image.job == job]:
            self._leave(image)

    def progress(self, job: int) -> list[tuple[int, Tensor, int]]:
        """(number, ids (N,), tokens sampled so far) of a job's images that are being sampled."""
        return [(i.number, self.ids[i.slot].clone(), i.position) for i in self.active if i.job == job]

    @torch.inference_mode()
    def step(self) -> list[Finished]:
        """Let waiting images in and sample one token of every active one; returns those that became complete."""
        self._admit()
        for options, images in self._by_options().items():
            self._sample(options, images)
        done = [image for image in self.active if image.position == self.num_tokens]
        finished = [Finished(i.job, i.number, self.ids[i.slot].cpu().clone(), i.log_likelihood) for i in done]
        for image in done:
            self._leave(image)
        if self.rows:
            self._decode()
        return finished

    def _images_of(self, job: Job) -> Iterator[_Image]:
        pipeline, options = self.pipeline, job.options
        if job.negative.strip() and not options.is_guided:
            raise ValueError(
                "a negative prompt works through guidance: set cfg_scale to something other than 1"
            )
        if job.line and job.line.cfg_scale != 1:
            raise ValueError(
                "guidance on the drawing takes another row for each image, which continuous batching does not have: "
                f"the cfg_scale of a line must be 1, not {job.line.cfg_scale}"
            )
        null_ids = pipeline.encode_text(job.negative)[0] if job.negative.strip() else pipeline.null_ids()
        lines = None
        if job.line:
            lines = encode_control(pipeline.line_encoder, job.line, pipeline.device).features
        for number, request in enumerate(job.requests):
            text_ids = pipeline.encode_text(request.text)[0]  # (1, T)
            generator = noise_generator(job.seed, request.index)
            rows_ids = torch.cat([text_ids, null_ids]) if options.is_guided else text_ids
            canvas = None
            if job.source:
                made = job.source.canvas([generator], pipeline.device)
                canvas = (made.ids[0], made.keep[0], made.prefix_len)
            yield _Image(-1, number, options, rows_ids, generator, canvas, lines)

    def _admit(self) -> None:
        """Waiting images take free slots, those of one text and options in one prefill."""
        while self.waiting and self.free:
            first = self.waiting[0]
            start = first.canvas[2] if first.canvas else 0
            group: list[_Image] = []
            while self.waiting and self.free and self._joins(self.waiting[0], first):
                image = self.waiting.popleft()
                image.slot, image.position = self.free.pop(), start
                if image.canvas:
                    self.ids[image.slot] = image.canvas[0]
                group.append(image)
            self._prefill(group, start)

    @staticmethod
    def _joins(image: _Image, first: _Image) -> bool:
        """Whether two images can be prefilled together: as many rows each, as long a prefix."""
        prefix, first_prefix = (i.canvas[2] if i.canvas else 0 for i in (image, first))
        return len(image.rows_ids) == len(first.rows_ids) and prefix == first_prefix

    def _prefill(self, group: Sequence[_Image], start: int) -> None:
        sides = range(len(group[0].rows_ids))
        rows = [
            (image, side) for side in sides for image in group
        ]  # with text, then without, as the pipeline has it
        text_ids = torch.stack([image.rows_ids[side] for image, side in rows])  # (R, T)
        known = torch.stack([self.ids[image.slot, :start] for image, _ in rows]) if start else None
        at = len(self.rows)
        filled = fill_rows(text_ids, self.engine.row_multiple)[: len(self.logits) - at]
        known = None if known is None else fill_rows(known, self.engine.row_multiple)[: len(filled)]
        logits = self.engine.prefill_rows(filled, self.cache, at, known, self._lines_of(rows, len(filled)))
        self.logits[at : at + len(rows)] = logits[: len(rows)].float()
        self.rows += rows
        self.active += group
        for image in group:
            for _ in range(start // NOISE_CHUNK):  # noise of the positions before: generated, not used
                gumbel_noise([image.generator], self.codebook_size, torch.device("cpu"))
            if start % NOISE_CHUNK:
                self._renew_noise(image)

    def _lines_of(self, rows: Sequence[tuple[_Image, int]], num_filled: int) -> Tensor | None:
        """Features (R, N, D) of the drawings of rows, with and without text alike; None where none has a drawing."""
        given = [image.lines for image, _ in rows]
        if all(lines is None for lines in given):
            return None
        none = torch.zeros_like(next(lines for lines in given if lines is not None))
        lines = torch.stack([none if lines is None else lines for lines in given])
        return fill_rows(lines, self.engine.row_multiple)[:num_filled]

    def _renew_noise(self, image: _Image) -> None:
        self.noise[image.slot] = gumbel_noise([image.generator], self.codebook_size, self.noise.device)[:, 0]

    def _by_options(self) -> dict[SamplingOptions, list[_Image]]:
        groups: dict[SamplingOptions, list[_Image]] = {}
        for image in self.active:
            groups.setdefault(image.options, []).append(image)
        return groups

    def _sample(self, options: SamplingOptions, images: Sequence[_Image]) -> None:
        """One token for each image: (B,) ids at their positions."""
        for image in images:
            if image.position % NOISE_CHUNK == 0:
                self._renew_noise(image)
        row_of = {(image, side): row for row, (image, side) in enumerate(self.rows)}
        logits = self.logits[[row_of[i, 0] for i in images]]  # (B, V)
        guided = logits
        if options.is_guided:
            scales = [
                guidance_scale(i.position, self.num_tokens, options.cfg_scale, options.cfg_schedule)
                for i in images
            ]
            null_logits = self.logits[[row_of[i, 1] for i in images]]
            scale = torch.tensor(scales, device=logits.device)[:, None] if len(set(scales)) > 1 else scales[0]
            guided = guide(logits, null_logits, scale)
        slots = [i.slot for i in images]
        sampled = choose(
            guided, self.noise[slots, [i.position % NOISE_CHUNK for i in images]], options
        )  # (B,)
        kept = [i.canvas is not None and bool(i.canvas[1][i.position]) for i in images]
        if any(kept):
            old = self.ids[slots, [i.position for i in images]]
            sampled = torch.where(torch.tensor(kept, device=old.device), old, sampled)
        self.ids[slots, [i.position for i in images]] = sampled
        likelihood = logits.log_softmax(-1).gather(-1, sampled[:, None])[:, 0].tolist()
        for image, value, is_kept in zip(images, likelihood, kept, strict=True):
            image.log_likelihood += 0.0 if is_kept else value
            image.position += 1

    def _decode(self) -> None:
        """The next logits of every row."""
        slots = [image.slot for image, _ in self.rows]
        positions = torch.tensor([image.position - 1 for image, _ in self.rows], device=self.ids.device)
        ids = self.ids[slots, positions]  # (R,)
        multiple = self.engine.row_multiple
        logits = self.engine.decode_rows(fill_rows(ids, multiple), fill_rows(positions, multiple), self.cache)
        self.logits[: len(ids)] = logits[: len(ids)].float()

    def _leave(self, image: _Image) -> None:
        """The image's rows and slot become free; the last rows move into the gaps."""
        self.active.remove(image)
        self.free.append(image.slot)
        for row in sorted((r for r, (i, _) in enumerate(self.rows) if i is image), reverse=True):
            last = len(self.rows) - 1
            if row != last:
                self.cache.move_row(last, row)
                self.logits[row] = self.logits[last]
                self.rows[row] = self.rows[last]
            self.rows.pop()
