"""Continuous batching gives the very tokens of the pipeline, whatever joins, leaves or is cancelled meanwhile."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from small_checkpoint import CAPTIONS

from dalle import inpaint
from dalle.batching import ContinuousBatcher, Job
from dalle.engines import FastOptions, prepare
from dalle.lines import LineControl
from dalle.model import Dalle, ModelOptions
from dalle.pipeline import Request, TextToImage
from dalle.sampling import SamplingOptions
from kernels import decode

ENGINES = [
    FastOptions("torch", "float32"),
    pytest.param(
        FastOptions("cpu_kernel", "bfloat16"),
        marks=pytest.mark.skipif(bool(decode.unavailable_reason()), reason="no cpu_kernel engine here"),
    ),
]
GUIDED = SamplingOptions(cfg_scale=2.0, top_p=0.95)
RISING = SamplingOptions(cfg_scale=3.0, cfg_schedule="cosine", temperature=0.9)
PLAIN = SamplingOptions(cfg_scale=1.0)


@pytest.fixture(params=ENGINES, ids=["torch", "cpu_kernel"])
def pipeline(request, generator_dir) -> TextToImage:
    pipeline = TextToImage.from_pretrained(generator_dir, "cpu")
    if request.param.engine == "cpu_kernel":  # the small checkpoint's heads are too narrow for compiled code
        torch.manual_seed(0)
        old = pipeline.config
        options = ModelOptions(dim=64, num_layers=2, num_heads=2, text_embed_dim=8)
        model = Dalle(options.config(old.text_vocab_size, old.pad_id, 12, 24, 10)).eval()
        pipeline.config = model.config
        pipeline.generator = prepare(model, request.param)
    else:
        pipeline.generator = prepare(Dalle.from_pretrained(generator_dir), request.param)
    return pipeline


def job(text: int, count: int, **changes) -> Job:
    return Job(tuple(Request(CAPTIONS[text], i) for i in range(count)), **changes)


def expected(pipeline, work: Job) -> list[list[int]]:
    images = pipeline.generate_requests(
        work.requests,
        work.seed,
        work.options,
        work.negative,
        batch_size=3,
        source=work.source,
        line=work.line,
    )
    return [image.ids.tolist() for image in images]


def run(batcher, jobs: list[Job], apart: int) -> dict[int, list[list[int]]]:
    """Submit a job every `apart` steps; ids of each job's images in order."""
    found: dict[int, dict[int, list[int]]] = {}
    todo, steps = list(jobs), 0
    while todo or not batcher.is_idle:
        if todo and steps % apart == 0:
            found[batcher.submit(todo.pop(0))] = {}
        for image in batcher.step():
            found[image.job][image.number] = image.ids.tolist()
        steps += 1
    return {number: [ids[i] for i in sorted(ids)] for number, ids in found.items()}


@pytest.mark.parametrize("max_images", [3, 16])
def test_jobs_that_join_at_any_step_get_the_pipelines_tokens(pipeline, max_images):
    jobs = [
        job(0, 3, seed=4, options=GUIDED),
        job(1, 2, seed=1, options=PLAIN),
        job(2, 4, seed=4, options=RISING),
        job(0, 1, seed=9, options=GUIDED, negative=CAPTIONS[3]),
        job(4, 1, seed=2, options=SamplingOptions(temperature=0.0)),
    ]
    found = run(ContinuousBatcher(pipeline, max_images), jobs, apart=17)
    assert list(found.values()) == [expected(pipeline, work) for work in jobs]


def test_images_to_start_from_keep_their_tokens(pipeline):
    tokens = torch.arange(100) % 24
    halves = inpaint.Source(tokens, torch.arange(100) < 50)
    spots = inpaint.Source(tokens, torch.arange(100) % 3 == 1)
    varied = inpaint.Source(tokens, None, 0.5)
    jobs = [job(1, 2, seed=3, options=GUIDED, source=source) for source in (halves, spots, varied)]
    found = run(ContinuousBatcher(pipeline, 4), jobs, apart=5)
    assert list(found.values()) == [expected(pipeline, work) for work in jobs]
    assert found[0][0][:50] == tokens[:50].tolist()


