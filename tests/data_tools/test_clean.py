"""Rules on captions and images: the published food recipe to the letter, shop titles, flags, resume, accounting."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from make_sources import encoded, some_image, write_easynlp, write_t2i
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from data_tools.clean import CleanConfig, clean, preset_to_config
from data_tools.clean import main as clean_main
from data_tools.ingest.records import Record
from data_tools.ingest.shard_run import DROPPED_FILE
from data_tools.readers.detect import open_source
from data_tools.report.token_count import token_counter
from data_tools.rules import CaptionRules, ImageRules, load_rules, rules_path
from data_tools.rules.captions import CaptionJudge, han_share, special_characters
from data_tools.rules.images import check_shape, grey256, sharpness, thumbnail_size, tiling
from data_tools.rules.lexicon import load_lexicon
from data_tools.rules.titles import TitleNormaliser

SHARED = Path(__file__).parents[3] / "shared"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared")


def dropped(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / DROPPED_FILE).read_text("utf-8").splitlines()]


def write_folder(folder: Path, samples: dict[str, tuple[bytes, str]]) -> Path:
    folder.mkdir(parents=True)
    for name, (image, caption) in samples.items():
        (folder / f"{name}.jpg").write_bytes(image)
        (folder / f"{name}.txt").write_text(caption, "utf-8")
    return folder


class TestFoodRecipe:
    """Against the conditions of the published notebook, written out plainly here a second time."""

    def passes(self, text: str, vocabulary: set[str]) -> bool:
        if len(text) > 32 or re.search(r'[\d？【】《》\\:\?<>"]', text):
            return False
        if any(len(piece) > 18 for piece in re.split(r"[;,\s]", text)):
            return False
        spans = [(i, j) for i in range(len(text)) for j in range(i + 1, min(i + 6, len(text)) + 1)]
        return any(text[i:j] in vocabulary for i, j in spans)

    def test_captions_as_the_recipe(self):
        rules = load_rules("wukong-food").captions
        words = set(Path(rules_path("wukong-food")).with_name("food_words.txt").read_text("utf-8").split())
        words -= {"粉丝", "苹果"}
        generator = random.Random(1)
        pieces = [
            *sorted(words)[:60],
            "粉丝",
            "苹果",
            "好吃的",
            "？",
            "《",
            '"',
            "<",
            "12",
            "３",
            " ",
            ",",
            ";",
            "，",
            "的做法",
            "a",
        ]
        judge = CaptionJudge(rules)
        outcomes = set()
        for _ in range(3000):
            text = "".join(generator.choice(pieces) for _ in range(generator.randint(1, 16)))
            outcomes.add(kept := not judge(text).reason)
            assert kept == self.passes(text, words), text
        assert outcomes == {True, False}

    @pytest.mark.parametrize(
        ("caption", "reason"),
        [("麻婆豆腐", ""), ("粉丝见面会", "caption_no_keyword"), ("苹果手机", "caption_no_keyword"),
         ("米饭" * 17, "caption_too_long"), ("米饭12元", "caption_forbidden"), ("《米饭》", "caption_forbidden"),
         ("米饭" * 10, "caption_piece_too_long"), ("米饭" * 8 + "," + "米饭" * 7, "")],
    )  # fmt: skip
    def test_reasons(self, caption, reason):
        assert CaptionJudge(load_rules("wukong-food").captions)(caption).reason == reason

    def test_aspect_is_that_of_pillow_s_thumbnail(self):
        generator = random.Random(2)
        for _ in range(300):
            size = generator.randint(40, 2200), generator.randint(40, 2200)
            image = Image.new("1", size)
            image.thumbnail((512, 512), Image.Resampling.BICUBIC)
            assert thumbnail_size(size, 512) == image.size

    def test_sizes(self):
        rules = load_rules("wukong-food").images
        assert check_shape((51, 51), rules) is None
        assert check_shape((50, 200), rules)[0] == "image_too_small"
        assert check_shape((1537, 512), rules) is None, "512 x 171 after rounding"
        assert check_shape((1537, 512), ImageRules(max_aspect=3.0))[0] == "aspect_ratio"
        assert check_shape((512, 1540), rules)[0] == "aspect_ratio"

    @needs_shared
    def test_on_the_sample_with_its_own_word_list(self, tmp_path):
        words = SHARED / "data/raw/wukong/food_names.txt"
        vocabulary = set(words.read_text("utf-8").split("\n")) - {"粉丝", "苹果", ""}
        argv = [
            str(SHARED / "data/raw/folder"),
            str(tmp_path / "out"),
            "--rules",
            "wukong-food",
            "--workers",
            "0",
        ]
        clean_main([*argv, "--captions.keyword-file", str(words)])
        kept = {r.captions[0] for r in open_source(tmp_path / "out")}
        captions = [r.captions[0] for r in open_source(SHARED / "data/raw/folder")]
        assert 0 < len(kept) < len(set(captions))
        assert kept == {c for c in captions if self.passes(c, vocabulary)}


class TestCaptions:
    @pytest.mark.parametrize(
        "text",
        [
            "长袖上衣<script>",
            "&lt;p&gt;鞋子",
            "鞋子&nbsp;",
            "芒果\u200b",
            "上衣\x07",
            "\ufffd",
            "衬衫!!!",
            "↓↓↓点击",
            "a\ue000",
        ],
    )
    def test_debris(self, text):
        assert special_characters(text)

    @pytest.mark.parametrize(
        "text",
        ["李子, 实拍", '蔬菜 韭葱 "实拍"', "价格<100>50", "T恤 & 短裤", "他说……好", "500ml*24罐", "AT&T手机"],
    )
    def test_not_debris(self, text):
        assert not special_characters(text)

    def test_han_share(self):
        assert han_share("红色 dress") == 2 / 7
        assert han_share("123 !") == 0
        assert CaptionJudge(CaptionRules(min_han_share=0.3))("nice red dress 裙").reason == "caption_language"

    @needs_shared
    def test_tokens(self):
        counter = token_counter(SHARED / "models/chinese-roberta-wwm-ext")
        assert counter("一件红色T恤") == (6, 0)
        assert counter("\U0001f600裙")[1] == 1
        judge = CaptionJudge(CaptionRules(min_tokens=2, max_tokens=4, max_unknown_share=0.2), counter)
        reasons = [judge(text).reason for text in ("裙", "红色的裙子", "红色裙子", "\U0001f600红色")]
        assert reasons == ["caption_too_few_tokens", "caption_too_many_tokens", "", "caption_unknown_tokens"]

    def test_tokens_of_sentencepiece(self, tmp_path):
        import sentencepiece

        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["红色裙子", "蓝色裙子", "红色上衣"] * 10), model_prefix=str(tmp_path / "m"),
            vocab_size=12, hard_vocab_limit=False, model_type="char", minloglevel=2,
        )  # fmt: skip
        tokens, unknown = token_counter(tmp_path / "m.model")("红色X裙")
        assert unknown == 1 and tokens >= 4
        with pytest.raises(FileNotFoundError, match="no text tokenizer"):
            token_counter(tmp_path)

    def test_counting_without_a_tokenizer_is_refused(self):
        with pytest.raises(ValueError, match="--tokenizer"):
            CaptionJudge(CaptionRules(max_tokens=8))


class TestTitles:
    @pytest.mark.parametrize(
        ("title", "expected"),
        [
            ("【全国包邮】2023夏季新款韩版连衣裙 女连衣裙 修身显瘦 ★★★", "夏季 韩版连衣裙 女 修身显瘦"),
            ("【纯棉】T恤 男 短袖 T恤 正品保证 假一赔十", "纯棉 T恤 男 短袖"),
            ("５００ｍｌ保温杯　不锈钢保温杯 买一送一!!!", "500ml保温杯 不锈钢"),
            ("可口可乐 330ml*24罐 整箱装 满99减10 第二件半价", "可口可乐 330ml*24罐 整箱装"),
            ("黑色裙子配黑色腰带", "黑色裙子配黑色腰带"),
            ("折叠桌 8折叠 5折起", "折叠桌 8折叠"),
            ("现货 3XL 大码 女装 1.5米 床单 四件套四件套", "3XL 大码 女装 1.5米 床单 四件套"),
            ("特价9.9元 抱枕 45cm×45cm (包邮)", "抱枕 45cm×45cm"),
            ("限量版手表 机械 新款 coco同款", "手表 机械 coco"),
            ("口红 301# 官方旗舰店", "口红 301#"),
            ("全国包邮", ""),
        ],
    )
    def test_sale_goes_product_stays(self, title, expected):
        assert TitleNormaliser.default()(title) == expected

    def test_idempotent_and_attributes_stay(self):
        """Random soups: normalising twice changes nothing; no colour or material is lost, nor a measure."""
        normalise, lexicon, generator = TitleNormaliser.default(), load_lexicon(), random.Random(3)
        known = lexicon.classes["colour"] + lexicon.classes["material"] + lexicon.classes["kind"]
        soup = ["包邮", "【", "】", "!!", "新款", "正品", "2024", " ", " ", "，", "买2送1", "￥9.9"]
        for _ in range(500):
            parts = [generator.choice(known if generator.random() < 0.4 else soup) for _ in range(12)] + [
                " 500ml"
            ]
            title = " ".join(parts)
            once = normalise(title)
            assert normalise(once) == once
            assert "500ml" in once
            for kind in ("colour", "material", "kind"):
                before = {w for part in parts for w in lexicon.attributes(part).get(kind, [])}
                assert before <= set(lexicon.attributes(once).get(kind, [])), title

    def test_longest_match(self):
        words = [(w.text, w.kind) for w in load_lexicon().words("浅蓝色牛仔外套abc")]
        assert words == [("浅蓝色", "colour"), ("牛仔外套", "kind"), ("abc", "")]


def textured(seed: int, side: int = 200) -> Image.Image:
    """An image like a photo: smooth colours, one body with sharp edges, fine grain, no repeats."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(60, 220, (5, 5, 3), np.uint8))
    image = coarse.resize((side, side), Image.Resampling.BICUBIC)
    corners = [tuple(int(v) for v in generator.integers(20, side - 20, 2)) for _ in range(7)]
    ImageDraw.Draw(image).polygon(corners, tuple(int(v) for v in generator.integers(0, 255, 3)))
    grain = generator.normal(0, 6, (side, side, 1))
    return Image.fromarray((np.asarray(image) + grain).clip(0, 255).astype(np.uint8))


