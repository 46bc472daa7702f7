"""An image tower on EfficientNet-Lite0 with the weights of ImageNet, which stay as they are.

What is in an image is read from the final features, its colours from mean, deviation and centre-weighted mean of the
first stages, since the final features hardly know them. All are standardised; the projection into the common space
behind it is what a training learns. The weights are part of a checkpoint, so that scoring needs no package.
"""

import torch
from torch import Tensor, nn

from vq.losses.imagenet_features import (
    CONFIGS,
    SHALLOW_STAGES,
    TRAINING_NETWORK,
    ImageNetFeatures,
    load_imagenet_features,
    pooled_statistics,
)


class ImageNetTower(nn.Module):
    """(B, 3, S, S) in [-1, 1], or their `features` -> float32 (B, num_features).

    What open_clip asks of a network of timm is here.
    """

    def __init__(self) -> None:
        super().__init__()
        config = CONFIGS[TRAINING_NETWORK]
        self.network = ImageNetFeatures(config)
        self.num_features = config.head_channels + 3 * sum(config.widths[stage] for stage in SHALLOW_STAGES)
        self.norm = nn.BatchNorm1d(self.num_features, affine=False)
        self.default_cfg = {"pool_size": None}

    def reset_classifier(self, num_classes: int, global_pool: str = "avg") -> None:
        """There is none to replace."""
        assert num_classes == 0 and global_pool == "avg"

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(images if images.ndim == 2 else self.features(images))

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Before they are standardised: what no training changes."""
        stages = self.network(images)
        deep = self.network.final(stages[-1]).float().mean((2, 3))
        shallow = [part for stage in SHALLOW_STAGES for part in pooled_statistics(stages[stage])]
        return torch.cat([deep, *shallow], dim=1)  # (B, 1280 + 120)

    def load_imagenet_(self) -> None:
        """Take the weights of the installed package. Raises FileNotFoundError saying what to install."""
        self.network.load_state_dict(load_imagenet_features(TRAINING_NETWORK).state_dict())
