"""Stage 2: train the generator on captions and image tokens.

    python train_dalle.py                                          # the embedded default, minutes on a CPU
    python train_dalle.py --config configs/own_128/dalle.yaml --data my_images     # a folder, to a generator
    python train_dalle.py --config configs/goods_128/dalle.yaml
    torchrun --nproc_per_node 2 train_dalle.py --config configs/goods_128/dalle.yaml
    deepspeed train_dalle.py --config configs/goods_128/dalle.yaml --deepspeed.zero-stage 2
    python train_dalle.py --init pretrained/goods-128/generator --data MY_TOKENS      # fine-tuning
    python train_dalle.py --config configs/goods_128/dalle_lines.yaml                 # to follow line drawings

The data are token shards (`python -m vq.encode_shards`), or image shards that are encoded on the fly. The same command
started again goes on from the newest checkpoint in the run directory.
"""

import common  # noqa: F401 (before torch: Ctrl-C meanwhile leaves no traceback)

# isort: split

import math
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from common.checkpoint import resolve, write_model
from common.config import command, parse_options, to_mapping
from common.distributed import BatchPlan, World, batch_plan, start_world, stop_world
from common.files import write_json
from common.image import make_grid
from common.log import say
from common.loop import fit
from common.optim import learning_rate
from common.precision import autocast
from common.training_state import TrainingState, require_same_config
from dalle import sequence
from dalle.losses import CrossEntropy, LossConfig, dalle_loss, position_losses
from dalle.model import KIND, TRAINING_ONLY, Dalle, config_mapping
from dalle.options import FastOptions
from dalle.plan import measure_peak_flops, train_flops
from dalle.training import lines as line_training
from dalle.training.captions import drop_captions, insert_unknown
from dalle.training.data import TrainData, captions, names_images, require_data, require_tokenizers_of
from dalle.training.options import Options
from kernels import OFF, accelerate
from vq.encoding import ImageEncoder


