"""The judges of the synthetic goods: right on held-out pictures, cached, not fooled by what is not there."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from data_tools.synthetic import COLOR_RGB, COLORS, KINDS, draw_goods, draw_sample
from evaluation.colors import goods_lab, goods_mask, tone_votes
from evaluation.judge import JudgeConfig, KindJudge, degrade, dominant_color, judge_accuracy, train_judge

SMALL = JudgeConfig(num_train=800, num_epochs=10, batch_size=50)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def small_judge(cache):
    return train_judge(SMALL, cache)


def held_out(count: int, seed: int = 424_242):
    return [draw_sample(seed, index) for index in range(count)]


def test_colours_are_measured_right_on_held_out_pictures():
    samples = held_out(500)
    right = [dominant_color(s.image) == s.color for s in samples]
    assert np.mean(right) >= 0.98
    for color in COLORS:
        assert np.mean([r for r, s in zip(right, samples, strict=True) if s.color == color]) >= 0.9, color


def test_colours_are_measured_right_on_degraded_pictures():
    rng = np.random.default_rng(0)
    assert np.mean([dominant_color(degrade(rng, s.image)) == s.color for s in held_out(300)]) >= 0.97


def test_blurred_stripes_keep_the_colour_of_the_goods():
    """At a blur as wide as a stripe red and white mix to pink nearly everywhere."""
    right = []
    for seed in range(40):
        color = list(COLORS)[seed % 8]
        picture = draw_goods(np.random.default_rng(seed), list(KINDS)[seed % 7], color, "striped", "white")
        right.append(dominant_color(picture.filter(ImageFilter.GaussianBlur(2.0))) == color)
    assert np.mean(right) >= 0.95


@pytest.mark.parametrize("pattern", ["striped", "dotted"])
@pytest.mark.parametrize("color", COLORS)
def test_stripes_and_dots_do_not_hide_the_colour(color, pattern):
    pictures = [
        draw_goods(np.random.default_rng(seed), kind, color, pattern, ground)
        for seed, (kind, ground) in enumerate(
            [("tshirt", "white"), ("dress", "wood"), ("cup", "grey"), ("bag", "wood")]
        )
    ]
    assert [dominant_color(p) for p in pictures].count(color) >= 3


@pytest.mark.parametrize("color", COLORS)
def test_a_flat_square_has_the_colour_of_its_tone(color):
    picture = Image.new("RGB", (64, 64), (176, 178, 181))
    picture.paste(COLOR_RGB[color], (16, 16, 48, 48))
    assert dominant_color(picture) == color
    votes = dict(zip(COLOR_RGB, tone_votes(goods_lab(picture)), strict=True))
    assert votes[color] == pytest.approx(1.0, abs=0.01)


def test_the_mask_is_what_is_not_joined_to_the_border():
    rgb = np.full((64, 64, 3), 0.9, dtype=np.float32)
    rgb[20:40, 10:50] = (0.8, 0.1, 0.1)
    rgb[25:30, 20:30] = 0.9  # a hole of the ground's colour counts as goods
    mask = goods_mask(rgb)
    assert mask.sum() == 20 * 40 and mask[20:40, 10:50].all()


def test_the_size_of_the_picture_hardly_matters():
    samples = [(draw_sample(7, i, 64), draw_sample(7, i, 160)) for i in range(60)]
    assert np.mean([dominant_color(a.image) == dominant_color(b.image) for a, b in samples]) >= 0.95


def test_the_judge_is_small_and_takes_pictures_of_any_size(small_judge):
    assert sum(p.numel() for p in small_judge.parameters()) < 300_000
    pictures = [draw_sample(1, 0, size).image for size in (64, 96, 128)]
    probabilities = small_judge.probabilities(pictures)
    assert probabilities.shape == (3, len(KINDS))
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(3))
    assert small_judge.kinds([]) == []


def test_a_short_training_already_tells_most_kinds(small_judge):
    shares = judge_accuracy(small_judge, num_images=200)
    assert shares["kind_sharp"] > 0.85 and shares["kind_degraded"] > 0.8


def test_one_picture_at_a_time_or_all_at_once_is_the_same(small_judge):
    pictures = [s.image for s in held_out(6)]
    single = torch.cat([small_judge.probabilities([p]) for p in pictures])
    torch.testing.assert_close(small_judge.probabilities(pictures), single, rtol=1e-4, atol=1e-5)


def test_the_trained_judge_comes_from_the_cache(small_judge, cache, capsys):
    again = train_judge(SMALL, cache)
    assert "training" not in capsys.readouterr().out
    for name, value in small_judge.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    assert len(list(cache.iterdir())) == 1


def test_training_leaves_the_global_generator_alone_and_repeats_itself(tmp_path):
    config = JudgeConfig(num_train=40, num_epochs=1, batch_size=20)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = train_judge(config, tmp_path / "a")
    assert torch.equal(torch.rand(3), expected)
    second = train_judge(config, tmp_path / "b")
    images = [s.image for s in held_out(4)]
    assert torch.equal(first.probabilities(images), second.probabilities(images))


def test_another_recipe_or_drawing_gets_another_file(tmp_path, monkeypatch):
    config = JudgeConfig(num_train=40, num_epochs=1, batch_size=20)
    train_judge(config, tmp_path)
    train_judge(JudgeConfig(num_train=40, num_epochs=1, batch_size=20, seed=9), tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    monkeypatch.setattr("evaluation.judge.drawing_fingerprint", lambda: "another drawing")
    train_judge(config, tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("values", [{"num_train": 0}, {"num_epochs": 0}, {"num_train": 10, "batch_size": 20}])
def test_an_impossible_recipe_is_refused(values):
    with pytest.raises(ValueError, match="batch_size <= num_train"):
        JudgeConfig(**values)


@pytest.mark.slow
def test_the_full_judge_is_right_in_99_of_100(tmp_path):
    judge = train_judge(JudgeConfig(), tmp_path)
    assert isinstance(judge, KindJudge) and not judge.training
    shares = judge_accuracy(judge, num_images=1000)
    assert shares["kind_sharp"] >= 0.99 and shares["kind_degraded"] >= 0.98
    assert shares["color_sharp"] >= 0.97 and shares["color_degraded"] >= 0.97