def watermarked(image: Image.Image, strength: int) -> Image.Image:
    layer = Image.new("L", image.size, 0)
    draw, font = ImageDraw.Draw(layer), ImageFont.load_default(14)
    for y in range(0, image.height, 34):
        for x in range(-10 * (y // 34 % 2), image.width, 62):
            draw.text((x, y), "SHOP.CN", strength, font)
    marked = image.copy()
    marked.paste("white", mask=layer)
    return marked


class TestFlags:
    def test_blur(self):
        for seed in range(5):
            image = textured(seed)
            small = image.resize((50, 50), Image.Resampling.LANCZOS).resize(
                (200, 200), Image.Resampling.BICUBIC
            )
            assert sharpness(grey256(image)) > 0.2
            assert sharpness(grey256(image.filter(ImageFilter.GaussianBlur(2)))) < 0.12
            assert sharpness(grey256(small)) < sharpness(grey256(image)) / 2

    def test_tiled_overlay_and_stripes(self):
        for seed in range(5):
            image = textured(seed)
            assert tiling(grey256(image)) < 0.06
            assert tiling(grey256(watermarked(image, 120))) > 0.06
        stripes = Image.fromarray(np.uint8(np.arange(200)[None, :] // 10 % 2 * 120 + np.zeros((200, 1)) + 60))
        assert tiling(grey256(stripes)) < 0.06, "a striped shirt is no watermark"

    def test_tiny_and_flat_images_are_measured_too(self):
        for size in ((1, 1), (2, 300), (64, 64), (256, 256)):
            grey = grey256(Image.new("RGB", size, "grey"))
            assert sharpness(grey) == 0.0 and tiling(grey) == 0.0

    def test_flags_are_written_or_drop(self, tmp_path):
        def jpeg(image):
            return encoded(image, "jpg", quality=92)

        samples = {
            "blank": (jpeg(Image.new("RGB", (200, 200), "white")), "一件上衣"),
            "blurred": (jpeg(textured(1).filter(ImageFilter.GaussianBlur(4))), "一件衬衫"),
            "good": (jpeg(textured(2)), "一条裙子"),
            "marked": (jpeg(watermarked(textured(3), 150)), "一件外套"),
        }
        src = write_folder(tmp_path / "in", samples)
        report = clean_main([str(src), str(tmp_path / "out"), "--rules", "shop", "--workers", "0"])
        assert {r.key: r.meta.get("flags") for r in open_source(tmp_path / "out")} == {
            "blurred": ["blurred"], "good": None, "marked": ["watermark"],
        }  # fmt: skip
        assert [(row["key"], row["reason"]) for row in dropped(tmp_path / "out")] == [
            ("blank", "near_constant")
        ]
        assert report["counts"] == {"flag blurred": 1, "flag watermark": 1}
        argv = [str(src), str(tmp_path / "strict"), "--rules", "shop", "--workers", "0"]
        clean_main([*argv, "--images.drop-flags", "near_constant", "blurred", "watermark"])
        assert [r.key for r in open_source(tmp_path / "strict")] == ["good"]


class TestClean:
    def test_accounts_for_every_row_and_keeps_bytes(self, tmp_path):
        src = write_t2i(tmp_path / "in", 12)
        with (src / "T2I_train.img.tsv").open("a") as file:
            file.write("broken\t!!!!\n")
        argv = [
            str(src),
            str(tmp_path / "out"),
            "--captions.max-chars",
            "8",
            "--images.drop-duplicates",
            "True",
        ]
        report = clean_main([*argv, "--workers", "2"])
        before = {r.key: r for r in open_source(src) if isinstance(r, Record)}
        after = {r.key: r for r in open_source(tmp_path / "out")}
        assert (
            report["read"]
            == 13
            == report["kept"] + report["dropped"]
            == len(after) + len(dropped(tmp_path / "out"))
        )
        assert {row["reason"] for row in dropped(tmp_path / "out")} == {"caption_too_long", "bad_base64"}
        assert all(
            after[key].image == before[key].image and after[key].captions == before[key].captions
            for key in after
        )

    def test_several_captions_lose_the_bad_ones_alone(self, tmp_path):
        src = write_folder(
            tmp_path / "in",
            {"a": (some_image(1), "包邮 红色衬衫\n!!!!!!\n蓝色衬衫"), "b": (some_image(2), "包邮")},
        )
        clean_main(
            [str(src), str(tmp_path / "out"), "--captions.normalise", "shop", "--captions.min-chars", "2"]
        )
        (record,) = open_source(tmp_path / "out")
        assert record.captions == ("红色衬衫", "蓝色衬衫")
        assert record.meta["title"] == "包邮 红色衬衫"
        assert record.meta["captions_dropped"] == [["!!!!!!", "caption_too_short"]]
        assert dropped(tmp_path / "out")[0]["reason"] == "caption_too_short"

    def test_same_bytes_are_kept_once(self, tmp_path):
        src = write_folder(
            tmp_path / "in", {n: (some_image(s), "一件衬衫") for n, s in [("a", 1), ("b", 2), ("c", 1)]}
        )
        clean_main([str(src), str(tmp_path / "out"), "--images.drop-duplicates", "True", "--workers", "0"])
        assert [r.key for r in open_source(tmp_path / "out")] == ["a", "b"]
        assert [(r["key"], r["reason"]) for r in dropped(tmp_path / "out")] == [("c", "duplicate_image")]

    def test_scores_of_a_ranker(self, tmp_path):
        """As a file, and as a callable: the same rows."""
        src = write_easynlp(tmp_path / "in", 6)
        keys = [r.key for r in open_source(src)]
        scores = dict(zip(keys[:5], (0.1, 0.5, 0.3, 0.05, 0.9), strict=True))
        text = "".join(json.dumps({"key": k, "score": s}) + "\n" for k, s in scores.items())
        (tmp_path / "scores.jsonl").write_text(text, "utf-8")
        argv = ["--scores", str(tmp_path / "scores.jsonl"), "--min-score", "0.3", "--workers", "0"]
        clean_main([str(src), str(tmp_path / "out"), *argv])
        assert [r.key for r in open_source(tmp_path / "out")] == [keys[1], keys[2], keys[4]]
        assert [r["reason"] for r in dropped(tmp_path / "out")] == ["low_score", "low_score", "no_score"]

        asked = []

        def score(text, images):
            asked.append((text, images[0].mode))
            return np.array([list(scores.values())[len(asked) - 1] if len(asked) <= 5 else -1.0])

        clean(CleanConfig(src, str(tmp_path / "out2"), min_score=0.3, workers=0), score)
        assert [r.key for r in open_source(tmp_path / "out2")] == [keys[1], keys[2], keys[4]]
        assert asked[0] == (next(iter(open_source(src))).captions[0], "RGB")

    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            (["--rules", "nonsense"], "choose shop, wukong or wukong-food"),
            (["--captions.max-tokens", "3"], "--tokenizer"),
            (["--captions.keyword-file", "no-such.txt"], "no keyword file"),
            (["--captions.forbidden", "("], "regular expression"),
            (["--min-score", "0.2"], "--scores"),
            (["--rules", "shop", "--config", "x.yaml"], "give one of them"),
        ],
    )
    def test_mistakes_are_named(self, tmp_path, capsys, argv, message):
        src = write_easynlp(tmp_path / "in", 2)
        with pytest.raises(SystemExit) as exit_:
            clean_main([str(src), str(tmp_path / "out"), *argv])
        assert exit_.value.code == 2
        error = capsys.readouterr().err
        assert message in error and "Traceback" not in error

    def test_a_folder_with_other_data_is_left_alone(self, tmp_path):
        src = write_easynlp(tmp_path / "in", 2)
        (tmp_path / "out").mkdir()
        (tmp_path / "out/train-00000.tar").write_bytes(b"mine")
        with pytest.raises(ValueError, match="choose an empty folder"):
            clean(CleanConfig(src, str(tmp_path / "out"), workers=0))
        assert (tmp_path / "out/train-00000.tar").read_bytes() == b"mine"

    def test_to_a_url(self, tmp_path):
        """Any fsspec target gets the same bytes as a folder."""
        import fsspec

        src = write_easynlp(tmp_path / "in", 5)
        clean(CleanConfig(src, str(tmp_path / "out"), samples_per_shard=2, workers=0))
        clean(CleanConfig(src, "memory://clean-test/out", samples_per_shard=2, workers=0))
        memory = fsspec.filesystem("memory")
        names = sorted(path.rpartition("/")[2] for path in memory.ls("/clean-test/out", detail=False))
        assert names == sorted(p.name for p in (tmp_path / "out").iterdir())
        assert all(memory.cat(f"/clean-test/out/{n}") == (tmp_path / "out" / n).read_bytes() for n in names)

    def test_presets_are_configs(self):
        assert preset_to_config(["a", "b", "--rules=wukong"]) == [
            "a",
            "b",
            "--config",
            str(rules_path("wukong")),
        ]


class Stop(Exception):
    pass


def test_an_interrupted_run_ends_in_the_same_bytes(tmp_path, monkeypatch):
    """Interrupted after each number of rows in turn, with duplicates, drops and flags before and after."""
    samples = {}
    for i in range(30):
        image = Image.new("RGB", (200, 200), "white") if i % 7 == 3 else textured(i % 11)
        samples[f"{i:03d}"] = (encoded(image, "jpg"), "x" if i % 5 == 4 else f"第{i}件上衣")
    src = write_folder(tmp_path / "in", samples)
    rules = load_rules("shop")

    def config(name):
        return CleanConfig(
            src, str(tmp_path / name), rules.captions, rules.images, samples_per_shard=4, workers=0
        )

    whole = clean(config("whole"))
    expected = {p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir() if p.is_file()}
    assert whole["kept"] >= 8 and len(whole["reasons"]) == 3
    from data_tools.shards.image_shards import ShardWriter

    write = ShardWriter.write
    for stop in range(1, whole["kept"]):
        calls = 0

        def failing(self, record, limit=stop):
            nonlocal calls
            calls += 1
            if calls > limit:
                raise Stop
            return write(self, record)

        with monkeypatch.context() as patch:
            patch.setattr(ShardWriter, "write", failing)
            with pytest.raises(Stop):
                clean(config(f"stop{stop}"))
        clean(config(f"stop{stop}"))
        found = {p.name: p.read_bytes() for p in (tmp_path / f"stop{stop}").iterdir() if p.is_file()}
        assert found == expected, stop


@pytest.mark.slow
def test_kill_9_at_random_moments(tmp_path):
    write_t2i(tmp_path / "in", 400)
    generator = random.Random(4)
    command = [sys.executable, "-m", "data_tools.clean", str(tmp_path / "in")]
    options = ["--rules", "shop", "--images.min-side", "0", "--samples-per-shard", "10", "--workers", "1"]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    start = time.monotonic()
    subprocess.run([*command, str(tmp_path / "whole"), *options], env=env, check=True, capture_output=True)
    seconds = time.monotonic() - start
    for _ in range(10):
        process = subprocess.Popen(
            [*command, str(tmp_path / "killed"), *options], env=env, stderr=subprocess.DEVNULL
        )
        time.sleep(generator.uniform(0.3, 0.95) * seconds)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run([*command, str(tmp_path / "killed"), *options], env=env, check=True, capture_output=True)
    whole, killed = (
        {p.name: p.read_bytes() for p in (tmp_path / name).iterdir() if p.is_file()}
        for name in ("whole", "killed")
    )
    assert whole == killed
