import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, PNDMScheduler
from diffusers.training_utils import compute_snr

from diffusion.objective import NoiseSchedule, ObjectiveConfig, diffusion_loss, sample_noise

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def latents() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 4, 2, 3, 3, generator=generator)
    return clean, noise, torch.tensor([0, 10, 500, 998])


def test_noise_target_and_weights_by_hand():
    schedule = NoiseSchedule(torch.tensor([0.81, 0.36]), "v_prediction")
    x, noise, t = torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1), 3.0), torch.tensor([1])
    assert math.isclose(float(schedule.add_noise(x, noise, t)), 0.6 * 2 + 0.8 * 3, rel_tol=1e-6)
    assert math.isclose(float(schedule.target(x, noise, t)), 0.6 * 3 - 0.8 * 2, rel_tol=1e-6)
    snr = schedule.snr(torch.tensor([0, 1]))
    torch.testing.assert_close(snr, torch.tensor([0.81 / 0.19, 0.36 / 0.64]))
    torch.testing.assert_close(
        schedule.weights(torch.tensor([0, 1]), 2.0),
        torch.tensor([2.0 / (0.81 / 0.19 + 1), 0.5625 / 1.5625]),
    )
    epsilon = NoiseSchedule(schedule.alphas_cumprod, "epsilon")
    assert float(epsilon.target(x, noise, t)) == 3.0
    torch.testing.assert_close(
        epsilon.weights(torch.tensor([0, 1]), 2.0), torch.tensor([2.0 / (0.81 / 0.19), 1.0])
    )
    assert epsilon.weights(torch.tensor([0, 1]), 0).tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("prediction", "zero_snr"), [("epsilon", False), ("v_prediction", False), ("v_prediction", True)]
)
def test_formulas_of_diffusers(prediction, zero_snr):
    scheduler = DDPMScheduler(**SD, prediction_type=prediction, rescale_betas_zero_snr=zero_snr)
    schedule = NoiseSchedule.from_scheduler(scheduler)
    clean, noise, t = latents()
    torch.testing.assert_close(schedule.add_noise(clean, noise, t), scheduler.add_noise(clean, noise, t))
    expected = noise if prediction == "epsilon" else scheduler.get_velocity(clean, noise, t)
    torch.testing.assert_close(schedule.target(clean, noise, t), expected)
    snr = compute_snr(scheduler, t)
    torch.testing.assert_close(schedule.snr(t), snr, rtol=1e-4, atol=0)
    weights = torch.stack([snr, 5.0 * torch.ones_like(t)], dim=1).min(dim=1)[0]
    weights = weights / (snr if prediction == "epsilon" else snr + 1)
    torch.testing.assert_close(schedule.weights(t, 5.0), weights, rtol=1e-4, atol=0)
    # the loss of diffusers' train_text_to_image.py with --snr_gamma 5
    output = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    theirs = torch.nn.functional.mse_loss(output, expected, reduction="none").mean(dim=(1, 2, 3)) * weights
    torch.testing.assert_close(diffusion_loss(output, expected, schedule.weights(t, 5.0)), theirs.mean())


def test_every_solver_of_one_config_trains_alike():
    config = dict(SD, prediction_type="v_prediction")
    reference = NoiseSchedule.from_scheduler(DDPMScheduler(**config, rescale_betas_zero_snr=True))
    for kind in (DDIMScheduler, DPMSolverMultistepScheduler):
        schedule = NoiseSchedule.from_scheduler(kind(**config, rescale_betas_zero_snr=True))
        assert torch.equal(schedule.alphas_cumprod, reference.alphas_cumprod), kind
    plain = NoiseSchedule.from_scheduler(PNDMScheduler(**config))
    assert torch.equal(
        plain.alphas_cumprod, NoiseSchedule.from_scheduler(DDPMScheduler(**config)).alphas_cumprod
    )


def test_zero_terminal_snr_is_algorithm_1_of_lin_et_al():
    plain = NoiseSchedule.from_scheduler(DDPMScheduler(**SD)).alphas_cumprod.double().sqrt()
    shifted = (plain - plain[-1]) * plain[0] / (plain[0] - plain[-1])
    scheduler = DDPMScheduler(**SD, rescale_betas_zero_snr=True, prediction_type="v_prediction")
    schedule = NoiseSchedule.from_scheduler(scheduler)
    torch.testing.assert_close(schedule.alphas_cumprod.double(), shifted.square(), rtol=1e-3, atol=1e-6)
    assert float(schedule.alphas_cumprod[-1]) == 0.0
    clean, noise, _ = latents()
    last = torch.full((4,), 999)
    assert torch.equal(schedule.add_noise(clean, noise, last), noise)
    assert torch.equal(schedule.target(clean, noise, last), -clean)
    assert schedule.weights(last, 5.0).tolist() == [0.0] * 4


def test_epsilon_at_zero_snr_and_other_predictions_are_refused():
    with pytest.raises(ValueError, match="use v_prediction"):
        NoiseSchedule.from_scheduler(DDPMScheduler(**SD, rescale_betas_zero_snr=True))
    with pytest.raises(ValueError, match="'sample' is not supported"):
        NoiseSchedule.from_scheduler(DDPMScheduler(**SD, prediction_type="sample"))
    with pytest.raises(ValueError, match="min_snr_gamma must not be negative"):
        ObjectiveConfig(min_snr_gamma=-1)


def test_noise_of_a_sample_depends_on_seed_step_and_key_alone():
    noise, timesteps = sample_noise(["a", "b", "c"], (4, 8, 8), 1000, (0, 5))
    again, later = sample_noise(["c", "a"], (4, 8, 8), 1000, (0, 5))
    assert torch.equal(again, noise[[2, 0]])
    assert torch.equal(later, timesteps[[2, 0]])
    other, _ = sample_noise(["a"], (4, 8, 8), 1000, (0, 6))
    assert not torch.equal(other[0], noise[0])


def test_noise_is_normal_and_timesteps_are_uniform():
    noise, timesteps = sample_noise([str(i) for i in range(2000)], (4, 2, 2), 10, (3, 0))
    assert abs(float(noise.mean())) < 0.02
    assert abs(float(noise.std()) - 1) < 0.02
    assert (torch.bincount(timesteps, minlength=10) - 200).abs().max() < 60


def test_the_offset_is_one_number_an_image_and_channel():
    plain, _ = sample_noise(["a", "b"], (4, 8, 8), 1000, (0, 0))
    offset, _ = sample_noise(["a", "b"], (4, 8, 8), 1000, (0, 0), offset=0.1)
    extra = offset - plain
    torch.testing.assert_close(extra, extra[:, :, :1, :1].expand_as(extra), rtol=0, atol=1e-6)
    values = sample_noise([str(i) for i in range(500)], (4, 1, 1), 10, (0, 0), 0.1)[0]
    values = values - sample_noise([str(i) for i in range(500)], (4, 1, 1), 10, (0, 0))[0]
    assert abs(float(values.std()) - 0.1) < 0.01


def test_the_loss_is_float32_whatever_comes_in():
    a, b = torch.full((2, 1, 1, 1), 1.0, dtype=torch.bfloat16), torch.zeros(2, 1, 1, 1)
    loss = diffusion_loss(a, b, torch.tensor([1.0, 3.0]))
    assert loss.dtype == torch.float32
    assert float(loss) == 2.0
