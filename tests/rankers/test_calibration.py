from itertools import pairwise

import numpy as np
import pytest

from data_tools.shards.index import ShardIndex
from rankers import load_ranker
from rankers.calibrate import main
from rankers.calibration import (
    Calibration,
    NegativeWords,
    cache_path,
    calibrate,
    default_lexicon,
    hard_negatives,
    place_among,
    quantiles,
)
from rankers.retrieval import load_pairs
from rankers.training.pairs import AttributeConfig

LEXICON = NegativeWords(("红色", "酒红色", "蓝色"), ("连衣裙", "裙", "红西柚", "鞋子"))


def test_hard_negatives_swap_the_longest_colour_and_the_longest_kind():
    assert hard_negatives("一件酒红色的连衣裙", LEXICON) == [
        "一件红色的连衣裙",
        "一件蓝色的连衣裙",
        "一件酒红色的红西柚",
        "一件酒红色的鞋子",
    ]
    assert hard_negatives("红西柚", LEXICON) == ["连衣裙", "裙", "鞋子"], (
        "a colour inside a kind is no colour"
    )
    assert hard_negatives("礼物", LEXICON) == []
    words = default_lexicon()
    assert len(words.colors) > 20 and len(words.categories) > 40 and hard_negatives("红色T恤", words)


def test_quantiles_and_places():
    values = np.linspace(0.1, 0.3, 1001)
    table = quantiles(values)
    assert len(table) == 101 and all(a < b for a, b in pairwise(table))
    assert place_among(table, 0.2) == pytest.approx(50, abs=0.1)
    assert (place_among(table, 0.0), place_among(table, 9.0)) == (0.0, 100.0)
    assert quantiles([]) == () and len(set(quantiles([0.5, 0.5]))) == 101


def test_matched_pairs_stand_above_mismatched_ones_for_a_ranker_that_knows(shards):
    from test_retrieval import Knowing

    pairs = load_pairs(ShardIndex.open(shards, "val"), AttributeConfig(fact_fields=("label_zh", "color_zh")))
    lexicon = NegativeWords(("红色", "蓝色", "绿色", "黄色"), ("杯子", "鞋子", "帽子"))
    found = calibrate(Knowing(pairs), pairs, lexicon, "val")
    assert found.num_images == 24 and min(found.margin) > 0
    assert found.matched[0] > found.mismatched[-1] - 1e-6
    assert found.percentile(99) == 100 and found.mismatched_percentile(-1) == 0


def test_a_calibration_is_found_again(shards, ranker_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    made = main(["--ranker", str(ranker_dir), "--data", str(shards)])
    assert Calibration.load(cache_path(str(ranker_dir))) == made
    assert "24 images" in capsys.readouterr().out
    again = load_ranker(ranker_dir).calibration
    assert again == made and set(again.lexicon.categories) == {"杯子", "鞋子", "帽子"}


@pytest.mark.parametrize("arguments", [["--ranker", "none"], ["--data", "none"], ["--rankr", "x"]])
def test_bad_input_ends_with_code_2(ranker_dir, arguments, capsys):
    if "--ranker" not in arguments:
        arguments = ["--ranker", str(ranker_dir), *arguments]
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "c.json").write_text("{}")
    with pytest.raises(ValueError, match="is no calibration file"):
        Calibration.load(tmp_path / "c.json")
    with pytest.raises(FileNotFoundError, match="no calibration file"):
        Calibration.load(tmp_path / "d.json")
