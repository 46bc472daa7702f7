import numpy as np
import pytest

from data_tools.rules.colors import find_color, with_color
from data_tools.rules.lexicon import load_lexicon
from evaluation.metrics.attributes import SlotWords
from evaluation.reference import Facts
from rankers.calibration import NegativeWords, hard_negatives
from rankers.training.pairs import swap_color

COLORS = ("白色", "红色", "酒红色")
OF_BACKGROUNDS = [
    "石榴产品图，白色背景",
    "石榴，纯白色背景",
    "石榴，白色的背景",
    "石榴，白色纯色背景",
    "石榴，背景白色",
    "石榴，背景为白色",
]


@pytest.mark.parametrize("text", OF_BACKGROUNDS)
def test_the_colour_of_a_background_is_not_the_goods(text):
    assert find_color(text, COLORS) == ("", -1)
    assert "colour" not in load_lexicon().attributes(text)
    assert hard_negatives(text, NegativeWords(COLORS, ("石榴", "T恤"))) == [text.replace("石榴", "T恤")]
    facts = [Facts("k", text, "石榴", "", "", "白色"), Facts("l", "红色T恤", "T恤", "红色", "", "红色")]
    words = SlotWords.of_reference([*facts, Facts("m", "白色T恤", "T恤", "白色", "", "白色")])
    assert words.parse(text).words == {"category": "石榴"}
    assert swap_color(text, "白色", COLORS, np.random.default_rng(0)) is None


def test_the_colour_of_the_goods_is_found_behind_that_of_the_background():
    text = "白色背景上的一件白色T恤"
    assert find_color(text, COLORS) == ("白色", 8)
    assert with_color(text, "白色", "红色") == "白色背景上的一件红色T恤"
    assert swap_color(text, "白色", COLORS[:2], np.random.default_rng(0)) == (
        "白色背景上的一件红色T恤",
        "红色",
    )
    words = SlotWords({"category": ("T恤", "石榴"), "color": COLORS})
    assert words.parse("白色背景上的一件红色T恤").words["color"] == "红色"
    assert words.negatives(text, "color") == ["白色背景上的一件红色T恤", "白色背景上的一件酒红色T恤"]


def test_the_longest_colour_counts_and_none_is_none():
    assert find_color("一件酒红色的长裙", COLORS) == ("酒红色", 2)
    assert find_color("长裙", COLORS) == ("", -1)
    assert find_color("长裙", [""]) == ("", -1)
    assert with_color("长裙", "白色", "红色") == "长裙"
    assert load_lexicon().attributes("白底碎花白色连衣裙")["colour"] == ["白色"]
