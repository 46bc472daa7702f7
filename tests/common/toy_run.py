"""The smallest real training: a transformer of a few thousand weights on token shards, through the real loop.

    python tests/common/toy_run.py --data DIR --loop.run-dir DIR
    deepspeed --num_gpus 2 tests/common/toy_run.py --data DIR --loop.run-dir DIR

Each process notes the keys of every batch (--loop.log-keys), so that tests see which samples were trained on.
"""

import io
import tarfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from common.checkpoint import write_model
from common.config import command, parse_options, to_mapping
from common.distributed import World, batch_plan, start_world, stop_world
from common.engine import EngineName
from common.engines.deepspeed import DeepSpeedConfig
from common.loop import LoopConfig, fit
from common.optim import OptimConfig, learning_rate
from common.training_state import TrainingState
from data_tools.shards.index import ShardIndex
from data_tools.shards.loader import DecodeTokens, train_batches

VOCAB = 33


@dataclass(frozen=True)
class Options:
    """A run that takes a second."""

    data: Path = Path("data")
    """Folder of token shards."""
    loop: LoopConfig = field(
        default_factory=lambda: LoopConfig(
            num_steps=12,
            global_batch_size=8,
            log_every=1,
            save_every=4,
            eval_every=6,
            tensorboard=False,
            log_keys=True,
        )
    )
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-2, warmup_steps=2, grad_clip=0.5))
    engine: EngineName = "auto"
    """Which engine."""
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    dropout: float = 0.0
    """Drop-out, to see that resumed runs draw the same."""
    ema_decay: float = 0.9
    """Moving average of the weights."""
    pause: float = 0.0
    """Seconds a step sleeps, so that it can be killed in the middle of a run."""
    num_workers: int = 0
    """Loader processes."""


class ToyModel(nn.Module):
    """Odd sizes, so that no shard of ZeRO ends where a tensor ends; a tied head; a buffer.

    No biases: those of the attention keys have no gradient but rounding, which AdamW would blow up.
    """

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, 21)
        self.block = nn.TransformerEncoderLayer(
            21, 3, 37, dropout, batch_first=True, norm_first=True, bias=False
        )
        self.norm = nn.LayerNorm(21)
        self.head = nn.Linear(21, VOCAB, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.tensor(2.0))

    @property
    def hidden_layers(self) -> list[nn.Module]:
        return [self.block]

    def forward(self, ids: Tensor) -> Tensor:
        """(B, L) long -> logits (B, L, VOCAB)."""
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        hidden = self.block(self.embedding(ids), src_mask=mask, is_causal=True)
        return self.head(self.norm(hidden)) * self.scale


class ToyTask:
    """Next-token prediction."""

    validation_metric = "loss"

    def __init__(self, options: Options, world: World) -> None:
        torch.manual_seed(options.loop.seed)
        self.options, self.world = options, world
        model = ToyModel(options.dropout)
        self.plan = batch_plan(options.loop.global_batch_size, world.size, options.loop.micro_batch_size)
        how = (world, self.plan, options.ema_decay, options.engine, options.deepspeed)
        self.training = TrainingState(model, options.optim, *how)
        self.engine = self.training.engine

    def train_step(self, batch: dict[str, Any], step: int) -> dict[str, float]:
        time.sleep(self.options.pause)
        self.engine.set_lr(learning_rate(self.options.optim, step, self.options.loop.num_steps))
        total = 0.0
        for micro in self.engine.micro_batches({"ids": batch["image_ids"]}, self.plan.accumulation):
            loss = self._loss(micro["ids"])
            self.engine.backward(loss)
            total += loss.item() / self.plan.accumulation
        norm = self.engine.step()
        self.training.update_average()
        return {"loss": total, "grad_norm": norm}

    def _loss(self, ids: Tensor) -> Tensor:
        logits = self.engine.model(ids[:, :-1])
        return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    @torch.no_grad()
    def evaluate(self, step: int) -> dict[str, float]:
        self.engine.model.eval()
        loss = self._loss(torch.arange(32).view(4, 8)).item()
        self.engine.model.train()
        return {"loss": loss}

    def sample(self, step: int) -> dict[str, Image.Image]:
        return {"grey": Image.new("RGB", (4, 4), (step, step, step))}

    def state(self) -> dict[str, Any]:
        return self.training.state()

    def save(self, directory: Path, step: int, state: dict[str, Any]) -> None:
        write_model(directory, "toy", {}, state["weights"], step)

    def load_state(self, state: dict[str, Any]) -> None:
        self.training.load_state(state, self.options.loop.run_dir)


def write_token_shards(folder: Path, samples: int, shards: int = 3) -> None:
    """Samples whose next token hangs on the one before, so that there is something to learn."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for shard in range(shards):
        with tarfile.open(folder / f"train-{shard:05d}.tar", "w") as tar:
            for i in range(shard, samples, shards):
                ids = (rng.integers(VOCAB) + 3 * np.arange(9)) % VOCAB
                buffer = io.BytesIO()
                np.save(buffer, ids[None].astype(np.uint16))
                for name, data in ((f"s{i:03d}.ids.npy", buffer.getvalue()), (f"s{i:03d}.txt", b"toy")):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


@command
def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    options = parse_options(Options, argv, description=__doc__)
    world = start_world("cpu")
    torch.set_num_threads(1)
    index = ShardIndex.open(options.data, "train").require("ids.npy")
    try:
        task = ToyTask(options, world)

        def batches(start: int) -> Any:
            size, seed = options.loop.global_batch_size, options.loop.seed
            return train_batches(index, DecodeTokens(), size, world, seed, start, options.num_workers)

        return fit(task, batches, options.loop, world, to_mapping(options))
    finally:
        stop_world()


if __name__ == "__main__":
    main()
