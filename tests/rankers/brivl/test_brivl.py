"""BriVL on random weights in the published key layout, against a computation written the way its authors run it."""

import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from rankers import load_ranker
from rankers.base import TwoTowerRanker
from rankers.brivl.model import Brivl, BrivlConfig, pool_regions
from rankers.brivl.ranker import PRESETS, BrivlTowers, Preset, grid_boxes, load_brivl, read_boxes

SMALL = BrivlConfig(
    cnn="test_efficientnet",
    image_dim=256,
    text_dim=32,
    bert_layers=2,
    bert_heads=2,
    bert_feed_forward=48,
    vocab_size=12,
    joint_dim=24,
    layers=2,
    heads=4,
    feed_forward=40,
    max_text_len=10,
    max_boxes=6,
)
VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "红", "色", "连", "衣", "裙", "鞋", "蓝"]


@pytest.fixture(scope="module")
def model() -> Brivl:
    torch.manual_seed(0)
    return Brivl(SMALL).eval()


@pytest.fixture(scope="module")
def vocab(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("vocab") / "vocab.txt"
    path.write_text("\n".join(VOCAB) + "\n", encoding="utf-8")
    return path


def some_image(seed: int, size: tuple[int, int] = (50, 40)) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(levels.numpy())


def test_published_sizes_and_key_layout():
    with torch.device("meta"):
        model = Brivl(BrivlConfig())
    image, text = (dict(tower.state_dict()) for tower in (model.imgencoder, model.textencoder))
    assert (len(image), len(text)) == (908, 251)
    assert sum(p.numel() for p in model.imgencoder.parameters()) == 143_724_056
    assert sum(p.numel() for p in model.textencoder.parameters()) == 130_094_848
    assert image["learnable.max_pool.0.weight"].shape == (2048, 2048, 1, 1)
    assert image["learnable.imgAtt.layers.3.self_attn.in_proj_weight"].shape == (6144, 2048)
    assert image["backbone.conv_head.weight"].shape[0] == 2048
    assert text["learnable.textFC.fc1.weight"].shape == (2048, 768)
    assert "backbone.bert.encoder.layer.11.output.LayerNorm.bias" in text


def grid_sample_regions(features, boxes, size):
    """The original's way: affine matrices built for aligned corners, torch's sampling without them."""
    height, width = features.shape[-2:]
    rows = []
    for feature, own in zip(features, boxes, strict=True):
        x1, y1, x2, y2 = (own / (size / height)).unbind(-1)
        theta = torch.zeros(len(own), 2, 3)
        theta[:, 0, 0], theta[:, 1, 1] = (x2 - x1) / (width - 1), (y2 - y1) / (height - 1)
        theta[:, 0, 2] = (x1 + x2 - width + 1) / (width - 1)
        theta[:, 1, 2] = (y1 + y2 - height + 1) / (height - 1)
        grid = F.affine_grid(theta, (len(own), 1, 4, 4), align_corners=False)
        rows.append(F.grid_sample(feature.expand(len(own), -1, -1, -1), grid, align_corners=False))
    return torch.stack(rows)  # (B, R, C, 4, 4)


def test_regions_equal_the_grid_sampling_of_the_original():
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(2, 5, 12, 12, generator=generator)
    corners = torch.rand(2, 7, 4, generator=generator) * 380
    boxes = torch.cat([corners.view(2, 7, 2, 2).amin(2), corners.view(2, 7, 2, 2).amax(2)], dim=-1)
    boxes[0, 0], boxes[1, 0] = torch.tensor([0, 0, 380.0, 380.0]), torch.zeros(4)
    expected = grid_sample_regions(features, boxes, 380).mean((-2, -1))
    found = pool_regions(features, boxes * 12 / 380)
    assert (found - expected).abs().max() < 2e-5


def attend(weights, prefix, x, mask, heads):
    """One torch.nn.TransformerEncoderLayer, post-norm, by hand, for one sequence x (R, D) with its padding mask."""
    w = {name.removeprefix(prefix): t for name, t in weights.items() if name.startswith(prefix)}
    width = x.shape[1]
    q, k, v = (x @ w["self_attn.in_proj_weight"].T + w["self_attn.in_proj_bias"]).split(width, dim=1)
    out = []
    for h in range(heads):
        part = slice(h * width // heads, (h + 1) * width // heads)
        logits = q[:, part] @ k[:, part].T / math.sqrt(width // heads)
        out.append(logits.masked_fill(~mask[None], float("-inf")).softmax(1) @ v[:, part])
    attended = torch.cat(out, dim=1) @ w["self_attn.out_proj.weight"].T + w["self_attn.out_proj.bias"]
    x = F.layer_norm(x + attended, (width,), w["norm1.weight"], w["norm1.bias"])
    hidden = (x @ w["linear1.weight"].T + w["linear1.bias"]).relu() @ w["linear2.weight"].T + w[
        "linear2.bias"
    ]
    return F.layer_norm(x + hidden, (width,), w["norm2.weight"], w["norm2.bias"])


def head(weights, prefix, x):
    hidden = (x @ weights[f"{prefix}.fc1.weight"].T + weights[f"{prefix}.fc1.bias"]).relu()
    return F.normalize(hidden @ weights[f"{prefix}.fc2.weight"].T + weights[f"{prefix}.fc2.bias"], dim=-1)


@torch.no_grad()
def image_by_hand(model, pixels, boxes, mask):
    weights = model.imgencoder.state_dict()
    features = model.imgencoder.backbone.forward_features(pixels)
    rows = []
    for regions, valid in zip(grid_sample_regions(features, boxes, pixels.shape[-1]), mask, strict=True):
        kernel, bias = weights["learnable.max_pool.0.weight"], weights["learnable.max_pool.0.bias"]
        x = F.normalize(F.conv2d(regions, kernel, bias).mean((-2, -1)), dim=1)
        for i in range(SMALL.layers):
            x = attend(weights, f"learnable.imgAtt.layers.{i}.", x, valid, SMALL.heads)
        rows.append(head(weights, "learnable.imgFC", x[valid].mean(0)))
    return torch.stack(rows)


def test_image_tower_equals_the_computation_by_hand(model):
    torch.manual_seed(2)
    pixels = torch.randn(2, 3, 96, 96)
    boxes = torch.zeros(2, 6, 4)
    boxes[0, :3] = torch.tensor([[0, 0, 40, 50], [10, 20, 90, 90], [0, 0, 96, 96.0]])
    boxes[1, :1] = torch.tensor([0, 0, 96, 96.0])
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]]).bool()
    with torch.no_grad():
        found = model.imgencoder(pixels, boxes, mask)
    assert (found - image_by_hand(model, pixels, boxes, mask)).abs().max() < 1e-5


