"""Slots of titles, hard negatives, and what judges say of images whose kind and colour are known."""

import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from reference_shards import caption
from tiny_goods import COLORS, KINDS, draw

from data_tools.shards.index import ShardIndex
from evaluation.judges.goods import GoodsJudge
from evaluation.metrics.attributes import (
    MOST_NEGATIVES,
    SlotWords,
    hard_negative_hits,
    judged_categories,
    judged_colors,
    pixel_colors,
)
from evaluation.metrics.pixel_colors import ColorHistogram, PixelColors
from evaluation.reference import Facts, ReferenceImages, common_side

HISTOGRAMS = ColorHistogram()


def facts(*rows: tuple[str, str, str, str]) -> list[Facts]:
    """(caption, kind, color, word) each."""
    return [Facts(f"{i:03d}", *row) for i, row in enumerate(rows)]


GOODS = facts(
    ("一件红色外套", "夹克", "红色", "外套"),
    ("蓝色外套 商品图", "西装", "蓝色", "外套"),
    ("超市里的红西柚", "红西柚", "", "红西柚"),
    ("条纹长裤", "长裤", "", "长裤"),
    ("碎花长裤", "长裤", "", "长裤"),
    ("红色牛仔外套", "西装", "红色", "牛仔外套"),
)


def test_slots_are_what_the_reference_names():
    lexicon = SlotWords.of_reference(GOODS)
    assert lexicon.words["color"] == ("红色", "蓝色")
    assert lexicon.words["category"] == tuple(sorted({"夹克", "西装", "外套", "红西柚", "长裤", "牛仔外套"}))
    assert lexicon.words["pattern"] == tuple(sorted({"条纹", "碎花"}))
    assert lexicon.meanings["外套"] == {"夹克", "西装"}


def test_a_colour_inside_the_kind_is_no_colour():
    lexicon = SlotWords.of_reference([*GOODS, *facts(("红色西柚汁", "红色西柚汁", "", "红色西柚汁"))])
    assert lexicon.parse("一盒红色西柚汁").words == {"category": "红色西柚汁"}
    assert lexicon.parse("红色牛仔外套").words == {"category": "牛仔外套", "color": "红色"}
    assert lexicon.parse("什么也没有").words == {}


def test_negatives_change_one_word_and_are_never_true():
    lexicon = SlotWords.of_reference(GOODS)
    assert lexicon.negatives("一件红色外套", "color") == ["一件蓝色外套"]
    kinds = lexicon.negatives("一件红色外套", "category")
    assert set(kinds) == {
        "一件红色红西柚",
        "一件红色长裤",
    }  # a jacket may be a suit, and denim jackets are jackets
    assert lexicon.negatives("条纹长裤", "pattern") == ["碎花长裤"]
    assert lexicon.negatives("一条长裤", "color") == [] and lexicon.negatives("", "category") == []


def test_many_words_are_tried_in_a_fixed_choice():
    lexicon = SlotWords({"category": tuple(f"第{i:03d}种" for i in range(100))})
    first = lexicon.negatives("一个第007种", "category")
    assert len(first) == MOST_NEGATIVES and first == lexicon.negatives("一个第007种", "category")
    assert first != [text.replace("X", "") for text in lexicon.negatives("两个第007种", "category")]


def test_without_facts_the_word_lists_read_the_captions():
    lexicon = SlotWords.of_reference(
        facts(("红色连衣裙", "", "", ""), ("黑色衬衫 纯棉", "", "", ""), ("亚麻衬衫", "", "", ""))
    )
    assert lexicon.words["color"] == tuple(sorted({"红色", "黑色"}))
    assert set(lexicon.words["category"]) == {"连衣裙", "衬衫"} and lexicon.words["material"] == tuple(
        sorted({"纯棉", "亚麻"})
    )


class Words:
    """A scorer whose text features are one-hot over the words that a text holds."""

    name = "words"
    vocabulary = ("红色", "蓝色", "外套", "长裤")

    def text_features(self, texts):
        rows = torch.tensor([[float(word in text) for word in self.vocabulary] for text in texts])
        return torch.nn.functional.normalize(rows, dim=1)


def test_hard_negatives_by_a_scorer_that_sees_colour_alone():
    lexicon = SlotWords({"color": ("红色", "蓝色"), "category": ("外套", "长裤")})
    images = np.array([[1.0, 0, 0, 0], [0, 1.0, 0, 0], [0, 0, 1.0, 0]])  # red, blue, a jacket
    texts = ["红色外套", "红色外套", "一件外套"]
    found = hard_negative_hits(Words(), lexicon, "color", texts, images)
    np.testing.assert_array_equal(found.hits, [1, 0, np.nan])
    assert found.chance == pytest.approx(0.5)
    found = hard_negative_hits(Words(), lexicon, "category", texts, images)
    np.testing.assert_array_equal(found.hits, [0, 0, 1])  # equal scores are no hits
    assert hard_negative_hits(Words(), lexicon, "color", ["一件外套"], images[2:]) is None


