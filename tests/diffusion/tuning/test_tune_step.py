"""A training step of ours against the formulas of diffusers' train_text_to_image.py and train_text_to_image_lora.py."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from tiny_base import tiny_base

from common.distributed import batch_plan, start_world
from diffusion import finetune, train_lora
from diffusion.objective import ObjectiveConfig, sample_generator, sample_noise
from diffusion.tuning.denoiser import LossScale
from diffusion.tuning.step import drop_texts, sample_keys
from diffusion.tuning.task import TuneTask

SIDE, BATCH = 32, 4
TEXTS = {"bert": ["红色的鞋", "蓝色连衣裙", "一双黑鞋", ""], "clip": ["red shoe", "blue dress", "two", ""]}


class NoData:
    """What TuneTask asks of its data before the first step."""

    resolution = SIDE

    def first_texts(self, count):
        return ("a",)


def make_task(folder, text, prediction, gamma, offset, method):
    base = tiny_base(folder, text, prediction)
    script = finetune if method == "full" else train_lora
    options = script.Options(
        objective=ObjectiveConfig(min_snr_gamma=gamma, noise_offset=offset),
        caption_dropout=0.0,
        precision="fp32",
        device="cpu",
        **({"lora": train_lora.LoraOptions(dropout=0.0)} if method == "lora" else {}),
    )
    chosen = finetune.FullMethod if method == "full" else train_lora.LoraMethod
    prepared = chosen(options, base, SIDE)
    return TuneTask(options, start_world("cpu"), batch_plan(BATCH, 1), NoData(), base, prepared)


def example_loss(base, batch, noise, timesteps, latent_noise, gamma):
    """As the example script computes it, given what it would have sampled."""
    scheduler = DDPMScheduler.from_config(base.scheduler.config)
    posterior = base.vae.encode(batch["image"]).latent_dist
    latents = (posterior.mean + posterior.std * latent_noise) * base.vae.config.scaling_factor
    noisy = scheduler.add_noise(latents, noise, timesteps)
    ids = base.tokenizer(
        batch["text"],
        max_length=base.tokenizer.model_max_length,
        padding="max_length",
        truncation=True,
        return_tensors="pt",
    ).input_ids
    hidden = base.text_encoder(ids, return_dict=False)[0]
    if scheduler.config.prediction_type == "epsilon":
        target = noise
    else:
        target = scheduler.get_velocity(latents, noise, timesteps)
    prediction = base.unet(noisy, timesteps, hidden, return_dict=False)[0]
    if not gamma:
        return F.mse_loss(prediction.float(), target.float(), reduction="mean")
    snr = compute_snr(scheduler, timesteps)
    weights = torch.stack([snr, gamma * torch.ones_like(timesteps)], dim=1).min(dim=1)[0]
    weights = weights / (snr if scheduler.config.prediction_type == "epsilon" else snr + 1)
    loss = F.mse_loss(prediction.float(), target.float(), reduction="none")
    return (loss.mean(dim=list(range(1, len(loss.shape)))) * weights).mean()


@pytest.mark.parametrize("text", ["bert", "clip"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    ("gamma", "offset", "method"), [(0.0, 0.0, "full"), (5.0, 0.1, "full"), (5.0, 0.0, "lora")]
)
def test_a_step_is_that_of_the_example_script(tmp_path, text, prediction, gamma, offset, method):
    task = make_task(tmp_path, text, prediction, gamma, offset, method)
    generator = torch.Generator().manual_seed(1)
    batch = {
        "image": torch.rand(BATCH, 3, SIDE, SIDE, generator=generator) * 2 - 1,
        "text": TEXTS[text],
        "key": [f"k{i}" for i in range(BATCH)],
        "salt": [0] * BATCH,
    }
    step, keys = 3, sample_keys(batch)
    shape = (4, SIDE // 4, SIDE // 4)
    noise, timesteps = sample_noise(keys, shape, 1000, (0, step), offset)
    latent_noise = torch.stack(
        [torch.randn(shape, generator=sample_generator(f"0/{step}/{key}/latent")) for key in keys]
    )
    expected = example_loss(task.base, batch, noise, timesteps, latent_noise, gamma)
    trained = list(task.trained.values())
    gradients = torch.autograd.grad(expected, trained, allow_unused=True)
    norm = torch.stack([g.norm() for g in gradients if g is not None]).norm()
    metrics = task.train_step(batch, step)
    assert metrics["loss"] == pytest.approx(float(expected), abs=1e-5)
    assert metrics["grad_norm"] == pytest.approx(float(norm), rel=1e-4)


def test_half_of_the_captions_are_hidden():
    keys = [f"k{i}" for i in range(1000)]
    hidden = sum(text == "" for text in drop_texts(["a"] * 1000, keys, 0.3, (0, 1)))
    assert 250 < hidden < 350
    assert drop_texts(["a"] * 1000, keys, 0.3, (0, 1)) == drop_texts(["a"] * 1000, keys, 0.3, (0, 1))
    assert drop_texts(["a", "b"], ["x", "y"], 0.0, (0, 1)) == ["a", "b"]


def test_two_visits_of_an_image_have_different_noise():
    keys = sample_keys({"key": ["a", "a"], "salt": [1, 2]})
    noise, _ = sample_noise(keys, (4, 2, 2), 1000, (0, 0))
    assert not torch.equal(noise[0], noise[1])


def test_the_loss_scale_by_hand():
    weight = torch.nn.Parameter(torch.ones(2))
    scale = LossScale([weight], value=8.0, growth_steps=2)
    (weight.sum() * scale.value).backward()
    scale.unscale_()
    assert weight.grad.tolist() == [1.0, 1.0]
    assert not scale.update(float("inf")) and scale.value == 4.0
    assert scale.update(1.0) and scale.update(1.0) and scale.value == 8.0
    again = LossScale([weight])
    again.load_state(scale.state())
    assert (again.value, again.good) == (8.0, 2)
    with pytest.raises(ValueError, match="overflow in fp16 at any scale"):
        for _ in range(10):
            scale.update(float("nan"))
