"""The towers of a trained ranker for scoring, in PyTorch alone: weights and numbers of open_clip's CustomTextCLIP.

Importing open_clip, timm and transformers takes several times longer than ranking eight images. Training builds its
model from them; scoring builds the same graph here, a residual network with a deep stem (He et al. 2018, arXiv
1812.01187, ResNet-D) and a BERT (Devlin et al. 2018, arXiv 1810.04805) with a mean over its tokens. Names of the
weights are theirs, so that one checkpoint serves both.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.files import read_json

BERT = {  # values of config.json under which the BERT below is transformers' own
    "model_type": "bert",
    "hidden_act": "gelu",
    "is_decoder": False,
    "add_cross_attention": False,
    "type_vocab_size": 2,
}


class LightClip(nn.Module):
    """`encode_image` and `encode_text` of CustomTextCLIP; vectors (B, D) of any length."""

    def __init__(self, trunk: nn.Module, width: int, embed_dim: int, bert: dict) -> None:
        """`trunk`: images to features (B, width); `bert`: towers/config.json."""
        super().__init__()
        self.visual, self.text = ImageTower(trunk, width, embed_dim), TextTower(bert, embed_dim)
        self.logit_scale = nn.Parameter(torch.zeros(()))

    def encode_image(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S), normalised -> (B, D)"""
        return self.visual(pixels)

    def encode_text(self, text_ids: Tensor) -> Tensor:
        """(B, T) long -> (B, D)"""
        return self.text(text_ids)


def supports(bert: dict[str, Any]) -> bool:
    """Whether `TextTower` is what transformers would build from this config.json."""
    return all(bert.get(name, value) == value for name, value in BERT.items()) and "model_type" in bert


def read_bert(towers: Path) -> dict[str, Any]:
    return read_json(towers / "config.json")


# --- images --------------------------------------------------------------------------------------------------------


