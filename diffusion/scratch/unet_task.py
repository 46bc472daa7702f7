"""Stage C: one training step of the text encoder and the UNet on latents."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from common import checkpoint
from common.config import to_mapping
from common.distributed import BatchPlan, World
from common.files import write_json
from common.image import make_grid, to_image
from common.optim import learning_rate
from common.precision import autocast
from common.training_state import TrainingState, require_same_config
from data_tools.shards.captions import hides_caption
from diffusion.base import KIND, DiffusionBase, base_sha256, save_base
from diffusion.objective import NoiseSchedule, diffusion_loss, sample_generator, sample_noise
from diffusion.sampling import SamplingOptions, make_scheduler, sample_latents
from diffusion.scratch.latents import sample_posterior
from diffusion.scratch.options import Options
from diffusion.text import count_truncated, encode_texts, hidden_states

NUM_TIMESTEPS = 1000


class Denoiser(nn.Module):
    """Text encoder and UNet as one module: noisy latents, timesteps and text ids -> prediction."""

    def __init__(self, unet: nn.Module, text_encoder: nn.Module) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, latents: Tensor, timesteps: Tensor, text_ids: Tensor) -> Tensor:
        """(B, C, h, w), (B,) long and (B, T) long -> (B, C, h, w)."""
        conditions = self.text_encoder(text_ids, attention_mask=None)[0]  # (B, T, D)
        return self.unet(latents, timesteps, conditions).sample  # (B, C, h, w)


def make_base_scheduler(prediction: str, zero_snr: bool) -> Any:
    """The scheduler of a new base: Stable Diffusion's betas, DPM-Solver++."""
    from diffusers import DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler(
        num_train_timesteps=NUM_TIMESTEPS,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction,
        rescale_betas_zero_snr=zero_snr,
        timestep_spacing="trailing",
        steps_offset=1,  # unused with this spacing, and StableDiffusionPipeline warns of anything else
    )


@dataclass(frozen=True)
class StageC:
    """What the task needs beside the options."""

    world: World
    plan: BatchPlan
    vae: nn.Module
    vae_sha256: str
    tokenizer: Any
    val_batches: Callable[[int], Iterator[dict[str, Any]]]
    """The first n validation samples, in batches: moments, text, key."""
    sample_texts: tuple[str, ...]
    hours_before: float
    """Of training in the stages before, which config.json adds to those of this one."""


