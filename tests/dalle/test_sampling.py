import math

import numpy as np
import pytest
import torch

from dalle import sequence
from dalle.engines.eager import TorchDecoder
from dalle.model import Dalle
from dalle.sampling import (
    NOISE_CHUNK,
    Canvas,
    SamplingOptions,
    choose,
    fill_rows,
    guidance_scale,
    guide,
    gumbel_noise,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    log_likelihood,
    noise_generator,
    sample_ids,
)

LOGITS = torch.log(torch.tensor([[0.5, 0.25, 0.15, 0.1], [0.1, 0.2, 0.3, 0.4]]))


def kept(logits: torch.Tensor) -> list[list[int]]:
    return [row.isfinite().nonzero().flatten().tolist() for row in logits]


def test_top_k_keeps_the_k_likeliest():
    assert kept(keep_top_k(LOGITS, 2)) == [[0, 1], [2, 3]]
    assert keep_top_k(LOGITS, 0) is LOGITS and keep_top_k(LOGITS, 4) is LOGITS


def test_top_p_keeps_the_smallest_set_that_reaches_p():
    assert kept(keep_top_p(LOGITS, 0.5)) == [[0], [2, 3]]
    assert kept(keep_top_p(LOGITS, 0.76)) == [[0, 1, 2], [1, 2, 3]]
    assert kept(keep_top_p(LOGITS, 1e-6)) == [[0], [3]]
    assert keep_top_p(LOGITS, 1.0) is LOGITS


def test_min_p_is_relative_to_the_likeliest():
    assert kept(keep_min_p(LOGITS, 0.45)) == [[0, 1], [1, 2, 3]]
    assert kept(keep_min_p(LOGITS, 1.0)) == [[0], [3]]
    assert keep_min_p(LOGITS, 0.0) is LOGITS


def test_filters_agree_with_transformers():
    from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(16, 50, generator=torch.Generator().manual_seed(0)) * 3
    for ours, theirs in (
        (keep_top_k(logits, 7), TopKLogitsWarper(7)),
        (keep_top_p(logits, 0.8), TopPLogitsWarper(0.8)),
        (keep_min_p(logits, 0.05), MinPLogitsWarper(0.05)),
    ):
        assert torch.equal(ours.isfinite(), theirs(None, logits.clone()).isfinite())


def test_guidance_is_the_published_formula():
    conditional, null = torch.randn(2, 3, 5)
    torch.testing.assert_close(guide(conditional, null, 3.0), null + 3.0 * (conditional - null))
    torch.testing.assert_close(guide(conditional, null, 1.0), conditional)
    assert torch.equal(guide(conditional, null, 0.0), null)


def test_guidance_schedules():
    assert [guidance_scale(n, 5, 5.0, "constant") for n in (0, 4)] == [5.0, 5.0]
    assert [guidance_scale(n, 5, 5.0, "linear") for n in range(5)] == [1.0, 2.0, 3.0, 4.0, 5.0]
    cosine = [guidance_scale(n, 5, 5.0, "cosine") for n in range(5)]
    np.testing.assert_allclose(cosine, [1, 3 - math.sqrt(2), 3, 3 + math.sqrt(2), 5])
    with pytest.raises(ValueError, match="unknown guidance schedule"):
        guidance_scale(0, 5, 5.0, "steep")


def test_draws_follow_the_tempered_distribution():
    options = SamplingOptions(temperature=0.7)
    generator = torch.Generator().manual_seed(0)
    noise = gumbel_noise([generator] * 400, 4, torch.device("cpu")).flatten(0, 1)  # (25600, 4)
    ids = choose(LOGITS[:1].expand(len(noise), -1), noise, options)
    expected = (LOGITS[0] / 0.7).softmax(-1)
    shares = ids.bincount(minlength=4) / len(ids)
    assert (shares - expected).abs().max() < 4 * 0.5 / len(ids) ** 0.5  # four standard errors


def test_temperature_zero_takes_the_likeliest():
    noise = torch.randn(2, 4) * 100
    assert choose(LOGITS, noise, SamplingOptions(temperature=0)).tolist() == [0, 3]


def test_noise_is_finite_and_of_gumbel(monkeypatch):
    cpu = torch.device("cpu")
    noise = gumbel_noise([noise_generator(0, 0)], 1024, cpu).flatten().double()
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.02)  # Euler's constant
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.05)
    for u in (0.0, 1 - 2.0**-24):
        monkeypatch.setattr(torch, "rand", lambda *size, u=u, generator: torch.full(size, u))
        assert gumbel_noise([noise_generator(0, 0)], 2, cpu).isfinite().all()