@torch.no_grad()
def test_text_tower_reads_its_padding_and_equals_the_computation_by_hand(model, vocab):
    weights = model.textencoder.state_dict()
    ids = torch.tensor([[2, 5, 6, 7, 8, 9, 3, 0, 0, 0]])
    mask = ids != 0
    tokens = model.textencoder.backbone["bert"](
        input_ids=ids, attention_mask=torch.ones_like(ids), token_type_ids=torch.zeros_like(ids)
    ).last_hidden_state[0]
    x = F.normalize(tokens, dim=1)
    for i in range(SMALL.layers):
        x = attend(weights, f"learnable.textAtt.layers.{i}.", x, mask[0], SMALL.heads)
    expected = head(weights, "learnable.textFC", x[mask[0]].mean(0))
    towers = BrivlTowers("brivl:test", model, PRESETS["seed"], vocab)
    assert (towers.encode_texts(["红色连衣裙"])[0] - expected).abs().max() < 1e-5
    short = model.textencoder(ids[:, :7], mask[:, :7])[0]
    assert (short - expected).abs().max() > 1e-4, "the length of the padding is part of the feature"


def test_presets_prepare_images_as_published(model, vocab):
    image = some_image(0)
    plain = BrivlTowers("t", model, Preset(96, False, 0, False), vocab).preprocess([image])
    levels = (
        torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(40, 50, 3).permute(2, 0, 1) / 255
    )
    from torchvision.transforms.functional import normalize, resize

    expected = resize(levels, [96, 96], antialias=False)
    assert (plain[0][0] - expected).abs().max() < 1e-6
    assert plain[1][0].tolist() == [[0, 0, 96, 96]] + [[0, 0, 0, 0]] * 5 and plain[2][0].sum() == 1
    grid = BrivlTowers("t", model, Preset(96, True, 2, False), vocab).preprocess([image])
    expected = normalize(expected, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert (grid[0][0] - expected).abs().max() < 1e-6
    assert grid[1][0][:5].tolist() == [
        [0, 0, 48, 48],
        [48, 0, 96, 48],
        [0, 48, 48, 96],
        [48, 48, 96, 96],
        [0, 0, 96, 96],
    ]
    assert (
        len(grid_boxes(6, 456)) == 36
        and PRESETS["nmi-grid"].grid == 6
        and PRESETS["brivl1"].image_size == 380
    )


def test_detector_boxes_come_from_a_file_by_content(model, vocab, tmp_path):
    image = some_image(3)
    image.save(tmp_path / "a.png")
    row = {"image_id": "a.png", "bbox": [[5, 4, 25, 20]]}
    (tmp_path / "boxes.jsonl").write_text(json.dumps(row) + "\n")
    boxes = read_boxes(tmp_path / "boxes.jsonl")
    towers = BrivlTowers("brivl:t", model, Preset(100, True, 0, True), vocab, boxes)
    _, found, mask = towers.preprocess([image])
    assert found[0, :2].tolist() == [[10, 10, 50, 50], [0, 0, 100, 100]] and mask.sum() == 2
    with pytest.raises(ValueError, match="no detector boxes"):
        towers.preprocess([some_image(4)])


def test_the_file_keeps_its_momentum_copies_to_itself(model, vocab, tmp_path):
    learnable = {name: t.clone() for name, t in model.state_dict().items()}
    learnable |= {name.replace("encoder.", "encoder_mom.", 1): t + 1 for name, t in learnable.items()}
    learnable["textencoder.backbone.bert.embeddings.position_ids"] = torch.arange(512)[None]
    torch.save({"learnable": learnable, "epoch": 3}, tmp_path / "brivl.pth")
    loaded = load_brivl(tmp_path / "brivl.pth", SMALL)
    images = [some_image(i, (30 + i, 40)) for i in range(3)]
    scores = [
        TwoTowerRanker(BrivlTowers("t", m, Preset(96, True, 2, False), vocab)).score("红色的鞋", images)
        for m in (model, loaded)
    ]
    assert torch.equal(*scores) and scores[0].std() > 0
    del learnable["imgencoder.learnable.imgFC.fc1.bias"]
    torch.save({"learnable": learnable}, tmp_path / "short.pth")
    with pytest.raises(ValueError, match=r"imgFC\.fc1\.bias"):
        load_brivl(tmp_path / "short.pth", SMALL)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("brivl:none.pth", "no BriVL weights none.pth"),
        ("brivl:none.pth?preset=best", "unknown preset 'best'"),
        ("brivl:none.pth?preset=brivl1", "needs boxes=FILE.jsonl"),
        ("brivl:none.pth?size=3", "unknown option size"),
        ("brivl:", "no ranker is named"),
    ],
)
def test_bad_names_are_one_sentence(name, words):
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        load_ranker(name)


def test_a_file_of_another_kind_is_refused(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="no entry 'learnable'"):
        load_brivl(tmp_path / "other.pth", SMALL)
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(ValueError, match="is no torch file"):
        load_brivl(tmp_path / "text.pth", SMALL)
