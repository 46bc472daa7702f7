"""The benchmark of reranking; it stands here since its material does."""

import json

import pytest

from benchmarks.quality.best_of_n import choose_prompts, main, verdicts
from evaluation.compare.choice import ALL_NAMED, Curve, Point
from evaluation.judges.goods import GoodsJudge
from evaluation.metrics.attributes import SlotWords
from evaluation.metrics.statistics import Interval
from evaluation.reference import Facts


def arguments(tmp_path, shards, judge_dir, ranker_dir, generator_dir, **changed):
    flags = {"data": shards, "judge": judge_dir, "ranker": ranker_dir, "checkpoint": generator_dir}
    flags |= {"out": tmp_path / "out", "cache": tmp_path / "cache", "num_prompts": 4, "num_images": 3}
    flags |= {"batch_size": 6, "replicates": 50, "device": "cpu"} | changed
    return [word for n, v in flags.items() for word in (f"--{n.replace('_', '-')}", str(v))]


def test_from_captions_to_the_target(tmp_path, shards, judge_dir, ranker_dir, generator_dir, capsys):
    line = arguments(tmp_path, shards, judge_dir, ranker_dir, generator_dir)
    curves = main(line)
    assert [c.name for c in curves] == ["category right", "colour right", ALL_NAMED, "colour right, pixels"]
    assert all([p.width for p in c.points] == [1, 2, 3] and c.points[0].prompts == 4 for c in curves)
    shown = capsys.readouterr().out
    assert shown.count("the target") == 4 and "on fewer than 200 prompts" in shown
    found = json.loads((tmp_path / "out" / "results.json").read_text("utf-8"))
    assert found["prompts"] == 4 and set(found["curves"]) == {c.name for c in curves}
    assert (tmp_path / "out" / "report.html").read_text("utf-8").count("<polyline") == 4
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "images").glob("*.png")}
    assert len(stamps) == 12
    again = main(line)
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps, "nothing is drawn twice"
    assert [p.to_json() for c in again for p in c.points] == [p.to_json() for c in curves for p in c.points]


def test_prompts_with_colours_come_first(judge_dir):
    judge = GoodsJudge.from_pretrained(judge_dir, "cpu")
    captions = ["帽子", "一个红色的帽子", "汽车", "鞋子", "蓝色的鞋子", "帽子", ""]
    facts = [Facts(str(i), c, c[-2:], c[-5:-3] if "色" in c else "", c[-2:]) for i, c in enumerate(captions)]
    lexicon = SlotWords({"category": ("帽子", "鞋子"), "color": ("红色", "蓝色")})
    assert choose_prompts(facts, judge, lexicon, 0, 0) == ["一个红色的帽子", "蓝色的鞋子", "帽子", "鞋子"]
    assert choose_prompts(facts, judge, lexicon, 2, 0) == ["一个红色的帽子", "蓝色的鞋子"]
    assert len(choose_prompts(facts, judge, lexicon, 3, 0)) == 3
    more = choose_prompts(facts, judge, lexicon, 0, 0, recolored=2)
    assert more[:2] == ["一个红色的帽子", "蓝色的鞋子"] and more[-2:] == ["帽子", "鞋子"]
    assert len(set(more)) == 8 and {t[-2:] for t in more[2:4]} == {"帽子", "鞋子"}
    assert not any("红色的帽子" in t or "蓝色的鞋子" in t for t in more[2:6])
    assert choose_prompts(facts, judge, lexicon, 3, 0, recolored=2)[2] in more[2:4]
    with pytest.raises(ValueError, match="no caption names a category that the judge knows"):
        choose_prompts(facts[2:3], judge, lexicon, 0, 0)


def test_the_bar_is_an_interval_above_zero():
    def made(low, prompts):
        none, gain = Interval(0, 0, 0), Interval(0.1, low, 0.2)
        return Curve(
            "category right", "r", (Point(1, none, none, prompts), Point(8, none, gain, prompts)), None
        )

    assert "is met" in verdicts([made(0.01, 300)])[0] and "fewer" not in verdicts([made(0.01, 300)])[0]
    assert "is MISSED" in verdicts([made(-0.01, 300)])[0] and "fewer" in verdicts([made(0.01, 199)])[0]


def test_what_cannot_be_measured_is_refused(tmp_path, shards, judge_dir, ranker_dir, generator_dir, capsys):
    for changed, expected in [
        ({"data": tmp_path / "none"}, "no data folder"),
        ({"judge": ranker_dir}, "judge"),
        ({"ranker": tmp_path / "none"}, "none"),
        ({"num_images": 1}, "num_images must be at least 2"),
    ]:
        with pytest.raises(SystemExit) as end:
            main(arguments(tmp_path, shards, judge_dir, ranker_dir, generator_dir, **changed))
        message = capsys.readouterr().err
        assert end.value.code == 2 and expected in message, message
