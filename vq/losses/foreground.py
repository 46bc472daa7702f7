"""Where the goods are: a soft mask from the colours of the border, since product images stand on plain background."""

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def border_mask(images: Tensor) -> Tensor:
    """(B, 3, H, W) in [-1, 1] -> (B, 1, H, W) in [0, 1]: how unlike the border a pixel is.

    The background's colour is the median of a border ring; what lies beyond the spread of 90 % of the ring itself
    counts as goods. A guess: where it would mark less than 2 % or more than 95 % of an image it marks everything.
    """
    _, _, height, width = images.shape
    ring = max(1, min(height, width) // 32)
    border = torch.cat(
        [
            images[:, :, :ring].flatten(2),
            images[:, :, -ring:].flatten(2),
            images[:, :, :, :ring].flatten(2),
            images[:, :, :, -ring:].flatten(2),
        ],
        dim=2,
    ).float()  # (B, 3, R)
    background = border.median(dim=2).values  # (B, 3)
    spread = (border - background[..., None]).abs().amax(1).quantile(0.9, dim=1)  # (B,)
    distance = (images.float() - background[..., None, None]).abs().amax(1, keepdim=True)  # (B, 1, H, W)
    low = spread.view(-1, 1, 1, 1) + 0.04
    mask = ((distance - low) / 0.12).clamp(0, 1)
    mask = F.avg_pool2d(F.pad(mask, (2, 2, 2, 2), mode="replicate"), 5, stride=1)
    share = mask.mean((1, 2, 3), keepdim=True)
    return torch.where((share > 0.02) & (share < 0.95), mask, torch.ones_like(mask))


@torch.no_grad()
def pixel_weights(images: Tensor, foreground_weight: float, mask: Tensor | None = None) -> Tensor | None:
    """(B, 1, H, W) of mean 1 an image: `foreground_weight` on goods, 1 on background, scaled; None when equal.

    `mask`: (B, 1, H, W) in [0, 1] from data, negative where an image has none; None: estimated for all.
    """
    if foreground_weight == 1:
        return None
    estimated = border_mask(images)
    if mask is not None:
        estimated = torch.where(mask.amin((1, 2, 3), keepdim=True) < 0, estimated, mask)
    weight = 1.0 + (foreground_weight - 1.0) * estimated
    return weight / weight.mean((1, 2, 3), keepdim=True)
