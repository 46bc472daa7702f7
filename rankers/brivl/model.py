"""BriVL 1.0 (WenLan, arXiv 2103.06561): EfficientNet-B5 regions and a Chinese BERT, each through a small transformer.

Written from the published layout of the weights, so that `BriVL-1.0-5500w.pth` and `brivl-with-roberta-base.pth` load
under their own names. Regions are a grid or detector boxes; only their positions matter.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class BrivlConfig:
    """Sizes; the defaults are those of the published weights."""

    cnn: str = "tf_efficientnet_b5"
    """timm's name of the backbone."""
    image_dim: int = 2048
    """Channels of the backbone's last map."""
    text_dim: int = 768
    """Width of the BERT."""
    bert_layers: int = 12
    bert_heads: int = 12
    bert_feed_forward: int = 3072
    vocab_size: int = 21128
    joint_dim: int = 2048
    """Width of the common space."""
    layers: int = 4
    """Layers of the transformer on top of each tower."""
    heads: int = 4
    feed_forward: int = 2048
    max_text_len: int = 80
    """Every text is padded to this length: the BERT reads the padding too."""
    max_boxes: int = 37


class Head(nn.Module):
    """Two linear layers: `imgFC`, `textFC`."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, out)
        self.fc2 = nn.Linear(out, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(x)))


class SetTransformer(nn.Module):
    """`imgAtt`, `textAtt`: torch's post-norm encoder without positions, then the mean over what is no padding."""

    def __init__(self, width: int, config: BrivlConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, config.heads, config.feed_forward, batch_first=True)
            for _ in range(config.layers)
        )

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x (B, R, D), mask (B, R) bool, true for what counts -> (B, D)."""
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=~mask)
        weights = mask.to(x.dtype)[..., None]
        return (x * weights).sum(1) / weights.sum(1)


class ImageTower(nn.Module):
    """Images and boxes -> unit vectors; names as under `imgencoder.`."""

    def __init__(self, config: BrivlConfig) -> None:
        import timm

        super().__init__()
        self.backbone = timm.create_model(config.cnn, pretrained=False)
        width = config.image_dim
        self.learnable = nn.ModuleDict(
            {
                "max_pool": nn.Sequential(nn.Conv2d(width, width, 1)),
                "imgAtt": SetTransformer(width, config),
                "imgFC": Head(width, config.joint_dim),
            }
        )

    def forward(self, images: Tensor, boxes: Tensor, mask: Tensor) -> Tensor:
        """images (B, 3, S, S); boxes (B, R, 4) as x1, y1, x2, y2 in pixels of S; mask (B, R) bool -> (B, D)."""
        features = self.backbone.forward_features(images)  # (B, C, H, W)
        regions = pool_regions(features, boxes * (features.shape[-1] / images.shape[-1]))  # (B, R, C)
        conv = self.learnable["max_pool"][
            0
        ]  # an average in spite of its name; it commutes with the convolution
        regions = F.linear(regions, conv.weight.flatten(1), conv.bias)
        pooled = self.learnable["imgAtt"](F.normalize(regions, dim=-1), mask)
        return F.normalize(self.learnable["imgFC"](pooled), dim=-1)


class TextTower(nn.Module):
    """Token ids -> unit vectors; names as under `textencoder.`."""

    def __init__(self, config: BrivlConfig) -> None:
        from transformers import BertConfig, BertModel

        super().__init__()
        bert = BertModel(
            BertConfig(
                vocab_size=config.vocab_size,
                hidden_size=config.text_dim,
                num_hidden_layers=config.bert_layers,
                num_attention_heads=config.bert_heads,
                intermediate_size=config.bert_feed_forward,
            )
        )
        self.backbone = nn.ModuleDict({"bert": bert})
        self.learnable = nn.ModuleDict(
            {
                "textAtt": SetTransformer(config.text_dim, config),
                "textFC": Head(config.text_dim, config.joint_dim),
            }
        )

    def forward(self, text_ids: Tensor, mask: Tensor) -> Tensor:
        """text_ids (B, T) padded to the full length; mask (B, T) bool -> (B, D). The BERT sees the padding."""
        tokens = self.backbone["bert"](input_ids=text_ids).last_hidden_state  # (B, T, D)
        pooled = self.learnable["textAtt"](F.normalize(tokens, dim=-1), mask)
        return F.normalize(self.learnable["textFC"](pooled), dim=-1)


class Brivl(nn.Module):
    """Both towers under the names of the published state dict."""

    def __init__(self, config: BrivlConfig) -> None:
        super().__init__()
        self.config = config
        self.imgencoder = ImageTower(config)
        self.textencoder = TextTower(config)


GRID = 4  # points a side that are averaged in a box


def pool_regions(features: Tensor, boxes: Tensor) -> Tensor:
    """Means of 4 x 4 bilinear samples in each box; features (B, C, H, W), boxes (B, R, 4) in map cells -> (B, R, C).

    The published code builds its grid for aligned corners and samples without them, which shifts and stretches it:
    point i of a side lies at W / (W - 1) * (x1 + (x2 - x1) (2 i + 1) / 8) - 1 / 2, zero outside the map.
    """
    height, width = features.shape[-2:]
    steps = (2 * torch.arange(GRID, device=features.device) + 1) / (2 * GRID)  # (4,), float32
    x1, y1, x2, y2 = boxes.float().unbind(-1)  # (B, R) each
    x = width / (width - 1) * (x1[..., None] + (x2 - x1)[..., None] * steps) - 0.5  # (B, R, 4)
    y = height / (height - 1) * (y1[..., None] + (y2 - y1)[..., None] * steps) - 0.5
    across = bilinear_weights(x, width).mean(2)  # (B, R, W): the mean over points and the two axes separate
    down = bilinear_weights(y, height).mean(2)  # (B, R, H)
    return torch.einsum("bchw,brh,brw->brc", features, down.to(features.dtype), across.to(features.dtype))


def bilinear_weights(positions: Tensor, size: int) -> Tensor:
    """Weights of the `size` cells for a sample at each place; (...,) -> (..., size)."""
    cells = torch.arange(size, device=positions.device, dtype=positions.dtype)
    return (1 - (positions[..., None] - cells).abs()).clamp(min=0)