class UnetTask:
    """What `common.loop.fit` drives."""

    validation_metric = "loss"

    def __init__(self, options: Options, stage: StageC) -> None:
        torch.manual_seed(options.loop.seed)
        self.options, self.stage = options, stage
        self.world, self.plan = stage.world, stage.plan
        self.scheduler = make_base_scheduler(options.prediction, options.zero_snr)
        self.schedule = NoiseSchedule.from_scheduler(self.scheduler)
        self.latent_shape = (
            options.autoencoder.latent_channels,
            options.autoencoder.latent_size,
            options.autoencoder.latent_size,
        )
        model = self._build().train()
        how = (self.world, self.plan, options.ema_decay, options.engine, options.deepspeed)
        self.training = TrainingState(model, options.optim, *how)
        self.engine = self.training.engine
        self.finished = self._build().eval().requires_grad_(False)
        self.seconds = 0.0  # of training steps, over all starts of the run

    def _build(self) -> Denoiser:
        options = self.options
        unet = options.unet.build(options.autoencoder, options.text.dim)
        model = Denoiser(unet, options.text.build(self.stage.tokenizer))
        return model.to(
            self.world.device
        )  # activations alone are channels_last: DeepSpeed broadcasts plain strides

    def train_step(self, batch: dict[str, Any], step: int) -> dict[str, float]:
        options, started = self.options, time.perf_counter()
        lr = learning_rate(options.optim, step, options.loop.num_steps)
        self.engine.set_lr(lr)
        salt = (options.loop.seed, step)
        texts = self._hide(batch["text"], batch["key"], salt)
        inputs = self._noised(batch["moments"], batch["key"], salt, options.objective.noise_offset)
        inputs["text_ids"] = encode_texts(self.stage.tokenizer, texts, options.text.text_len)
        totals: dict[str, float] = {}
        for micro in self.engine.micro_batches(inputs, self.plan.accumulation):
            micro = {name: value.to(self.world.device) for name, value in micro.items()}
            noisy = micro["noisy"].contiguous(memory_format=torch.channels_last)
            with autocast(self.world.device, options.precision):
                prediction = self.engine.model(noisy, micro["timesteps"], micro["text_ids"])
            weights = self.schedule.weights(micro["timesteps"], options.objective.min_snr_gamma)
            loss = diffusion_loss(prediction, micro["target"], weights)
            self.engine.backward(loss)
            with torch.no_grad():
                metrics = {"loss": loss, "mse": diffusion_loss(prediction, micro["target"])}
            for name, value in metrics.items():
                totals[name] = totals.get(name, 0.0) + float(value.detach()) / self.plan.accumulation
        totals["grad_norm"] = self.engine.step()
        self.training.update_average()
        self.seconds += time.perf_counter() - started
        return totals | {"lr": lr}

    def _hide(self, texts: list[str], keys: list[str], salt: tuple[int, int]) -> list[str]:
        """The texts, "" where the caption is hidden at this step."""
        share = self.options.caption_dropout
        return ["" if hides_caption(k, share, salt) else t for t, k in zip(texts, keys, strict=True)]

    def _noised(
        self, moments: Tensor, keys: list[str], salt: tuple[int, int], offset: float = 0.0
    ) -> dict[str, Tensor]:
        """Moments (B, 2C, h, w) -> noisy latents, timesteps and target, on the CPU."""
        noise, timesteps = sample_noise(keys, self.latent_shape, NUM_TIMESTEPS, salt, offset)
        posterior_keys = [f"{key}/posterior" for key in keys]
        posterior_noise, _ = sample_noise(posterior_keys, self.latent_shape, 1, salt)
        latents = sample_posterior(moments, posterior_noise)
        return {
            "noisy": self.schedule.add_noise(latents, noise, timesteps),
            "timesteps": timesteps,
            "target": self.schedule.target(latents, noise, timesteps),
        }

    @torch.no_grad()
    def evaluate(self, step: int) -> dict[str, float]:
        """Unweighted error over the validation samples, dealt over processes, always at the same noise and timesteps;
        `text_gain`: by what share it grows where the caption is hidden."""
        self.training.load_saved_weights_(self.finished)
        sums = torch.zeros(3, dtype=torch.float64)  # error, error without text, samples
        for number, batch in enumerate(self.stage.val_batches(self.options.val_samples)):
            if number % self.world.size != self.world.rank:
                continue
            inputs = {
                n: v.to(self.world.device)
                for n, v in self._noised(batch["moments"], batch["key"], (0, -1)).items()
            }
            count = len(batch["text"])
            for row, texts in enumerate((batch["text"], [""] * count)):
                ids = encode_texts(self.stage.tokenizer, texts, self.options.text.text_len)
                with autocast(self.world.device, self.options.precision):
                    prediction = self.finished(
                        inputs["noisy"], inputs["timesteps"], ids.to(self.world.device)
                    )
                sums[row] += float(diffusion_loss(prediction, inputs["target"])) * count
            sums[2] += count
        error, null_error, count = self.world.sum_(sums.to(self.world.device)).tolist()
        return {"loss": error / count, "text_gain": null_error / error - 1.0}

    @torch.no_grad()
    def sample(self, step: int) -> dict[str, Image.Image]:
        """A row of images a caption, sampled as diffusion.generate samples them."""
        options, stage = self.options, self.stage
        self.training.load_saved_weights_(self.finished)
        if not self.world.is_main or not options.sample_images:
            return {}
        sampling = SamplingOptions(cfg_scale=options.guidance)
        images = []
        for text in stage.sample_texts:
            noise = torch.stack(
                [
                    torch.randn(self.latent_shape, generator=sample_generator(f"{options.loop.seed}/{i}"))
                    for i in range(options.sample_images)
                ]
            )
            scheduler = make_scheduler(sampling.scheduler, self.scheduler)
            ids = encode_texts(stage.tokenizer, [text, ""], options.text.text_len)
            with autocast(self.world.device, options.precision):
                states = hidden_states(self.finished.text_encoder, ids).repeat_interleave(len(noise), 0)
                latents = sample_latents(
                    lambda x, t, c: self.finished.unet(x, t, c).sample,
                    scheduler,
                    noise.to(self.world.device),
                    *states.chunk(2),
                    sampling,
                )
                pixels = stage.vae.decode(latents / stage.vae.config.scaling_factor).sample
            images += [to_image(p) for p in pixels.float().cpu()]
        return {"samples": make_grid(images, columns=options.sample_images)}

    def state(self) -> dict[str, Any]:
        own = {"config": self._config(), "vae": self.stage.vae_sha256, "seconds": self.seconds}
        return own | self.training.state()

    def _config(self) -> dict[str, Any]:
        """Sizes that weights and objective depend on."""
        options = self.options
        text = to_mapping(options.text) | {"vocab_size": len(self.stage.tokenizer)}
        del text["vocab"], text["dropout"]
        return {
            "unet": to_mapping(options.unet),
            "autoencoder": to_mapping(options.autoencoder),
            "text": text,
            "prediction": options.prediction,
            "zero_snr": options.zero_snr,
        }

    def save(self, directory: Path, step: int, state: dict[str, Any]) -> None:
        """A StableDiffusionPipeline folder, and config.json with what it cost."""
        weights = self.training.saved_weights(state)
        whole = self._build().eval()
        whole.load_state_dict(weights)
        text_len, tokenizer = self.options.text.text_len, self.stage.tokenizer
        base = DiffusionBase(
            self.stage.vae,
            whole.text_encoder,
            tokenizer,
            whole.unet,
            self.scheduler,
            text_len,
            "",
            directory,
        )
        save_base(base, directory)
        write_model_config(directory, state, step, self._costs(step, base))

    def _costs(self, step: int, base: DiffusionBase) -> dict[str, Any]:
        parts = ("vae", "text_encoder", "unet")
        return {
            "parameters": {n: sum(p.numel() for p in getattr(base, n).parameters()) for n in parts},
            "training_hours": round(self.stage.hours_before + self.seconds / 3600, 4),
            "images_seen": step * self.plan.global_batch_size,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Raises ValueError when the run directory holds another model or latents of another autoencoder."""
        run_dir = self.options.loop.run_dir
        require_same_config(run_dir, state["config"], self._config())
        if state["vae"] != self.stage.vae_sha256:
            raise ValueError(
                f"{run_dir} was trained on the latents of another autoencoder: choose another --loop.run-dir"
            )
        self.training.load_state(state, run_dir)
        self.seconds = float(state["seconds"])


def write_model_config(directory: Path, state: dict[str, Any], step: int, costs: dict[str, Any]) -> None:
    """config.json of a folder of kind `diffusion`: what it is, and what its training took."""
    sha256 = base_sha256(directory)
    values = {"format": checkpoint.FORMAT, "kind": KIND, "model": state["config"], "step": step}
    write_json(
        directory / "config.json",
        values | {"sha256": sha256, "versions": {"torch": torch.__version__}} | costs,
    )


def describe(task: UnetTask, num_samples: int, captions: list[str]) -> str:
    """One line on what is about to be trained."""
    unet = sum(p.numel() for p in task.finished.unet.parameters()) / 1e6
    text = sum(p.numel() for p in task.finished.text_encoder.parameters()) / 1e6
    cut = count_truncated(task.stage.tokenizer, captions, task.options.text.text_len)
    return (
        f"{num_samples} samples, UNet {unet:.1f}M and text encoder {text:.1f}M parameters, latents "
        f"{'x'.join(map(str, task.latent_shape))}, {cut} of {len(captions)} captions too long and cut"
    )
