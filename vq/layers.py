"""What the architectures share."""

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def run_block(block: nn.Module, x: Tensor, checkpointing: bool) -> Tensor:
    """`block(x)`; with `checkpointing` its inner activations are computed again in the backward pass, not kept."""
    return checkpoint(block, x, use_reentrant=False) if checkpointing else block(x)