class ImageTower(nn.Module):
    """A trunk under open_clip's linear head."""

    def __init__(self, trunk: nn.Module, width: int, embed_dim: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = nn.ModuleDict({"proj": nn.Linear(width, embed_dim, bias=False)})

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head["proj"](self.trunk(pixels))


class ResNet(nn.Module):
    """Deep stem, basic blocks, average over the map."""

    def __init__(self, channels: tuple[int, ...], blocks: tuple[int, ...], stem: int) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(
            nn.Conv2d(3, stem, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(stem),
            nn.ReLU(inplace=True),
            nn.Conv2d(stem, stem, 3, padding=1, bias=False),
            nn.BatchNorm2d(stem),
            nn.ReLU(inplace=True),
            nn.Conv2d(stem, 2 * stem, 3, padding=1, bias=False),
        )
        self.bn1 = nn.BatchNorm2d(2 * stem)
        widths = (2 * stem, *channels)
        for i, count in enumerate(blocks):
            inputs = (widths[i], *[widths[i + 1]] * (count - 1))
            layer = (Block(c, widths[i + 1], 2 if i and not j else 1) for j, c in enumerate(inputs))
            self.add_module(f"layer{i + 1}", nn.Sequential(*layer))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)  # (B, C, S/2, S/2)
        x = F.max_pool2d(x, 3, stride=2, padding=1)  # (B, C, S/4, S/4)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))  # (B, C, S/32, S/32)
        return F.adaptive_avg_pool2d(x, 1).flatten(1)  # (B, C)


class Block(nn.Module):
    """Two convolutions and a shortcut, which averages before it halves the map."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            average = nn.AvgPool2d(2, stride, ceil_mode=True, count_include_pad=False)
            self.downsample = nn.Sequential(
                average if stride > 1 else nn.Identity(),
                nn.Conv2d(inputs, outputs, 1, bias=False),
                nn.BatchNorm2d(outputs),
            )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(x)) + shortcut, inplace=True)


# --- texts ---------------------------------------------------------------------------------------------------------


class TextTower(nn.Module):
    """BERT under open_clip's mean pooler and linear projection."""

    def __init__(self, bert: dict[str, Any], embed_dim: int) -> None:
        super().__init__()
        self.pad_id = bert["pad_token_id"]
        self.transformer = Bert(bert)
        self.proj = nn.Linear(bert["hidden_size"], embed_dim, bias=False)

    def forward(self, text_ids: Tensor) -> Tensor:
        mask = text_ids != self.pad_id  # (B, T)
        x = self.transformer(text_ids, mask) * mask.long().unsqueeze(-1)  # (B, T, D)
        return self.proj(x.sum(dim=1) / mask.long().sum(-1, keepdim=True))


class Bert(nn.Module):
    def __init__(self, bert: dict[str, Any]) -> None:
        super().__init__()
        self.embeddings = Embeddings(bert)
        layers = nn.ModuleList(Layer(bert) for _ in range(bert["num_hidden_layers"]))
        self.encoder = nn.ModuleDict({"layer": layers})

    def forward(self, text_ids: Tensor, mask: Tensor) -> Tensor:
        """text_ids (B, T) long, mask (B, T) True where there is text -> (B, T, D)"""
        x, length = self.embeddings(text_ids), text_ids.shape[1]
        # without padding no mask: another order of summation, as in transformers
        seen = None if mask.all() else mask[:, None, None, :].expand(-1, 1, length, -1)
        for layer in self.encoder["layer"]:
            x = layer(x, seen)
        return x


class Embeddings(nn.Module):
    def __init__(self, bert: dict[str, Any]) -> None:
        super().__init__()
        width = bert["hidden_size"]
        self.word_embeddings = nn.Embedding(bert["vocab_size"], width, padding_idx=bert["pad_token_id"])
        self.position_embeddings = nn.Embedding(bert["max_position_embeddings"], width)
        self.token_type_embeddings = nn.Embedding(2, width)
        self.LayerNorm = nn.LayerNorm(width, eps=bert["layer_norm_eps"])

    def forward(self, text_ids: Tensor) -> Tensor:
        positions = torch.arange(text_ids.shape[1], device=text_ids.device)[None]
        x = self.word_embeddings(text_ids) + self.token_type_embeddings(torch.zeros_like(text_ids))
        return self.LayerNorm(x + self.position_embeddings(positions))


class Layer(nn.Module):
    """Attention, then a feed-forward network, each added and normed (post-norm)."""

    def __init__(self, bert: dict[str, Any]) -> None:
        super().__init__()
        width, inner, self.heads = bert["hidden_size"], bert["intermediate_size"], bert["num_attention_heads"]
        projections = nn.ModuleDict({name: nn.Linear(width, width) for name in ("query", "key", "value")})
        self.attention = nn.ModuleDict({"self": projections, "output": AddNorm(width, width, bert)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, inner)})
        self.output = AddNorm(inner, width, bert)

    def forward(self, x: Tensor, seen: Tensor | None) -> Tensor:
        """x (B, T, D), seen (B, 1, T, T) bool or None -> (B, T, D)"""
        parts = self.attention["self"]
        shape = (*x.shape[:2], self.heads, -1)
        q, k, v = (parts[n](x).view(shape).transpose(1, 2) for n in ("query", "key", "value"))  # (B, H, T, K)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2)
        x = self.attention["output"](mixed.reshape(x.shape).contiguous(), x)
        return self.output(F.gelu(self.intermediate["dense"](x)), x)


class AddNorm(nn.Module):
    def __init__(self, inputs: int, outputs: int, bert: dict[str, Any]) -> None:
        super().__init__()
        self.dense = nn.Linear(inputs, outputs)
        self.LayerNorm = nn.LayerNorm(outputs, eps=bert["layer_norm_eps"])

    def forward(self, x: Tensor, shortcut: Tensor) -> Tensor:
        return self.LayerNorm(self.dense(x) + shortcut)