class GeneratorTask:
    """Forward, losses and optimizer order of one step."""

    validation_metric = "image_loss"

    def __init__(self, options: Options, world: World, plan: BatchPlan, data: TrainData) -> None:
        torch.manual_seed(options.loop.seed)
        self.options, self.world, self.plan, self.data = options, world, plan, data
        self.text_tokenizer, self.pad_id = data.text_tokenizer, data.text_tokenizer.pad_id
        self.image_tokenizer = data.image_tokenizer.to(world.device)
        if not data.has_tokens:
            self.encode_images = ImageEncoder(self.image_tokenizer, world.device, options.precision)
        self.config = options.model_config(
            data.text_tokenizer.vocab_size,
            self.pad_id,
            data.image_tokenizer.codebook_size,
            data.image_tokenizer.grid_size,
            data.image_tokenizer.downsample_factor,
        )
        model = Dalle(self.config).to(world.device)
        if options.init:
            require_tokenizers_of(options.init, data, options.new_codes)
            line_training.load_init(model, resolve(options.init))
        self.finished = Dalle(self.config).to(world.device).eval()  # what evaluation and sample grids look at
        self.cross_entropy, self.kernels = CrossEntropy(), OFF
        if options.kernels == "auto":
            encoder = [] if data.has_tokens else [self.image_tokenizer]
            in_bf16 = options.precision != "fp32"
            self.kernels = accelerate(model, self.cross_entropy, *encoder, in_bf16=in_bf16)
            accelerate(self.finished)  # evaluates without gradients, which leaves its blocks to PyTorch
        if options.compile:
            model.compile_blocks()
        engine = (options.engine, options.deepspeed)
        self.training = TrainingState(model, options.optim, world, plan, options.ema_decay, *engine)
        self.engine = self.training.engine
        self.peak_flops = measure_peak_flops(world.device, options.precision)
        self.sample_texts = self._known_texts() if options.sample_images else ()
        self.curve_bits: Tensor | None = None
        self.num_truncated = 0

    def _known_texts(self) -> tuple[str, ...]:
        """Captions of the sample grids. Raises ValueError for one that the tokenizer knows nothing of."""
        for text in self.options.sample_texts:
            if not self.data.is_known(text):
                raise ValueError(
                    f"the text tokenizer knows nothing of the caption {text!r} of --sample-texts"
                )
        texts = self.options.sample_texts or self.data.first_texts(4)
        if not texts:
            raise ValueError(
                "no validation caption holds anything that the text tokenizer knows: look at the captions, or name "
                "another with --text-tokenizer"
            )
        return texts

    def train_step(self, batch: dict[str, Any], step: int) -> dict[str, float]:
        options, started = self.options, time.perf_counter()
        lr = learning_rate(options.optim, step, options.loop.num_steps)
        self.engine.set_lr(lr)
        text_ids = self._encode_texts(batch["text"])  # (B, T)
        salt = (options.loop.seed, step)
        unknown = (self.text_tokenizer.vocab_size, options.unknown_insert, salt)
        text_ids = insert_unknown(text_ids, batch["key"], self.pad_id, *unknown)
        text_ids = drop_captions(text_ids, batch["key"], self.pad_id, options.caption_dropout, salt)
        num_targets = self._targets_per_micro_batch(text_ids)
        micro_batches = {"text_ids": text_ids, "image_ids": self._image_ids(batch)}
        if options.lines:
            micro_batches |= line_training.line_inputs(batch, options.line_dropout, salt)
        totals: dict[str, float] = {}
        text_lens: list[int] = []
        for micro in self.engine.micro_batches(micro_batches, self.plan.accumulation):
            text_ids, image_ids = self._to_device(micro["text_ids"]), micro["image_ids"].to(self.world.device)
            text_lens.append(text_ids.shape[1])
            lines = line_training.to_model(micro, self.world.device)
            with autocast(self.world.device, options.precision):
                output = self.engine.model(text_ids, image_ids, **lines)
            targets = sequence.text_targets(text_ids, self.pad_id)
            losses = dalle_loss(output, image_ids, targets, num_targets, options.loss, self.cross_entropy)
            self.engine.backward(losses.total)
            for name, value in losses.metrics().items():
                totals[name] = totals.get(name, 0.0) + value / self.plan.accumulation
        totals["grad_norm"] = self.engine.step()
        self.training.update_average()
        return totals | {"lr": lr} | self._speed(text_lens, time.perf_counter() - started)

    def _encode_texts(self, texts: Sequence[str]) -> Tensor:
        """(B, max_text_len) long on the CPU; captions that are too long are cut and counted."""
        encoded = self.text_tokenizer.encode(texts, self.config.max_text_len)
        self.num_truncated += encoded.num_truncated
        return encoded.ids

    def _to_device(self, text_ids: Tensor) -> Tensor:
        """Without common padding, except where shapes must stay."""
        text_ids = text_ids if self.options.compile else sequence.trim(text_ids, self.pad_id)
        return text_ids.to(self.world.device)

    @torch.no_grad()
    def _image_ids(self, batch: dict[str, Any]) -> Tensor:
        """(B, N) long: as they came, or encoded now."""
        if self.data.has_tokens:
            return batch["image_ids"]
        return self.encode_images(batch["image"])

    def _targets_per_micro_batch(self, text_ids: Tensor) -> float:
        """The mean over all processes, so that any split of the global batch gives the same text loss."""
        count = float(sequence.text_target_mask(text_ids, self.pad_id).sum())
        return self.world.mean({"count": count})["count"] / self.plan.accumulation

    def _speed(self, text_lens: Sequence[int], seconds: float) -> dict[str, float]:
        """Tokens of all processes; the share of the peak is a process's. text_lens: of each micro-batch."""
        samples, each = self.plan.micro_batch_size, self.config.num_image_tokens
        flops = samples * sum(train_flops(self.config, length) for length in text_lens)
        tokens = samples * sum(length + each for length in text_lens) * self.world.size
        return {"tokens_per_second": tokens / seconds, "mfu": flops / seconds / self.peak_flops}

    @torch.no_grad()
    def evaluate(self, step: int) -> dict[str, float]:
        """Over the validation samples, dealt over processes, with the weights that are saved."""
        self.training.load_saved_weights_(self.finished)
        sums = torch.zeros(
            5, dtype=torch.float64
        )  # text loss, text targets, image loss without text, without drawing, samples
        curve = torch.zeros(self.config.num_image_tokens, dtype=torch.float64)
        batches = self.data.val_batches(self.plan.micro_batch_size, self.options.val_samples)
        for number, batch in enumerate(batches):
            if number % self.world.size != self.world.rank:
                continue
            encoded = self.text_tokenizer.encode_batch(batch["text"], self.config.max_text_len)
            text_ids, image_ids = self._to_device(encoded), self._image_ids(batch).to(self.world.device)
            null_ids = sequence.null_captions(len(text_ids), 1, self.pad_id, self.world.device)
            lines = (
                {"drawings": batch["line"].to(self.world.device).float() / 255} if self.options.lines else {}
            )
            with autocast(self.world.device, self.options.precision):
                output = self.finished(text_ids, image_ids, **lines)
                without_text = self.finished(null_ids, image_ids, **lines)
                without_lines = self.finished(text_ids, image_ids) if lines else output
            targets = sequence.text_targets(text_ids, self.pad_id)
            losses = dalle_loss(output, image_ids, targets, 1.0, LossConfig(), self.cross_entropy)
            null_loss = position_losses(without_text.image, image_ids, self.cross_entropy).sum()
            curve += position_losses(output.image, image_ids, self.cross_entropy).double().cpu()
            bare_loss = position_losses(without_lines.image, image_ids, self.cross_entropy).sum()
            counts = (float(losses.text), len(targets), float(null_loss), float(bare_loss), len(text_ids))
            sums += torch.tensor(counts)
        everything = self.world.sum_(torch.cat([sums, curve]).to(self.world.device)).cpu()
        return self._metrics(*everything[:5].tolist(), everything[5:], step)

    def _metrics(
        self,
        text_loss: float,
        num_targets: float,
        null_loss: float,
        bare_loss: float,
        num_samples: float,
        curve: Tensor,
        step: int,
    ) -> dict[str, float]:
        """Bits are a token's; `text_gain_bits` and `line_gain_bits`: how much less the image costs when its caption,
        or its drawing, is known."""
        self.curve_bits = bits = curve / num_samples / math.log(2)  # (N,)
        if self.world.is_main:
            path = self.options.loop.run_dir / "position_loss" / f"step_{step:08d}.json"
            write_json(path, {"step": step, "bits": [round(b, 4) for b in bits.tolist()]})
        image_bits = float(bits.mean())
        null_bits = null_loss / num_samples / len(bits) / math.log(2)
        metrics = {"image_loss": image_bits * math.log(2), "image_bits": image_bits}
        metrics["text_gain_bits"] = null_bits - image_bits
        if self.options.lines:
            metrics["line_gain_bits"] = bare_loss / num_samples / len(bits) / math.log(2) - image_bits
        if self.config.text_head:
            metrics["text_loss"] = text_loss / max(1.0, num_targets)
            metrics["text_bits"] = metrics["text_loss"] / math.log(2)
        return metrics | {f"image_bits_quarter_{i}": float(q.mean()) for i, q in enumerate(bits.chunk(4), 1)}

    def sample(self, step: int) -> dict[str, Image.Image]:
        """A row of images a caption, made as generate.py makes them, and the bits of every image position."""
        options = self.options
        self.training.load_saved_weights_(self.finished)
        if not self.world.is_main:
            return {}
        images = {} if self.curve_bits is None else {"position_bits": heat_map(self.curve_bits)}
        if options.sample_images:
            from dalle.pipeline import TextToImage

            fast = FastOptions(kernels=options.kernels)
            pipeline = TextToImage(self.finished, self.image_tokenizer, self.text_tokenizer, fast=fast)
            drawn = pipeline.generate(
                self.sample_texts, options.sample_images, options.loop.seed, options.sampling
            )
            images["samples"] = make_grid([p.image for p in drawn], columns=options.sample_images)
            if options.lines:
                more = (options.sample_images, options.loop.seed, options.sampling)
                images["samples_lines"] = line_training.sample_lines(pipeline, self.data, *more)
        return images

    def state(self) -> dict[str, Any]:
        data = self.data.train
        own = {"config": config_mapping(self.config), "num_samples": len(data), "data": data.fingerprint}
        return own | self.training.state()

    def save(self, directory: Path, step: int, state: dict[str, Any]) -> None:
        weights = self.training.saved_weights(state)
        tokenizer = {"image_tokenizer_sha256": self.image_tokenizer.sha256}
        write_model(directory, KIND, state["config"], weights, step, **tokenizer)
        self.text_tokenizer.save(directory)
        shutil.copytree(self.data.image_tokenizer_dir, directory / "image_tokenizer")

    def load_state(self, state: dict[str, Any]) -> None:
        """Raises ValueError when the run directory holds another model, or one without moving average."""
        now = {n: v for n, v in config_mapping(self.config).items() if n not in TRAINING_ONLY}
        require_same_config(self.options.loop.run_dir, state["config"], now)
        before, now = state.get("num_samples", len(self.data.train)), len(self.data.train)
        fingerprint = self.data.train.fingerprint
        if state.get("data", fingerprint) != fingerprint and self.world.is_main:
            others = "others" if before == now else f"{now}, and were {before} before"
            say(f"note: the samples of the data are {others}: the run goes on in a new order")
        self.training.load_state(state, self.options.loop.run_dir)