def test_the_judges_heads_say_what_is_there(judge_dir, shards):
    judge = GoodsJudge.from_pretrained(judge_dir)
    pairs = [(kind, color) for kind in KINDS for color in COLORS]
    features = judge.features([draw(kind, color, 300) for kind, color in pairs])
    reference = ReferenceImages.of_split(str(shards), "val", 40)
    lexicon = SlotWords.of_reference([reference.facts(i) for i in range(len(reference))])
    right = [caption(kind, color) for kind, color in pairs]
    wrong = [caption(KINDS[(KINDS.index(kind) + 1) % 3], color) for kind, color in pairs]
    kinds = judged_categories(judge, [*right, "一张桌子"], np.concatenate([features, features[:1]]))
    assert kinds.hits[:-1].mean() > 0.8 and np.isnan(kinds.hits[-1]) and kinds.chance == pytest.approx(1 / 3)
    assert judged_categories(judge, wrong, features).hits.mean() < 0.2
    assert judged_colors(judge, lexicon, right, features).hits.mean() > 0.8
    assert judged_categories(judge, ["一张桌子"], features[:1]) is None
    assert judged_colors(judge, lexicon, ["一张桌子"], features[:1]) is None


def colored(count: int, seed: int) -> tuple[list[Image.Image], list[str]]:
    rng = np.random.default_rng(seed)
    names = [list(COLORS)[int(rng.integers(4))] for _ in range(count)]
    images = [draw(KINDS[i % 3], name, seed * 100 + i) for i, name in enumerate(names)]
    return images, names


def test_pixels_tell_colours_sharp_and_blurred():
    images, names = colored(80, 1)
    measured = PixelColors(HISTOGRAMS.features(images), names)
    assert measured.colors == tuple(sorted(COLORS))
    held_out, expected = colored(60, 2)
    blurred = [image.filter(ImageFilter.GaussianBlur(1.5)) for image in held_out]
    for shown in (held_out, blurred):
        named = measured.named(HISTOGRAMS.features(shown))
        assert np.mean([a == b for a, b in zip(named, expected, strict=True)]) > 0.95
    lexicon = SlotWords({"color": tuple(COLORS)})
    hits = pixel_colors(
        measured, lexicon, [f"{name}杯子" for name in expected], HISTOGRAMS.features(held_out)
    )
    assert hits.hits.mean() > 0.95 and hits.chance == pytest.approx(1 / 4)


def test_rare_colours_are_not_named():
    images, names = colored(40, 3)
    measured = PixelColors(HISTOGRAMS.features(images), ["紫色", *names[1:]])
    assert "紫色" not in measured.colors
    assert not PixelColors.enough(["红色"] * 9) and PixelColors.enough(["红色"] * 5 + ["蓝色"] * 5)
    with pytest.raises(ValueError, match="fewer than two colours"):
        PixelColors(HISTOGRAMS.features(images[:4]), ["红色"] * 4)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_histograms_of_any_image_are_unit_vectors(mode):
    rows = HISTOGRAMS.features([Image.new(mode, (3, 50)), Image.new(mode, (200, 10), 200)])
    np.testing.assert_allclose((rows**2).sum(1), 1, rtol=1e-4)


def test_colours_of_real_goods_in_their_pixels(goods):
    """Held-out garments whose colour is known, named by 300 of the training split."""

    def load(split: str, most: int) -> tuple[list[Image.Image], list[str]]:
        index, images, names = ShardIndex.open(goods, split), [], []
        reference = ReferenceImages(index, 128)
        for i in range(len(index)):
            color = json.loads(index.read(i, ("json",))["json"])["color_zh"]
            if color and len(images) < most:
                images.append(reference.open(i))
                names.append(color)
        return images, names

    images, names = load("train", 300)
    measured = PixelColors(HISTOGRAMS.features(images), names)
    held_out, expected = load("val", 60)
    known = [i for i, name in enumerate(expected) if name in measured.colors]
    named = measured.named(HISTOGRAMS.features([held_out[i] for i in known]))
    assert len(known) > 40 and np.mean([n == expected[i] for n, i in zip(named, known, strict=True)]) > 0.85


def test_reference_images_are_squares_with_facts(shards):
    reference = ReferenceImages.of_split(str(shards), "val", 32, limit=5)
    assert len(reference) == 5 and reference.open(0).size == (32, 32)
    found = reference.facts(0)
    assert found.category in KINDS and found.color in found.caption and found.word in found.caption
    larger = ReferenceImages.of_split(str(shards), "val", 40)
    assert reference.key(0) != larger.key(0) and len({larger.key(i) for i in range(24)}) == 24
    assert common_side([Image.new("RGB", s) for s in ((64, 64), (64, 80), (32, 32))]) == 64
