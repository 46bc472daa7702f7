"""One training step of the GAN: both networks from the same images, each by its own optimizer.

Generated images go through the trunk once. Its outputs are cut off there: the discriminator learns from them, the
gradient of the generator's loss by them goes back through the trunk to the generator. Both see the discriminator before
its update.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from common import checkpoint
from common.config import to_mapping
from common.distributed import BatchPlan, World
from common.engine import make_engine
from common.image import make_grid, to_image
from common.log import say
from common.optim import Ema, OptimConfig, adamw, learning_rate
from common.precision import autocast
from common.training_state import require_same_average, require_same_config
from gan.augment import Strength, augment, uniform
from gan.conditions import Condition
from gan.data import TrainData, known_captions
from gan.discriminator import Discriminator, make_trunk, others_of, r1_penalty
from gan.evaluation import Evaluation
from gan.losses import matching_aware_loss, sameness
from gan.model import KIND
from gan.options import Options
from gan.pipeline import GanConfig, GanModel, build_model, with_first_map
from gan.text import FOLDER, load_ranker_weights, ranker_text, tokens_of
from vq.losses.reconstruction import generator_loss

FIT_IMAGES = 256  # from which the variances of Haar bands are read


class GanTask:
    """What `common.loop.fit` drives."""

    validation_metric = "frechet_distance"

    def __init__(self, options: Options, world: World, plan: BatchPlan, data: TrainData) -> None:
        if options.sameness_weight and plan.micro_batch_size < 2:
            raise ValueError(
                "sameness_weight compares images of a micro-batch, which must hold at least 2, not 1"
            )
        torch.manual_seed(options.loop.seed)
        self.options, self.world, self.plan, self.data = options, world, plan, data
        self.is_frozen = bool(options.text.ranker)
        text_dim = options.text.embed_dim
        if self.is_frozen:
            text_dim = ranker_text(checkpoint.resolve(options.text.ranker))[1]
        self.config = GanConfig(options.generator, text_dim, data.labels, options.caption_dropout)
        self.model = build_model(self.config, data.text_folder).to(world.device)
        if self.is_frozen:
            load_ranker_weights(self.model.text, checkpoint.resolve(options.text.ranker))
            self.model.text.requires_grad_(False)
        self.generator, self.text = self.model.generator, self.model.text
        self.trunk = make_trunk(options.discriminator, options.generator.img_size, options.loop.seed)
        some = next(data.plain_batches(data.train, FIT_IMAGES, FIT_IMAGES))["image"]
        self.trunk.fit_scale(some)
        self.trunk.to(world.device, memory_format=torch.channels_last)
        discriminator = Discriminator(options.discriminator, self.trunk, self.text, len(data.labels))
        self.discriminator = discriminator.to(world.device, memory_format=torch.channels_last)
        self._train_mode()
        self._center_texts()
        self.g = self._engine(self.generator, options.optim)
        d_optim = OptimConfig(
            lr=options.discriminator.lr,
            beta1=options.optim.beta1,
            beta2=options.optim.beta2,
            weight_decay=options.optim.weight_decay,
        )
        self.d = self._engine(self.discriminator, d_optim)
        self.ema = Ema(self.model, options.ema_decay) if options.ema_decay else None
        self.finished = build_model(self.config, data.text_folder).to(world.device).eval()
        self.strength = Strength(options.d_augment, plan.global_batch_size)
        self.samples = data.sample_conditions(options.sample_texts, 8)
        self.evaluation = Evaluation(self)

    @torch.no_grad()
    def _center_texts(self) -> None:
        """Both networks read captions around the mean of the training captions, where the tower does not change."""
        texts = known_captions(self.data.train, self.data.tokenizer, 2000) if self.is_frozen else []
        if texts and self.config.generator.first_map == "noise":
            ids = tokens_of(self.data.tokenizer, texts).to(self.world.device)
            mean = torch.cat([self.text(part) for part in ids.split(100)]).mean(0)
            self.generator.text_mean.copy_(mean)
            self.discriminator.text_mean.copy_(mean)

    def _engine(self, model: torch.nn.Module, optim: OptimConfig) -> Any:
        clip = self.options.optim.grad_clip
        return make_engine(model, adamw(model, optim), self.world, self.plan, clip, name="plain")

    def _train_mode(self) -> None:
        self.discriminator.train()
        if self.is_frozen:
            self.text.eval()

    # ------------------------------------------------------------------------------------------------------- a step

    def train_step(self, batch: dict[str, Any], step: int) -> dict[str, float]:
        options = self.options
        lr = learning_rate(options.optim, step, options.loop.num_steps)
        self.g.set_lr(lr)
        self.d.set_lr(options.discriminator.lr * lr / options.optim.lr)
        batch = batch | self._random_numbers(step)
        totals: dict[str, float] = {}
        parts = self.plan.accumulation
        both = zip(self.g.micro_batches(batch, parts), self.d.micro_batches(batch, parts), strict=True)
        for micro, _ in both:
            for name, value in self._micro_step(micro, step).items():
                totals[name] = totals.get(name, 0.0) + value / parts
        totals |= {"d_grad_norm": self.d.step(), "g_grad_norm": self.g.step(), "lr": lr}
        if self.ema:
            self.ema.update(self.model)
        totals["augment_p"] = self.strength.p
        self.strength.follow(self.world.mean({"sign": totals["sign_real"]})["sign"])
        return totals

    def _random_numbers(self, step: int) -> dict[str, Tensor]:
        """This process's share of those of the global batch: the same on any number of processes."""
        size, share = self.plan.global_batch_size, self.plan.rank_batch_size
        generator = torch.Generator().manual_seed(self.options.loop.seed * 1_000_003 + step)
        found = {
            "z": torch.randn(size, self.config.generator.z_dim, generator=generator),
            "u_real": uniform(size, generator),
            "u_fake": uniform(size, generator),
            "u_drop": torch.rand(size, 2, generator=generator),
        }
        first = self.world.rank * share
        return {name: value[first : first + share] for name, value in found.items()}

    def _micro_step(self, micro: dict[str, Any], step: int) -> dict[str, float]:
        """Gradients of both networks from one micro-batch; the means of what is logged."""
        options, device = self.options, self.world.device
        condition = self.conditions(micro["text"], micro["label"], micro["u_drop"])
        shown = zip(micro["text"], condition.labels.tolist(), condition.has_text.tolist(), strict=True)
        others, has_other = others_of([(text if has else "", label) for text, label, has in shown])
        with torch.no_grad(), autocast(device, options.precision):
            text = self.text_vectors(condition.text_ids)
            real = augment(micro["image"].to(device), micro["u_real"], self.strength.p)
            real_inputs = self.trunk(real)
        with autocast(device, options.precision):
            images = self.g.model(micro["z"].to(device), text, condition.labels, condition.has_text)
            outputs = self.trunk(augment(images, micro["u_fake"], self.strength.p))
            same, same_metrics = self._sameness(images, micro, text, condition)
            fake_inputs = [x.detach().requires_grad_() for x in outputs]
            logits = self.d.model(real_inputs, fake_inputs, *condition, others.to(device))
        gen_loss = generator_loss(options.loss, logits.fake)
        gradients = torch.autograd.grad(gen_loss, fake_inputs, retain_graph=True)
        weight = options.discriminator.mismatch_weight
        disc_loss = matching_aware_loss(options.loss, logits, has_other.to(device), weight)
        extra, metrics = self._r1(real_inputs, condition, step)
        self.d.backward(disc_loss + extra)
        # Its value means nothing; its gradient by `outputs` is `gradients`.
        by_outputs = sum((x.float() * g.float()).sum() for x, g in zip(outputs, gradients, strict=True))
        self.g.backward(by_outputs + same)
        metrics |= same_metrics
        metrics |= {"gen_loss": gen_loss, "disc_loss": disc_loss, "sign_real": logits.real.sign().mean()}
        metrics |= {"logits_real": logits.real.mean(), "logits_fake": logits.fake.mean()}
        metrics["logits_mismatched"] = logits.mismatched.mean()
        return {name: float(value.detach()) for name, value in metrics.items()}

    def _sameness(
        self, images: Tensor, micro: dict[str, Any], text: Tensor, condition: Condition
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The term against images of one caption that are alike, and what is logged of it: the first images of the
        micro-batch once more from the noise of the last."""
        options, device = self.options, self.world.device
        if not options.sameness_weight:
            return torch.zeros((), device=device), {}
        pairs = len(images) // 2
        z, rows = micro["z"][-pairs:].to(device), (text, condition.labels, condition.has_text)
        again = self.generator(z, *(x[:pairs] for x in rows))
        loss, distance = sameness(images[:pairs], again, micro["image"].to(device), options.least_difference)
        return options.sameness_weight * loss, {"difference": distance}

    def conditions(self, texts: list[str], labels: Tensor, u_drop: Tensor | None = None) -> Condition:
        """On the device. `u_drop` (B, 2) in [0, 1): which captions and categories are hidden; None: none."""
        text_ids = tokens_of(self.data.tokenizer, texts)
        has_text = torch.tensor([bool(text.strip()) for text in texts])
        if u_drop is not None:
            has_text &= u_drop[:, 0] >= self.options.caption_dropout
            labels = torch.where(u_drop[:, 1] < self.options.label_dropout, 0, labels)
        device = self.world.device
        return Condition(text_ids.to(device), labels.to(device), has_text.to(device))

    @torch.no_grad()
    def text_vectors(self, text_ids: Tensor) -> Tensor:
        """(B, D) of the tower as it is now, without dropout: what the generator reads."""
        self.text.eval()
        vectors = self.text(text_ids)
        self.text.train(not self.is_frozen)
        return vectors

    def _r1(self, inputs: list[Tensor], condition: Condition, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The R1 term of this step, in float32, and what is logged of it."""
        config = self.options.discriminator
        if not config.r1_weight or step % config.r1_every:
            return torch.zeros((), device=self.world.device), {}
        leaves = [x.detach().float().requires_grad_() for x in inputs]
        with torch.autocast(self.world.device.type, enabled=False):
            vectors = self.text_vectors(condition.text_ids)
            embedded = self.discriminator.embed(vectors, condition.labels, condition.has_text)
            penalty = r1_penalty(self.discriminator.score(leaves, embedded), leaves)
        return 0.5 * config.r1_weight * config.r1_every * penalty, {"r1": penalty}

    # ---------------------------------------------------------------------------------------- evaluation and grids

    def finish_weights(self) -> GanModel:
        """The model as it is saved."""
        self.finished.load_state_dict(self.ema.shadow if self.ema else self.model.state_dict())
        return self.finished

    def evaluate(self, step: int) -> dict[str, float]:
        found = self.evaluation.run(self.finish_weights())
        self._train_mode()
        share = found["diversity"]
        if share < self.options.collapse_below:
            self.say(
                f"step {step} | collapse: images of one caption differ by {share:.1%} of what real images differ "
                f"by, under {self.options.collapse_below:.0%}; the best checkpoint stays. If it does not recover, "
                "lower the learning rate, raise --discriminator.r1-weight, or start from another seed"
            )
        return found

    @torch.no_grad()
    def sample(self, step: int) -> dict[str, Image.Image]:
        """A row of images a caption, the same noise in each column and at each step."""
        model = self.finish_weights()
        if not self.world.is_main:
            return {}
        columns = self.options.sample_images
        z = torch.randn(columns, self.config.generator.z_dim, generator=torch.Generator().manual_seed(0))
        images = []
        for text, label in self.samples:
            condition = self.conditions([text] * columns, torch.full((columns,), label))
            images += self.generate(model, z, condition).cpu()
        return {"samples": make_grid([to_image(x) for x in images], columns)}

    @torch.no_grad()
    def generate(self, model: GanModel, z: Tensor, condition: Condition) -> Tensor:
        """(B, 3, S, S) float32 in [-1, 1] on the device: what a file would hold."""
        with autocast(self.world.device, self.options.precision):
            text = model.text(condition.text_ids)
            z = z.to(self.world.device)
            images = model.generator(z, text, condition.labels, condition.has_text)
        return images.float().clamp(-1, 1)

    def say(self, text: str) -> None:
        if self.world.is_main:
            say(text)

    # -------------------------------------------------------------------------------------------------- checkpoints

    def state(self) -> dict[str, Any]:
        state = {
            "config": to_mapping(self.config),
            "generator": {"weights": self.g.weights(), "engine": self.g.state()},
            "discriminator": {"weights": self.d.weights(), "engine": self.d.state()},
            "trunk": self.trunk.fixed_weights(),
            "strength": self.strength.state(),
        }
        return state | ({"ema": self.ema.state()} if self.ema else {})

    def save(self, directory: Path, step: int, state: dict[str, Any]) -> None:
        weights = self.ema.shadow if self.ema else self.model.state_dict()
        checkpoint.write_model(directory, KIND, state["config"], weights, step)
        shutil.copytree(self.data.text_folder, directory / FOLDER)

    def load_state(self, state: dict[str, Any]) -> None:
        """Raises ValueError where the run directory holds another model, or one trained otherwise."""
        run_dir = self.options.loop.run_dir
        require_same_config(run_dir, with_first_map(state["config"]), to_mapping(self.config), "a GAN")
        require_same_average(run_dir, self.ema, state)
        for engine, name in ((self.g, "generator"), (self.d, "discriminator")):
            self._require_shapes(engine.weights(), state[name]["weights"], name)
            engine.load_state(state[name]["weights"], state[name]["engine"])
        self.trunk.load_fixed_weights(state["trunk"])
        self.strength.load_state(state["strength"])
        if self.ema:
            self.ema.load_state(state["ema"])

    def _require_shapes(self, own: dict[str, Tensor], found: dict[str, Tensor], name: str) -> None:
        if {n: t.shape for n, t in own.items()} != {n: t.shape for n, t in found.items()}:
            raise ValueError(
                f"{self.options.loop.run_dir} holds a {name} of other sizes: choose another --loop.run-dir, or the "
                "options that it was started with"
            )