@pytest.fixture(params=ENGINES, ids=["plain", "native"])
def following(request, generator_dir) -> TextToImage:
    """A generator that follows drawings."""
    pipeline = TextToImage.from_pretrained(generator_dir, "cpu")
    torch.manual_seed(0)
    old, options = pipeline.config, ModelOptions(dim=64, num_layers=2, num_heads=2, text_embed_dim=8)
    config = options.config(old.text_vocab_size, old.pad_id, 12, 24, 10)
    model = Dalle(replace(config, line_factor=4, line_width=16)).eval()
    with torch.no_grad():
        model.line_encoder.out.weight.normal_(std=3.0)
    pipeline.config, pipeline.line_encoder = model.config, model.line_encoder
    pipeline.generator = prepare(model, request.param)
    return pipeline


def test_drawings_are_followed_each_by_its_own_images(following):
    rng = np.random.default_rng(0)
    circle, stripes = (rng.integers(0, 2, (40, 40), np.uint8) * 255 for _ in range(2))
    half = inpaint.Source(torch.arange(100) % 24, torch.arange(100) < 50)
    jobs = [
        job(0, 3, seed=4, options=GUIDED, line=LineControl(circle)),
        job(1, 2, seed=1, options=PLAIN),
        job(0, 2, seed=4, options=GUIDED, line=LineControl(stripes, 0.5)),
        job(2, 2, seed=3, options=GUIDED, line=LineControl(circle), source=half),
        job(2, 2, seed=3, options=RISING),
    ]
    found = list(run(ContinuousBatcher(following, 4), jobs, apart=17).values())
    assert found == [expected(following, work) for work in jobs]
    assert found[0][:2] != found[2]


def test_drawings_that_cannot_be_followed_are_refused(following, pipeline):
    line = LineControl(np.zeros((40, 40), np.uint8), cfg_scale=2.0)
    with pytest.raises(ValueError, match="must be 1, not 2"):
        ContinuousBatcher(following, 4).submit(job(0, 1, line=line))
    with pytest.raises(ValueError, match="--lines"):
        ContinuousBatcher(pipeline, 4).submit(job(0, 1, line=replace(line, cfg_scale=1.0)))


def test_a_cancelled_job_frees_its_place_and_changes_no_other(pipeline):
    batcher = ContinuousBatcher(pipeline, 4)
    first, second, third = job(0, 2, options=GUIDED), job(1, 3, options=GUIDED), job(2, 2, options=GUIDED)
    numbers = [batcher.submit(work) for work in (first, second, third)]
    found: dict[int, dict[int, list[int]]] = {n: {} for n in numbers}
    for step in range(400):
        if step == 30:
            batcher.cancel(numbers[0])
            batcher.cancel(12345)
        for image in batcher.step():
            found[image.job][image.number] = image.ids.tolist()
        if batcher.is_idle:
            break
    assert step < 250 and not found[numbers[0]]
    for number, work in zip(numbers[1:], (second, third), strict=True):
        assert [found[number][i] for i in range(len(work.requests))] == expected(pipeline, work)


def test_progress_tells_the_tokens_so_far(pipeline):
    batcher = ContinuousBatcher(pipeline, 4)
    work = job(0, 2, options=GUIDED)
    number = batcher.submit(work)
    for _ in range(40):
        batcher.step()
    wanted = expected(pipeline, work)
    for index, ids, count in batcher.progress(number):
        assert count == 40 and ids[:40].tolist() == wanted[index][:40]
    assert batcher.num_unfinished == 2


def test_likelihoods_are_those_of_the_pipeline(pipeline):
    work = job(0, 2, options=GUIDED)
    batcher = ContinuousBatcher(pipeline, 4)
    batcher.submit(work)
    found = []
    while not batcher.is_idle:
        found += batcher.step()
    images = pipeline.generate_requests(work.requests, work.seed, work.options)
    wanted = [image.log_likelihood for image in images]
    assert [f.log_likelihood for f in found] == pytest.approx(wanted, abs=1e-2)


def test_what_cannot_be_is_refused_before_it_waits(pipeline):
    batcher = ContinuousBatcher(pipeline, 4)
    for bad in (
        Job((Request("", 0),)),
        Job((Request(CAPTIONS[0], 0),), options=PLAIN, negative=CAPTIONS[1]),
    ):
        with pytest.raises(ValueError):
            batcher.submit(bad)
    assert batcher.is_idle
    with pytest.raises(ValueError, match="max_images"):
        ContinuousBatcher(pipeline, 0)