def heat_map(curve: Tensor, side: int = 256) -> Image.Image:
    """(N,) bits of the image positions -> a grey image of the grid: black 0, white the largest."""
    grid = curve.view(math.isqrt(len(curve)), -1)
    levels = (grid / grid.max() * 255).round().to(torch.uint8)
    return Image.fromarray(levels.numpy()).resize((side, side), Image.Resampling.NEAREST)


def describe(task: GeneratorTask) -> str:
    """One line on what is about to be trained."""
    data, config = task.data, task.config
    encoded = data.text_tokenizer.encode(captions(data.train, 10_000), config.max_text_len)
    count = sum(p.numel() for p in task.finished.parameters())
    return (
        f"{len(data.train)} samples, {count / 1e6:.1f}M parameters, {config.num_image_tokens} image tokens of "
        f"{config.codebook_size} codes, text vocabulary {config.text_vocab_size} ({encoded.unknown_share:.2%} of the "
        f"pieces unknown, {encoded.num_truncated} captions too long and cut)"
    )


@command
def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Train; returns the last evaluation."""
    options = parse_options(
        Options, argv, description=__doc__, embedded=Path(__file__).parent / "configs/demo/dalle.yaml"
    )
    loop, world = options.loop, start_world(options.device)
    try:
        plan = batch_plan(loop.global_batch_size, world.size, loop.micro_batch_size)
        require_data(options)
        options = options.with_init_tokenizers()
        if names_images(options.data):
            from dalle.training.from_images import prepare_images  # the readers of all formats

            options = prepare_images(options, world)
        data = TrainData.prepare(
            loop.run_dir, options.data, options.image_tokenizer, options.text_tokenizer, world, options.remote
        )
        if options.lines:
            data.require_lines()
            data = replace(data, with_lines=True)
        task = GeneratorTask(options, world, plan, data)
        if world.is_main:
            for problem in data.train.problems + data.val.problems:
                say(f"note: {problem}")
            say(describe(task))
            say(f"{task.kernels}; validation by PyTorch's operators in the same numbers")

        def batches(start_sample: int) -> Iterator[dict[str, Any]]:
            return data.train_batches(options, plan.global_batch_size, world, start_sample)

        return fit(task, batches, loop, world, to_mapping(options) | {"kernels_used": task.kernels.record()})
    finally:
        stop_world()


if __name__ == "__main__":
    main()
