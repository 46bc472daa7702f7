"""Stage 1: train the image tokenizer on product pictures.

    python train_vqgan.py                                          # the embedded default, minutes on a CPU
    python train_vqgan.py --config configs/goods_128/vqgan.yaml
    torchrun --nproc_per_node 2 train_vqgan.py --config configs/goods_128/vqgan.yaml
    python train_vqgan.py --config configs/goods_128/vqgan_decoder.yaml    # sharper pictures, the same codes

The same command started again goes on from the newest checkpoint in the run directory.
"""

import common  # noqa: F401 (before torch: Ctrl-C meanwhile leaves no traceback)

# isort: split

from collections.abc import Sequence
from pathlib import Path

from common.config import command, parse_options
from vq.options import Options
from vq.train import train


@command
def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Train; returns the last evaluation."""
    options = parse_options(
        Options, argv, description=__doc__, embedded=Path(__file__).parent / "configs/demo/vqgan.yaml"
    )
    return train(options)


if __name__ == "__main__":
    main()
