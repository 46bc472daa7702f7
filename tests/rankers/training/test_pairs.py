import numpy as np
import pytest
import torch
from tiny_goods import COLORS, KINDS, draw

from common.text.bert_text import CaptionTokenizer, TextTowerConfig, write_text_tower
from data_tools.shards.index import ShardIndex
from data_tools.shards.loader import CorruptSample
from rankers.training.pairs import (
    AttributeConfig,
    CropAugment,
    pair_decoder,
    read_meta,
    scan_names,
    swap_color,
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> CaptionTokenizer:
    folder = tmp_path_factory.mktemp("tower")
    write_text_tower(folder, ["一个的", *COLORS, *KINDS], TextTowerConfig(32, 1, 2, 16), None)
    return CaptionTokenizer(folder, 16)


def test_names_of_the_shards(shards):
    names = scan_names(ShardIndex.open(shards), AttributeConfig())
    assert set(names.labels) == set(KINDS) and set(names.colors) == set(COLORS)
    assert set(names.categories) == set(KINDS) and len(names.captions) > 10
    bare = scan_names(ShardIndex.open(shards), AttributeConfig(label_field="", color_field=""))
    assert bare.labels == bare.colors == bare.categories == ()


def test_a_sample_and_its_wrong_twin(shards, tokenizer):
    index = ShardIndex.open(shards)
    config = AttributeConfig(fact_fields=("label_zh", "color_zh"))
    names = scan_names(index, config)
    decode = pair_decoder(32, tokenizer, config, names, CropAugment())
    seen = set()
    for i in range(30):
        pair = decode(index, i, np.random.default_rng(i))
        assert pair["image"].shape == (3, 32, 32) and pair["image"].abs().max() <= 1
        assert pair["text_ids"].shape == (2, 16) and pair["facts"].shape == (2, 2)
        assert names.labels[int(pair["label"])] in pair["text"]
        words = [
            "".join(tokenizer.tokenizer.tokenizer.decode(r.tolist(), skip_special_tokens=True).split())
            for r in pair["text_ids"]
        ]
        assert words[0] == pair["text"]
        if pair["has_twin"]:
            assert pair["color"] in words[0] and pair["color"] not in words[1]
            assert pair["facts"][0, 0] == pair["facts"][1, 0] and pair["facts"][0, 1] != pair["facts"][1, 1]
        else:
            assert words[0] == words[1] and not any(c in words[0] for c in COLORS)
        seen.add(bool(pair["has_twin"]))
        same = decode(index, i, np.random.default_rng(i))
        assert torch.equal(pair["image"], same["image"]) and torch.equal(pair["text_ids"], same["text_ids"])
    assert seen == {True, False}


def test_unknown_words_go_in_but_nothing_goes_out(shards, tokenizer):
    index = ShardIndex.open(shards)
    names = scan_names(index, AttributeConfig())
    decode = pair_decoder(32, tokenizer, AttributeConfig(), names, CropAugment(), unk_insert=1.0)
    plain = pair_decoder(32, tokenizer, AttributeConfig(), names, CropAugment())
    for i in range(8):
        with_unknown, without = (
            d(index, i, np.random.default_rng(0))["text_ids"][0] for d in (decode, plain)
        )
        assert (with_unknown == tokenizer.unk_id).sum() == 1
        kept = with_unknown[with_unknown != tokenizer.unk_id]
        assert torch.equal(kept, without[: len(kept)])
        assert with_unknown[0] == tokenizer.tokenizer.begin_id


def test_swapping_a_colour():
    rng = np.random.default_rng(0)
    assert swap_color("酒红色长裙", "酒红色", ("红色", "酒红色"), rng) == ("红色长裙", "红色")
    assert swap_color("长裙", "红色", ("红色", "蓝色"), rng) is None
    assert swap_color("红色长裙", "", ("红色", "蓝色"), rng) is None
    assert swap_color("红色长裙", "红色", ("红色",), rng) is None


def test_augmentation_keeps_the_hue():
    image = draw("杯子", "红色", 0, 80)
    for seed in range(20):
        pixels = CropAugment(erase=0.0)(image, 48, np.random.default_rng(seed))
        red, green, blue = ((c + 1) / 2 for c in pixels)
        cup = (red - green) > 0.25
        assert pixels.shape == (3, 48, 48) and 0.02 < cup.float().mean() < 0.9
        assert (green[cup] - blue[cup]).abs().mean() < 0.06
    with pytest.raises(ValueError, match="min_area"):
        CropAugment(min_area=0)


def test_damaged_json_is_a_corrupt_sample():
    assert read_meta(b"") == {}
    for data in (b"{", b"[1]", b"\xff"):
        with pytest.raises(CorruptSample):
            read_meta(data)
