"""The mean of several generators' weights: often better than each of them, at no cost when sampling.

    python -m dalle.average runs/dalle runs/dalle_tuned --target runs/dalle_mean --data data/mine_tokens

For checkpoints of one descent: a generator and what it was fine-tuned to, or several fine-tunings of it (Wortsman et
al. 2022, "Model soups"; of generators trained apart the mean is noise). All must sample the same codes from the same
text tokens. Each of them and the mean are measured on the validation samples, so that a mean that does not pay is seen.
"""

import json
import math
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor

from common.checkpoint import new_step_directory, read_config, resolve, write_model
from common.config import command, parse_options
from common.console.progress import progress
from common.distributed import pick_device
from common.log import say
from common.outputs.record import require_new
from common.precision import autocast
from dalle import sequence
from dalle.losses import CrossEntropy, position_losses
from dalle.model import KIND, Dalle, config_mapping
from dalle.release import LEFT_OUT
from dalle.text_tokenizer import TextTokenizer
from dalle.training.data import captions, open_shards
from data_tools.shards.loader import DecodeTokens, eval_batches
from kernels import accelerate
from vq.model import ImageTokenizer


@dataclass(frozen=True)
class Options:
    """Average generators."""

    sources: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Two or more checkpoint or run directories of generators."""
    target: Path
    """Run directory to write; must not exist."""
    data: str
    """Token shards whose validation samples measure the sources and the mean."""
    val_samples: int = 1000
    """Validation samples, at most."""
    batch_size: int = 32
    """Samples of a pass."""
    device: str = "auto"
    """auto, cpu, cuda ..."""


def mean_weights(models: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Tensor by tensor, computed in float32, in the first one's types. Raises ValueError where they do not match."""
    first = models[0]
    for other in models[1:]:
        if {n: t.shape for n, t in first.items()} != {n: t.shape for n, t in other.items()}:
            raise ValueError("generators of different sizes cannot be averaged")
    return {
        name: torch.stack([m[name].float() for m in models]).mean(0).to(tensor.dtype)
        for name, tensor in first.items()
    }


def require_one_language(directories: Sequence[Path], texts: Sequence[str]) -> None:
    """Raises ValueError where the generators do not share their image codes, or cut `texts` differently."""
    first, *others = directories
    codes = ImageTokenizer.from_pretrained(first / "image_tokenizer").codes_sha256
    cut = TextTokenizer.from_pretrained(first).encode(texts, 64).ids.tolist()
    for other in others:
        if ImageTokenizer.from_pretrained(other / "image_tokenizer").codes_sha256 != codes:
            raise ValueError(f"{other} samples other image codes than {first}")
        if TextTokenizer.from_pretrained(other).encode(texts, 64).ids.tolist() != cut:
            raise ValueError(f"{other} cuts captions otherwise than {first}")


@torch.inference_mode()
def measure(model: Dalle, texts: TextTokenizer, batches: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Bits an image token and how many of them the caption saves, as train_dalle.py reports them."""
    device, pad_id = next(model.parameters()).device, model.config.pad_id
    cross_entropy = CrossEntropy()
    accelerate(model, cross_entropy)
    sums = torch.zeros(2, dtype=torch.float64)  # with and without text, nats
    count = 0
    for batch in batches:
        image_ids = batch["image_ids"].to(device)
        text_ids = sequence.trim(texts.encode_batch(batch["text"], model.config.max_text_len), pad_id)
        null_ids = sequence.null_captions(len(text_ids), 1, pad_id, device)
        with autocast(device):
            outputs = model(text_ids.to(device), image_ids), model(null_ids, image_ids)
        sums += torch.stack(
            [position_losses(o.image, image_ids, cross_entropy).sum().double().cpu() for o in outputs]
        )
        count += image_ids.numel()
    with_text, without = (sums / count / math.log(2)).tolist()
    return {"image_bits": with_text, "text_gain_bits": without - with_text}


def average(options: Options) -> dict[str, float]:
    """Write the mean as a run directory; its metrics. Raises FileNotFoundError or ValueError saying what is wrong."""
    if len(options.sources) < 2:
        raise ValueError("name at least two generators to average")
    require_new(options.target)
    directories = [resolve(source) for source in options.sources]
    device = pick_device(options.device)
    _, val, has_tokens = open_shards(
        options.data, ImageTokenizer.from_pretrained(directories[0] / "image_tokenizer")
    )
    if not has_tokens:
        raise ValueError(f"{options.data} holds images: encode them first, python -m vq.encode_shards")
    require_one_language(directories, captions(val, 64))
    texts = TextTokenizer.from_pretrained(directories[0])
    models = [Dalle.from_pretrained(directory) for directory in directories]
    mean = Dalle(models[0].config).eval()
    mean.load_state_dict(mean_weights([model.state_dict() for model in models]))
    metrics = {}
    for name, model in zip([*options.sources, "the mean"], [*models, mean], strict=True):
        batches = eval_batches(val, DecodeTokens(first_view=True), options.batch_size, options.val_samples)
        metrics = measure(model.to(device), texts, progress(batches, desc=name, unit="batch", leave=False))
        say(
            f"{name}: {metrics['image_bits']:.4f} bits a token, {metrics['text_gain_bits']:.4f} saved by the text"
        )
    configs = [read_config(directory, KIND) for directory in directories]
    step = max(config["step"] for config in configs)
    with new_step_directory(options.target, step) as directory:
        shutil.copytree(
            directories[0], directory, ignore=shutil.ignore_patterns(*LEFT_OUT), dirs_exist_ok=True
        )
        extra = {"image_tokenizer_sha256": configs[0]["image_tokenizer_sha256"]}
        extra["mean_of"] = [config["sha256"] for config in configs]
        write_model(directory, KIND, config_mapping(mean.config), mean.cpu().state_dict(), step, **extra)
    row = {"step": step, "kind": "val", **metrics}
    (options.target / "metrics.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    return metrics


@command
def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Average; prints the metrics of every source and of the mean."""
    options = parse_options(Options, argv, description=__doc__)
    metrics = average(options)
    say(f"wrote {options.target}")
    return metrics


if __name__ == "__main__":
    main()
