"""The towers for scoring against open_clip's, timm's and transformers': the same numbers, bit for bit."""

import pytest
import torch

from common.text.bert_text import CaptionTokenizer, TextTowerConfig, write_text_tower
from rankers.light_towers import LightClip
from rankers.model import IMAGENET_TOWER, RESNETS, ModelConfig, RankerModel, build_light_clip

TEXTS = ["红色的杯子", "一双蓝色的鞋子 T恤 42"]


@pytest.mark.parametrize("tower", [*RESNETS, IMAGENET_TOWER])
@pytest.mark.parametrize("bf16", [False, True])
def test_both_towers_give_the_same_bits(tmp_path, tower, bf16):
    write_text_tower(tmp_path, TEXTS, TextTowerConfig(32, 2, 4, 24), None)
    config = ModelConfig(image_tower=tower, embed_dim=8, image_size=64, max_text_len=24)
    torch.manual_seed(0)
    theirs = RankerModel(config, tmp_path)
    for norm in (m for m in theirs.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        norm.running_mean.normal_(0, 0.1)
        norm.running_var.uniform_(0.5, 2)
    for parameter in theirs.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)  # biases start at zero
    ours = RankerModel(config, tmp_path, build_light_clip(config, tmp_path))
    assert isinstance(ours.clip, LightClip)
    ours.load_state_dict(theirs.state_dict())  # strictly: the same names
    pair = [model.to(memory_format=torch.channels_last).eval() for model in (ours, theirs)]
    images = torch.rand(3, 3, 64, 64) * 2 - 1
    tokenizer = CaptionTokenizer(tmp_path, 24)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        image = [model.encode_image(images) for model in pair]
        odd = [model.encode_image(images[:, :, :50, :50]) for model in pair]
        padded = [model.encode_text(tokenizer.batch(TEXTS)) for model in pair]
        alone = [model.encode_text(tokenizer.batch(TEXTS[:1])) for model in pair]
    for found, expected in (image, odd, padded, alone):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("tower", ["vit-ti-16", "resnet-50"])
def test_other_towers_are_open_clips(tmp_path, tower):
    write_text_tower(tmp_path, TEXTS, TextTowerConfig(32, 2, 4, 24), None)
    assert build_light_clip(ModelConfig(image_tower=tower, image_size=32), tmp_path) is None
