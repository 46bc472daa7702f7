"""The `dvae` encoder and decoder: DiscreteVAE of lucidrains' DALLE-pytorch, after the dVAE of DALL-E (Ramesh et al.
2021, arXiv:2102.12092, appendix A). It goes with the quantizer `gumbel`, whose 1x1 convolution to logits is the last
layer of the original encoder.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from vq.layers import run_block


@dataclass(frozen=True)
class DvaeConfig:
    """Sizes of the dvae architecture; the defaults are those of DALLE-pytorch's train_vae.py."""

    hidden_dim: int = 256
    """Width of every layer."""
    num_layers: int = 3
    """Strided convolutions: the side shrinks by 2 ** num_layers."""
    res_blocks: int = 2
    """Residual blocks at the latent grid of each half (`num_resnet_blocks`)."""

    def __post_init__(self) -> None:
        if self.hidden_dim < 1 or self.num_layers < 1 or self.res_blocks < 0:
            raise ValueError(f"hidden_dim and num_layers must be at least 1 and res_blocks 0, not {self}")

    @property
    def downsample_factor(self) -> int:
        return 2**self.num_layers


class DvaeBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + x


class DvaeEncoder(nn.Module):
    """(B, 3, S, S) in [-1, 1] -> (B, hidden_dim, h, w); logits are the quantizer's."""

    checkpointing = False

    def __init__(self, config: DvaeConfig) -> None:
        super().__init__()
        widths = [3] + [config.hidden_dim] * config.num_layers
        self.down = nn.ModuleList(
            [nn.Conv2d(widths[i], widths[i + 1], 4, stride=2, padding=1) for i in range(config.num_layers)]
        )
        self.blocks = nn.ModuleList([DvaeBlock(config.hidden_dim) for _ in range(config.res_blocks)])

    def forward(self, images: Tensor) -> Tensor:
        x = images
        for conv in self.down:
            x = F.relu(conv(x))
        for block in self.blocks:
            x = run_block(block, x, self.checkpointing and self.training)
        return x


class DvaeDecoder(nn.Module):
    """(B, codebook_dim, h, w) -> (B, 3, S, S), unclamped."""

    checkpointing = False

    def __init__(self, config: DvaeConfig, codebook_dim: int) -> None:
        super().__init__()
        # Without residual blocks the original feeds the codes straight into the first transposed convolution.
        self.conv_in = nn.Conv2d(codebook_dim, config.hidden_dim, 1) if config.res_blocks else nn.Identity()
        self.blocks = nn.ModuleList([DvaeBlock(config.hidden_dim) for _ in range(config.res_blocks)])
        first = config.hidden_dim if config.res_blocks else codebook_dim
        widths = [first] + [config.hidden_dim] * config.num_layers
        self.up = nn.ModuleList(
            [
                nn.ConvTranspose2d(widths[i], widths[i + 1], 4, stride=2, padding=1)
                for i in range(config.num_layers)
            ]
        )
        self.conv_out = nn.Conv2d(config.hidden_dim, 3, 1)

    @property
    def last_layer(self) -> nn.Parameter:
        return self.conv_out.weight

    def trunk(self, latents: Tensor) -> Tensor:
        """All but the last convolution."""
        x = self.conv_in(latents)
        for block in self.blocks:
            x = run_block(block, x, self.checkpointing and self.training)
        for conv in self.up:
            x = F.relu(conv(x))
        return x

    def forward(self, latents: Tensor) -> Tensor:
        return self.conv_out(self.trunk(latents))  # (B, 3, S, S)
