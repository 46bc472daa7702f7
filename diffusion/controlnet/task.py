"""One training step of a ControlNet on latents with drawings (Zhang et al. 2023, section 3.3)."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from common import checkpoint
from common.distributed import BatchPlan, World
from common.files import write_json
from common.image import make_grid
from common.optim import learning_rate
from common.precision import autocast
from common.training_state import TrainingState, require_same_config
from data_tools.shards.captions import hides_caption, uniform
from diffusion.base import DiffusionBase
from diffusion.controlnet.model import FOLDER, KIND, ControlledDenoiser, to_hint
from diffusion.controlnet.options import Options
from diffusion.controlnet.pipeline import ControlPipeline, Prompting
from diffusion.objective import NoiseSchedule, diffusion_loss, sample_noise
from diffusion.sampling import SamplingOptions
from diffusion.scratch.latents import sample_posterior
from diffusion.text import text_conditions

SHOWN = 4  # drawings of a sample grid


@dataclass(frozen=True)
class Pairs:
    """What the task reads beside the options."""

    world: World
    plan: BatchPlan
    base: DiffusionBase
    controlnet: torch.nn.Module
    image_size: int
    val_batches: Callable[[int], Iterator[dict[str, Any]]]
    """The first n validation pairs, in batches: moments, line, text, key."""


class ControlTask:
    """What `common.loop.fit` drives."""

    validation_metric = "loss"

    def __init__(self, options: Options, pairs: Pairs) -> None:
        torch.manual_seed(options.loop.seed)
        self.options, self.pairs, self.base = options, pairs, pairs.base
        self.world, self.plan = pairs.world, pairs.plan
        self.schedule = NoiseSchedule.from_scheduler(self.base.scheduler)
        side = pairs.image_size // self.base.downsample_factor
        self.latent_shape = (self.base.latent_channels, side, side)
        model = self._build().train()
        self.finished = self._build().eval().requires_grad_(False)
        how = (self.world, self.plan, options.ema_decay, options.engine, options.deepspeed)
        self.training = TrainingState(model, options.optim, *how)
        self.engine = self.training.engine

    def _build(self) -> ControlledDenoiser:
        locked = self.options.sd_locked
        unet = self.base.unet if locked else copy.deepcopy(self.base.unet)
        controlnet = copy.deepcopy(self.pairs.controlnet)
        return ControlledDenoiser(controlnet, unet, locked).to(self.world.device)

    def train_step(self, batch: dict[str, Any], step: int) -> dict[str, float]:
        options = self.options
        lr = learning_rate(options.optim, step, options.loop.num_steps)
        self.engine.set_lr(lr)
        salt = (options.loop.seed, step)
        keys = batch["key"]
        hidden = [hides_caption(key, options.caption_dropout, salt) for key in keys]
        inputs = self._noised(batch["moments"], keys, salt, options.objective.noise_offset)
        inputs["line"] = hide_lines(batch["line"], keys, options.line_dropout, salt)
        inputs["row"] = torch.arange(len(keys))
        totals: dict[str, float] = {}
        for micro in self.engine.micro_batches(inputs, self.plan.accumulation):
            texts = ["" if hidden[i] else self._prompt(batch["text"][i]) for i in micro.pop("row").tolist()]
            micro = {name: value.to(self.world.device) for name, value in micro.items()}
            with autocast(self.world.device, options.precision):
                prediction = self.engine.model(*self._inputs(micro, texts))
            weights = self.schedule.weights(micro["timesteps"], options.objective.min_snr_gamma)
            loss = diffusion_loss(prediction, micro["target"], weights)
            self.engine.backward(loss)
            totals["loss"] = totals.get("loss", 0.0) + float(loss.detach()) / self.plan.accumulation
        totals["grad_norm"] = self.engine.step()
        self.training.update_average()
        return totals | {"lr": lr}

    def _prompt(self, text: str) -> str:
        return text + self.options.prompt_suffix

    def _inputs(self, micro: dict[str, Tensor], texts: list[str]) -> tuple[Tensor, ...]:
        """Noisy latents, timesteps, conditions and drawings, as the model takes them."""
        base = self.base
        conditions = text_conditions(base.text_encoder, base.tokenizer, texts, base.text_len)
        return micro["noisy"], micro["timesteps"], conditions, to_hint(micro["line"])

    def _noised(
        self, moments: Tensor, keys: list[str], salt: tuple[int, int], offset: float = 0.0
    ) -> dict[str, Tensor]:
        """Moments (B, 2C, h, w) -> noisy latents, timesteps and target, on the CPU."""
        steps = self.schedule.num_timesteps
        noise, timesteps = sample_noise(keys, self.latent_shape, steps, salt, offset)
        posterior_noise, _ = sample_noise([f"{key}/posterior" for key in keys], self.latent_shape, 1, salt)
        latents = sample_posterior(moments, posterior_noise)
        return {
            "noisy": self.schedule.add_noise(latents, noise, timesteps),
            "timesteps": timesteps,
            "target": self.schedule.target(latents, noise, timesteps),
        }

    @torch.no_grad()
    def evaluate(self, step: int) -> dict[str, float]:
        """Error over the validation pairs, always at the same noise and timesteps; `line_gain`: by what share it grows
        where the drawing is empty."""
        self.training.load_saved_weights_(self.finished)
        sums = torch.zeros(3, dtype=torch.float64)  # error, error without drawings, samples
        for number, batch in enumerate(self.pairs.val_batches(self.options.val_samples)):
            if number % self.world.size != self.world.rank:
                continue
            inputs = self._noised(batch["moments"], batch["key"], (0, -1)) | {"line": batch["line"]}
            inputs = {n: v.to(self.world.device) for n, v in inputs.items()}
            texts = [self._prompt(text) for text in batch["text"]]
            for row, lines in enumerate((inputs["line"], torch.zeros_like(inputs["line"]))):
                with autocast(self.world.device, self.options.precision):
                    prediction = self.finished(*self._inputs(inputs | {"line": lines}, texts))
                sums[row] += float(diffusion_loss(prediction, inputs["target"])) * len(texts)
            sums[2] += len(texts)
        error, bare, count = self.world.sum_(sums.to(self.world.device)).tolist()
        return {"loss": error / count, "line_gain": bare / error - 1.0}

    @torch.no_grad()
    def sample(self, step: int) -> dict[str, Image.Image]:
        """A row for each of the first validation drawings: the drawing, then images of its title that follow it."""
        options = self.options
        self.training.load_saved_weights_(self.finished)
        if not self.world.is_main or not options.sample_images:
            return {}
        prompting = Prompting(options.prompt_suffix, options.negative)
        base = replace(self.base, unet=self.finished.unet)
        pipeline = ControlPipeline(base, self.finished.controlnet, prompting, self.pairs.image_size)
        sampling = SamplingOptions(num_steps=options.num_steps, cfg_scale=options.guidance, scheduler="ddim")
        batch = next(iter(self.pairs.val_batches(SHOWN)))
        cells: list[Image.Image] = []
        for text, lines in zip(batch["text"][:SHOWN], batch["line"][:SHOWN, 0].numpy(), strict=True):
            made = pipeline(text, lines, options.sample_images, options.loop.seed, sampling)
            cells += [Image.fromarray(lines).convert("RGB"), *made]
        return {"samples": make_grid(cells, columns=1 + options.sample_images)}

    def state(self) -> dict[str, Any]:
        return {"config": self._config()} | self.training.state()

    def _config(self) -> dict[str, Any]:
        """What weights and checkpoints belong to."""
        o = self.options
        return {
            "base": str(self.base.path),
            "image_size": self.pairs.image_size,
            "sd_locked": o.sd_locked,
            "prompt_suffix": o.prompt_suffix,
            "negative": o.negative,
            "lines": o.lines,
        }

    def save(self, directory: Path, step: int, state: dict[str, Any]) -> None:
        """controlnet/ in diffusers' layout, unet/ too where its decoder was trained, and config.json."""
        self.finished.load_state_dict(self.training.saved_weights(state))
        self.finished.controlnet.save_pretrained(str(directory / FOLDER))
        if not self.options.sd_locked:
            self.finished.unet.save_pretrained(str(directory / "unet"))
        values = {"format": checkpoint.FORMAT, "kind": KIND, "model": state["config"], "step": step}
        write_json(directory / "config.json", values | {"versions": {"torch": torch.__version__}})

    def load_state(self, state: dict[str, Any]) -> None:
        """Raises ValueError when the run directory holds a ControlNet of another base or recipe."""
        run_dir = self.options.loop.run_dir
        require_same_config(run_dir, state["config"], self._config(), "a ControlNet")
        self.training.load_state(state, run_dir)


def hide_lines(lines: Tensor, keys: list[str], share: float, salt: tuple[int, int]) -> Tensor:
    """(B, 1, S, S) uint8 with about `share` of the drawings empty; salt: (seed, step)."""
    if not share:
        return lines
    kept = torch.tensor([uniform(f"{salt[0]}/{salt[1]}/{key}/drawing") >= share for key in keys])
    return lines * kept[:, None, None, None].to(lines.dtype)