def test_a_image_has_noise_of_its_own():
    noise = [
        gumbel_noise([noise_generator(s, i)], 5, torch.device("cpu")) for s, i in ((0, 0), (0, 1), (1, 0))
    ]
    assert len({float(n[0, 0, 0]) for n in noise}) == 3
    together = gumbel_noise([noise_generator(0, 0), noise_generator(0, 1)], 5, torch.device("cpu"))
    assert torch.equal(together[:, 1], noise[1][:, 0]) and together.shape == (NOISE_CHUNK, 2, 5)


def test_fill_rows():
    ids = torch.arange(3)
    assert fill_rows(ids, 4).tolist() == [0, 1, 2, 2] and fill_rows(ids, 3) is ids


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.5},
        {"cfg_scale": -1.0},
    ],
)
def test_options_out_of_range_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SamplingOptions(**wrong)


@pytest.fixture(scope="module")
def model(generator_dir) -> Dalle:
    return Dalle.from_pretrained(generator_dir)


def texts(model: Dalle, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    config = model.config
    text = torch.randint(
        4, config.text_vocab_size, (batch_size, 12), generator=torch.Generator().manual_seed(3)
    )
    text[1:, 7:] = config.pad_id
    return text, sequence.null_captions(batch_size, 12, config.pad_id)


def draw(model, options: SamplingOptions, batch_size: int = 3, canvas: Canvas | None = None):
    text, null = texts(model, batch_size)
    generators = [noise_generator(5, i) for i in range(batch_size)]
    return sample_ids(TorchDecoder(model), text, null, generators, options, canvas)


@torch.no_grad()
def sample_uncached(model: Dalle, options: SamplingOptions, batch_size: int = 3) -> torch.Tensor:
    """The same draws by a full forward pass a token."""
    text, null = texts(model, batch_size)
    generators = [noise_generator(5, i) for i in range(batch_size)]
    ids = torch.zeros(batch_size, 100, dtype=torch.long)
    for n in range(100):
        if n % NOISE_CHUNK == 0:
            noise = gumbel_noise(generators, 24, torch.device("cpu"))
        with_text, without = model(text, ids).image[:, n], model(null, ids).image[:, n]
        scale = guidance_scale(n, 100, options.cfg_scale, options.cfg_schedule)
        ids[:, n] = choose(without + scale * (with_text - without), noise[n % NOISE_CHUNK], options)
    return ids


@pytest.mark.parametrize(
    "options",
    [
        SamplingOptions(cfg_scale=1.0),
        SamplingOptions(cfg_scale=2.5, cfg_schedule="linear", top_k=9),
        SamplingOptions(cfg_scale=2.0, cfg_schedule="cosine", temperature=0.8, top_p=0.9, min_p=0.02),
    ],
)
def test_cached_decoding_draws_what_uncached_passes_draw(model, options):
    assert torch.equal(draw(model, options).ids, sample_uncached(model, options))


def test_likelihoods_equal_those_of_a_full_pass(model):
    text, null = texts(model, 3)
    sampled = draw(model, SamplingOptions(cfg_scale=2.0, temperature=0.5, top_k=3))
    torch.testing.assert_close(
        sampled.log_likelihood, log_likelihood(model, text, sampled.ids), rtol=1e-4, atol=1e-3
    )
    torch.testing.assert_close(
        sampled.null_log_likelihood, log_likelihood(model, null, sampled.ids), rtol=1e-4, atol=1e-3
    )
    assert draw(model, SamplingOptions(cfg_scale=1.0)).null_log_likelihood is None


@pytest.mark.parametrize("keep_first", [0, 30, 70])
def test_kept_tokens_stay_and_steer_the_others(model, keep_first):
    options = SamplingOptions(cfg_scale=2.0)
    free = draw(model, options)
    keep = torch.zeros(3, 100, dtype=torch.bool)
    keep[:, :keep_first] = True
    keep[:, 80:90] = True
    same = draw(model, options, canvas=Canvas(free.ids, keep, keep_first))
    assert torch.equal(same.ids, free.ids)  # what would have been drawn anyway
    other = (free.ids + 1) % 24
    changed = draw(model, options, canvas=Canvas(other, keep, keep_first))
    assert torch.equal(changed.ids[keep], other[keep])
    assert not torch.equal(changed.ids[:, 90:], free.ids[:, 90:])
    text, _ = texts(model, 3)
    logits = model(text, changed.ids).image.log_softmax(-1).gather(-1, changed.ids[..., None])[..., 0]
    drawn = logits.masked_fill(keep, 0).sum(1)
    torch.testing.assert_close(changed.log_likelihood, drawn, rtol=1e-4, atol=1e-3)
