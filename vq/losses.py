"""What a reconstruction is compared by."""

import torch.nn.functional as F
from torch import Tensor


def multiscale_l1(reconstruction: Tensor, images: Tensor, scales: tuple[int, ...] = (4, 16)) -> Tensor:
    """Mean absolute error, plus that of the pictures averaged over `scales` x `scales` blocks (float32 scalar).

    The coarse terms hold the colours of areas, which L1 on pixels alone lets drift towards a median.
    """
    difference = reconstruction.float() - images.float()  # (B, 3, S, S)
    loss = difference.abs().mean()
    for scale in scales:
        loss = loss + F.avg_pool2d(difference, scale).abs().mean()
    return loss


def psnr(reconstruction: Tensor, images: Tensor) -> Tensor:
    """(B, 3, S, S) in [-1, 1], clamped -> (B,) peak signal-to-noise ratio in dB (peak to peak 2)."""
    error = (reconstruction.float().clamp(-1, 1) - images.float()).square().flatten(1).mean(1)
    return 10.0 * (4.0 / error.clamp(min=1e-10)).log10()


def color_shift(reconstruction: Tensor, images: Tensor) -> Tensor:
    """(B, 3, S, S) in [-1, 1] -> (B, 3): difference of channel means, in levels of 0..255."""
    difference = reconstruction.float().clamp(-1, 1) - images.float()
    return difference.mean((2, 3)) * 127.5
