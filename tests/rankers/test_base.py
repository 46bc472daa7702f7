from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_goods import draw

from rankers import default_ranker, load_ranker
from rankers.base import FeatureCache, TwoTowerRanker, as_rgb, content_hash, identities
from rankers.ensemble import EnsembleRanker, ranks


def some_images(count: int) -> list[Image.Image]:
    return [draw("杯子", "红色", seed) for seed in range(count)]


class CountingTowers:
    """Real towers that count the images they encode."""

    def __init__(self, towers) -> None:
        self.towers, self.name, self.encoded = towers, towers.name, 0

    def preprocess(self, images):
        self.encoded += len(images)
        return self.towers.preprocess(images)

    def encode_images(self, pixels):
        return self.towers.encode_images(pixels)

    def encode_texts(self, texts):
        return self.towers.encode_texts(texts)


def test_batches_equal_singles_and_order_is_kept(ranker_dir):
    images = some_images(7)
    wide = load_ranker(ranker_dir, precision="fp32")
    narrow = load_ranker(ranker_dir, precision="fp32")
    narrow.batch_size = 2
    scores = wide.score("红色的杯子", images)
    assert scores.shape == (7,) and scores.dtype == torch.float32 and scores.std() > 0
    torch.testing.assert_close(scores, narrow.score("红色的杯子", images), atol=1e-5, rtol=0)
    single = torch.cat([load_ranker(ranker_dir, precision="fp32").score("红色的杯子", [i]) for i in images])
    torch.testing.assert_close(scores, single, atol=1e-5, rtol=0)
    matrix = wide.score_matrix(["红色的杯子", "蓝色鞋子"], images)
    torch.testing.assert_close(matrix[0], scores, atol=1e-6, rtol=0)
    assert matrix.shape == (2, 7) and matrix.abs().max() <= 1.00001


def test_a_image_is_encoded_once_whatever_file_it_came_from(ranker_dir):
    towers = CountingTowers(load_ranker(ranker_dir).towers)
    ranker = TwoTowerRanker(towers)
    images = some_images(3)
    first = ranker.score("红色", [*images, images[0].copy()])
    assert towers.encoded == 3 and first[0] == first[3]
    torch.testing.assert_close(ranker.score("红色", images), first[:3])
    assert towers.encoded == 3
    assert ranker.cache.hits >= 3


def test_the_cache_forgets_the_image_used_longest_ago():
    cache = FeatureCache(2)
    for name in (b"a", b"b"):
        cache.put(name, torch.zeros(1))
    assert cache.get(b"a") is not None
    cache.put(b"c", torch.zeros(1))
    assert cache.get(b"b") is None and cache.get(b"a") is not None


def test_images_of_mixed_sizes_and_modes(ranker_dir):
    base = draw("杯子", "红色", 0, 64)
    clear = base.convert("RGBA")
    clear.putalpha(0)
    images = [base, base.resize((90, 40)), base.convert("L"), base.convert("P"), base.convert("CMYK"), clear]
    images += [base.convert("1"), Image.new("I;16", (40, 40), 30000)]
    assert load_ranker(ranker_dir).score("红色的杯子", images).isfinite().all()
    assert as_rgb(clear).getpixel((0, 0)) == (255, 255, 255)
    assert as_rgb(images[-1]).getpixel((0, 0)) == (117, 117, 117)
    assert len({content_hash(i) for i in images}) == len(images)


def test_bad_input_is_one_sentence(ranker_dir):
    ranker = load_ranker(ranker_dir)
    with pytest.raises(ValueError, match="no images"):
        ranker.score("红色", [])
    with pytest.raises(ValueError, match="empty"):
        ranker.score("  ", some_images(1))
    assert ranker.score("红" * 10_000, some_images(1)).isfinite().all()
    assert ranker.towers.num_truncated == 1
    assert ranker.score("未见字", some_images(2)).isfinite().all(), "unknown characters only"


def test_ranks_share_ties():
    assert ranks(torch.tensor([3.0, 1.0, 2.0])).tolist() == [1.0, 0.0, 0.5]
    assert ranks(torch.tensor([1.0, 1.0, 0.0])).tolist() == [0.75, 0.75, 0.0]
    assert ranks(torch.tensor([5.0])).tolist() == [0.5]


def test_an_ensemble_averages_ranks_not_scores(ranker_dir):
    class Fixed:
        calibration = None

        def __init__(self, name, values):
            self.name, self.values = name, values

        def score(self, text, images):
            return torch.tensor(self.values)

    both = EnsembleRanker([Fixed("a", [1000.0, 0.0, -1.0]), Fixed("b", [0.1, 0.3, 0.2])])
    assert both.score("x", some_images(3)).tolist() == pytest.approx([0.5, 0.75, 0.25])
    loaded = load_ranker(f"{ranker_dir}, {ranker_dir}")
    alone = load_ranker(ranker_dir).score("红色", some_images(4))
    assert torch.equal(loaded.score("红色", some_images(4)).argsort(), alone.argsort())
    with pytest.raises(ValueError, match="at least two"):
        EnsembleRanker([both])


def test_the_default_is_what_ships_then_a_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert default_ranker() == Path(__file__).parents[2] / "pretrained/goods-128/ranker"
    monkeypatch.setattr("rankers.DEFAULT_RANKER", "pretrained/none")
    with pytest.raises(FileNotFoundError, match=r"rankers\.train"):
        default_ranker()


def test_the_default_is_the_newest_run(tmp_path, monkeypatch, ranker_dir):
    import shutil

    monkeypatch.chdir(tmp_path)
    shutil.copytree(ranker_dir, tmp_path / "pretrained/goods-128/ranker")
    assert default_ranker().parts[0] == "pretrained"
    shutil.copytree(ranker_dir, tmp_path / "runs/mine/step_00000007")
    (tmp_path / "runs/mine/latest").symlink_to("step_00000007")
    assert default_ranker().name == "step_00000007"
    assert load_ranker("runs/mine").score("红色", some_images(1)).isfinite().all()


def test_weights_are_told_apart_and_known_again_in_fewer_bits(ranker_dir, tmp_path):
    import shutil

    from rankers.release import main as release

    ranker = load_ranker(ranker_dir)
    for precision in ("float16", "bfloat16", "int8"):
        release([str(ranker_dir), str(tmp_path / precision), "--precision", precision])
    release([str(tmp_path / "int8"), str(tmp_path / "again")])  # a release of a release
    shutil.copytree(ranker_dir, tmp_path / "copy")
    names = ("float16", "bfloat16", "int8", "again", "copy")
    assert {load_ranker(tmp_path / name).identity for name in names} == {ranker.identity}
    assert len(ranker.identity) == 64
    changed = load_ranker(ranker_dir)
    with torch.no_grad():
        next(changed.towers.model.parameters()).mul_(1.01)
    assert changed.identity != ranker.identity
    assert identities(EnsembleRanker([ranker, changed])) == [ranker.identity, changed.identity]
    assert identities(object()) == []
