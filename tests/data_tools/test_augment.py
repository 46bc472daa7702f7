"""Variants of captions are deterministic and lose nothing; moved images stay where the geometry says."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from common.distributed import World
from data_tools.augment import Chain, ImageAugment, TextAugment, load_tables, main
from data_tools.images.crops import CropFlip
from data_tools.images.decode import encode
from data_tools.ingest.records import Record
from data_tools.rules.lexicon import load_lexicon
from data_tools.shards.captions import CaptionChoice
from data_tools.shards.image_shards import ShardWriter
from data_tools.shards.index import ShardIndex
from data_tools.shards.loader import DecodeImage, train_batches

CAPTIONS = [
    "一件红色的连衣裙",
    "黑色纯棉T恤 男",
    "长裤，颜色为黑色",
    "超市里的番茄",
    "上衣 灰色 商品图片",
    "abc",
    "儿童帽子商品展示图",
]


def variants(caption: str, count: int = 200, **options) -> set[str]:
    augment = TextAugment(**options)
    return {augment(caption, f"key{i}", 0) for i in range(count)}


class TestText:
    def test_off_by_default(self):
        assert not TextAugment().is_on
        assert all(TextAugment()(caption, "k", 3) == caption for caption in CAPTIONS)

    def test_a_function_of_seed_key_and_epoch(self):
        """Pinned: the same on every machine, so a resumed run goes on with the same captions."""
        augment = TextAugment(0.5, 0.5, 0.5, 0.5)
        again = TextAugment(0.5, 0.5, 0.5, 0.5)
        places = [(c, f"{k}", e) for c in CAPTIONS for k in range(5) for e in range(5)]
        assert [augment(*place) for place in places] == [again(*place) for place in reversed(places)][::-1]
        said = [augment("黑色纯棉T恤 男", "42", epoch) for epoch in range(6)]
        assert said == ["黑色T恤衫", "T恤", "T恤衫 男", "黑色T恤衫 男", "纯棉黑色T恤衫", "黑色T恤衫"]
        other = TextAugment(0.5, 0.5, 0.5, 0.5, seed=1)
        assert [other("黑色纯棉T恤 男", "42", epoch) for epoch in range(6)] != said

    @pytest.mark.parametrize(
        ("caption", "options", "expected"),
        [
            ("一件红色的连衣裙", {"drop": 1.0}, {"一件连衣裙"}),
            ("长裤，颜色为黑色", {"drop": 1.0}, {"长裤，颜色为黑色"}),
            ("上衣 灰色 商品图片", {"drop": 1.0}, {"上衣 商品图片"}),
            ("长裤 绿色", {"drop": 1.0}, {"长裤"}),
            ("红色", {"drop": 1.0}, {"红色"}),
            ("黑色纯棉T恤", {"reorder": 1.0}, {"黑色纯棉T恤", "纯棉黑色T恤"}),
            ("上衣 灰色", {"reorder": 1.0}, {"上衣 灰色", "灰色 上衣"}),
            ("衬衫", {"synonyms": 1.0}, {"衬衣"}),
            ("棒球帽", {"synonyms": 1.0}, {"棒球帽"}),
            ("红色连衣裙", {"template": 1.0}, {"红色连衣裙", "红色的连衣裙", "连衣裙 红色", "连衣裙，颜色为红色",
                                           "红色连衣裙 商品图片", "一张红色连衣裙的照片"}),
            ("金锚牌红色连衣裙", {"template": 1.0}, {"金锚牌红色连衣裙"}),
            ("红色和白色连衣裙", {"template": 1.0}, {"红色和白色连衣裙"}),
        ],
    )  # fmt: skip
    def test_each_kind(self, caption, options, expected):
        assert variants(caption, **options) == expected

    def test_shares(self):
        """Of 2,000 samples, the share that changes is the one that was asked for."""
        augment = TextAugment(synonyms=0.3)
        changed = sum(augment("衬衫", f"{i}", 0) != "衬衫" for i in range(2000))
        assert 0.27 < changed / 2000 < 0.33

    def test_nothing_is_claimed_that_was_not_said(self):
        """Attributes of a variant, up to synonyms, are attributes of the caption; the noun is always there."""
        lexicon, tables = load_lexicon(), load_tables()

        def meaning(caption):
            words = {w for words in lexicon.attributes(caption).values() for w in words}
            return {min(w, *tables.synonyms.get(w, (w,))) for w in words}

        for caption in CAPTIONS:
            nouns = {
                min(w, *tables.synonyms.get(w, (w,))) for w in lexicon.attributes(caption).get("kind", ())
            }
            for variant in variants(caption, synonyms=0.5, reorder=0.5, drop=0.5, template=0.5):
                assert nouns <= meaning(variant) <= meaning(caption), (caption, variant)

    def test_synonyms_are_known_words_of_one_class_or_frames(self):
        kinds = load_lexicon().kind_of
        for word, others in load_tables().synonyms.items():
            assert all(kinds.get(word) == kinds.get(other) for other in others), word

    def test_bad_share(self):
        with pytest.raises(ValueError, match="drop must be between 0 and 1, not 2"):
            TextAugment(drop=2)


class TestImage:
    def rng(self):
        return np.random.Generator(np.random.Philox(key=[1, 2]))

    def image(self):
        image = Image.new("RGB", (64, 48), (240, 240, 240))
        ImageDraw.Draw(image).rectangle((24, 16, 39, 31), (200, 30, 30))
        return image

    def test_off_by_default(self):
        assert ImageAugment()(self.image(), self.rng()).tobytes() == self.image().tobytes()

    def test_a_shift_moves_by_what_was_drawn(self):
        right, down = self.rng().uniform(-1, 1, 5)[:2] * 0.25
        moved = ImageAugment(shift=0.25)(self.image(), self.rng())
        red = np.argwhere(np.asarray(moved)[..., 1] < 120)
        assert np.allclose(red.mean(0), (23.5 + down * 48, 31.5 + right * 64), atol=0.6)
        assert moved.size == (64, 48)

    def test_zoom_scales_the_area(self):
        scale = 1 + self.rng().uniform(-1, 1, 5)[3] * 0.4
        zoomed = ImageAugment(zoom=0.4)(self.image(), self.rng())
        area = (np.asarray(zoomed)[..., 1] < 135).sum()
        assert abs(area / 256 - scale**2) < 0.15

    def test_the_background_goes_on(self):
        """What comes into view of a plain background is the plain background: no black corners."""
        moved = ImageAugment(shift=0.3, zoom=0.3, rotate=30)(self.image(), self.rng())
        assert np.asarray(moved)[..., 0].min() > 150

    def test_brightness_keeps_grey_grey(self):
        light = self.rng().uniform(-1, 1, 5)[4]
        out = np.asarray(ImageAugment(brightness=0.2)(Image.new("RGB", (4, 4), (100, 100, 100)), self.rng()))
        assert (out == round(100 * (1 + light * 0.2))).all()

    def test_same_draw_same_image(self):
        augment = ImageAugment(0.1, 0.1, 10, 0.1)
        assert augment(self.image(), self.rng()).tobytes() == augment(self.image(), self.rng()).tobytes()

    def test_bad_limits(self):
        with pytest.raises(ValueError, match="rotate must be between 0 and 45, not 90"):
            ImageAugment(rotate=90)


def test_command_shows_variants(goods, capsys):
    main([str(goods), "--rows", "3", "--epochs", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all("->" in line and "|" in line for line in lines)


class TestInTraining:
    def shards(self, folder):
        with ShardWriter(folder, "train") as writer:
            for i in range(12):
                data = encode(Image.new("RGB", (24, 24), (20 * i, 90, 200)), "png")
                writer.write(Record(f"k{i:02d}", data, "png", ("黑色纯棉T恤 男",)))
        return ShardIndex.open(folder)

    def batches(self, index, decode, start, count, ranks=1, workers=0):
        worlds = [World(r, ranks, r, torch.device("cpu"), "none") for r in range(ranks)]
        streams = [train_batches(index, decode, 4, world, 3, start, workers) for world in worlds]
        return [[text for stream in streams for text in next(stream)["text"]] for _ in range(count)]

    def test_the_same_words_on_any_ranks_and_after_a_resume(self, tmp_path):
        index = self.shards(tmp_path)
        decode = DecodeImage(16, captions=CaptionChoice(rewrite=TextAugment(0.5, 0.5, 0.5, 0.5).drawn))
        whole = self.batches(index, decode, 0, 9)
        assert len({text for batch in whole for text in batch}) > 4
        assert whole[:3] != whole[3:6], "another epoch says it differently"
        assert self.batches(index, decode, 20, 4) == whole[5:]
        assert self.batches(index, decode, 0, 9, ranks=2) == whole
        assert self.batches(index, decode, 0, 5, workers=2) == whole[:5]
        plain = self.batches(index, DecodeImage(16), 0, 2)
        assert {text for batch in plain for text in batch} == {"黑色纯棉T恤 男"}

    def test_images_are_moved_then_cropped_with_their_mask(self):
        image = Image.new("RGB", (32, 32), "white")
        ImageDraw.Draw(image).rectangle((8, 8, 23, 23), fill=(60, 60, 60))
        image.putalpha(Image.fromarray((np.asarray(image)[..., 0] < 128).astype(np.uint8) * 255))
        chain = Chain((ImageAugment(shift=0.2, brightness=0.3), CropFlip(min_scale=0.9)))
        for seed in range(5):
            moved = np.asarray(chain(image, np.random.default_rng(seed)))
            dark, mask = moved[..., 0] < 150, moved[..., 3] > 128
            assert (dark == mask).mean() > 0.93 and mask.any()
        one, two = (chain(image, np.random.default_rng(7)) for _ in range(2))
        assert one.tobytes() == two.tobytes()
