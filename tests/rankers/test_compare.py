import json

import pytest
import torch

from rankers.compare import bootstrap_interval, main


def test_the_interval_of_a_share():
    hits = torch.arange(400) < 100
    low, high = bootstrap_interval(hits)
    assert low == pytest.approx(0.25 - 1.96 * (0.25 * 0.75 / 400) ** 0.5, abs=0.01)
    assert high == pytest.approx(0.25 + 1.96 * (0.25 * 0.75 / 400) ** 0.5, abs=0.01)
    assert bootstrap_interval(hits) == (low, high)


def test_one_table_of_several_rankers_and_chance(shards, ranker_dir, chinese_clip, tmp_path, capsys):
    arguments = ["--data", str(shards), "--rankers", str(ranker_dir), str(chinese_clip), "--out"]
    results = main([*arguments, str(tmp_path / "figures.json")])
    assert list(results) == ["chance", str(ranker_dir), str(chinese_clip)]
    assert results["chance"]["figures"]["kind_accuracy"] == pytest.approx(1 / 3)
    for result in list(results.values())[1:]:
        for k in (1, 5, 10):
            low, high = result["intervals"][f"recall@{k}"]
            assert low <= result["figures"][f"recall@{k}"] <= high
    written = json.loads((tmp_path / "figures.json").read_text())
    assert written["chance"] == results["chance"]
    assert "24 images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "none"], "no data folder none"),
        (["--limit", "1"], "limit must be at least 2"),
        (["--split", "best"], "no best-*.tar"),
    ],
)
def test_bad_input_ends_with_code_2(shards, ranker_dir, arguments, words, capsys):
    base = [] if "--data" in arguments else ["--data", str(shards)]
    with pytest.raises(SystemExit) as caught:
        main([*base, "--rankers", str(ranker_dir), *arguments])
    assert caught.value.code == 2
    assert words in " ".join(capsys.readouterr().err.replace("│", " ").split())
