import pytest
import torch
from diffusers import StableDiffusionPipeline
from tiny_base import tiny_base

from diffusion.base import make_pipeline
from diffusion.sampling import SCHEDULER_CLASSES, SamplingOptions, guide, make_scheduler, sample_latents
from diffusion.text import text_conditions


def run(base, options, noise, start=None, strength=1.0):
    states = text_conditions(base.text_encoder, base.tokenizer, ["红色的鞋", ""], base.text_len)
    conditions, null = (s.expand(len(noise), -1, -1) for s in states.chunk(2))
    with torch.no_grad():
        return sample_latents(
            lambda x, t, c: base.unet(x, t, c).sample,
            make_scheduler(options.scheduler, base.scheduler),
            noise,
            conditions,
            null,
            options,
            start,
            strength,
        )


@pytest.mark.parametrize("name", list(SCHEDULER_CLASSES))
def test_the_loop_is_that_of_diffusers(name, tmp_path):
    """For every solver, with guidance and rescaling, from the same noise."""
    base = tiny_base(tmp_path, prediction="v_prediction", zero_snr=name != "pndm")
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    options = SamplingOptions(num_steps=4, cfg_scale=3.0, cfg_rescale=0.7, scheduler=name)
    pipeline = make_pipeline(base)
    pipeline.scheduler = make_scheduler(name, base.scheduler)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        ["红色的鞋"] * 2,
        num_inference_steps=4,
        guidance_scale=3.0,
        guidance_rescale=0.7,
        latents=noise.clone(),
        output_type="latent",
    ).images
    torch.testing.assert_close(run(base, options, noise), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["dpm++", "ddim", "euler"])
def test_img2img_is_that_of_diffusers(name, tmp_path):
    from diffusers import StableDiffusionImg2ImgPipeline

    base = tiny_base(tmp_path)
    generator = torch.Generator().manual_seed(0)
    start, noise = torch.randn(2, 1, 4, 16, 16, generator=generator)
    options = SamplingOptions(num_steps=5, cfg_scale=3.0, scheduler=name)
    parts = make_pipeline(base).components
    parts["scheduler"] = make_scheduler(name, base.scheduler)
    pipeline = StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.prepare_latents = lambda image, t, *_: pipeline.scheduler.add_noise(start, noise, t)
    theirs = pipeline(
        "红色的鞋", start, strength=0.6, num_inference_steps=5, guidance_scale=3.0, output_type="latent"
    ).images
    torch.testing.assert_close(run(base, options, noise, start, 0.6), theirs, rtol=1e-4, atol=1e-4)


def test_guidance_by_hand():
    null, conditional = torch.zeros(1, 1, 1, 2), torch.tensor([[[[1.0, -1.0]]]])
    assert guide(null, conditional, SamplingOptions(cfg_scale=3.0)).flatten().tolist() == [3.0, -3.0]
    rescaled = guide(null, conditional, SamplingOptions(cfg_scale=3.0, cfg_rescale=1.0))
    torch.testing.assert_close(rescaled.flatten(), torch.tensor([1.0, -1.0]))


def test_bad_options():
    for bad in (
        {"num_steps": 0},
        {"cfg_scale": 0.5},
        {"cfg_rescale": 2},
        {"cfg_scale": 1.0, "cfg_rescale": 0.5},
    ):
        with pytest.raises(ValueError, match=r"must|needs guidance"):
            SamplingOptions(**bad)


def test_pndm_is_refused_on_zero_terminal_snr(tmp_path):
    base = tiny_base(tmp_path, prediction="v_prediction", zero_snr=True)
    with pytest.raises(ValueError, match="pndm cannot sample from a base of zero terminal SNR"):
        make_scheduler("pndm", base.scheduler)
    assert isinstance(make_pipeline(base), StableDiffusionPipeline)
