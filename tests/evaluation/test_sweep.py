import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import yaml

from dalle.sampling import SamplingOptions
from evaluation.compare.arena_results import Difference
from evaluation.compare.sweep_page import show
from evaluation.compare.sweep_results import KNOBS, Trial, flags, mean_ranks, objective_metric, setting_name
from evaluation.metrics.rows import Metric
from evaluation.metrics.statistics import Interval
from evaluation.sweep import Options, main, search


def metric(name: str, value: float, higher: bool | None = True) -> Metric:
    return Metric(name, Interval(value, value, value), higher, "n", 4)


def trial(**values) -> Trial:
    metrics = {"frechet_distance[j]": metric("frechet_distance[j]", values["distance"], False)}
    metrics["category_right[j]"] = metric("category_right[j]", values["kind"])
    metrics["diversity[j]"] = metric("diversity[j]", 1.0, None)
    return Trial(SamplingOptions(cfg_scale=values["cfg"]), metrics)


def test_ranks_by_hand():
    trials = [
        trial(cfg=1, distance=5, kind=0.2),
        trial(cfg=2, distance=3, kind=0.4),
        trial(cfg=3, distance=3, kind=0.9),
    ]
    assert mean_ranks(trials, ["frechet_distance"]) == [2.0, 0.5, 0.5]
    assert mean_ranks(trials, ["frechet_distance", "category_right[j]"]) == [2.0, 0.75, 0.25]


def test_what_decides_is_named():
    metrics = trial(cfg=1, distance=5, kind=0.2).metrics
    assert objective_metric(metrics, "category_right").name == "category_right[j]"
    assert objective_metric({"FID": metric("FID", 1, False)}, "frechet_distance").name == "FID"
    with pytest.raises(ValueError, match=r"no metric 'clip_score' was measured .there are frechet_distance"):
        objective_metric(metrics, "clip_score")
    with pytest.raises(ValueError, match="neither better high nor low"):
        objective_metric(metrics, "diversity")


def quality(sampling: SamplingOptions) -> dict[str, Metric]:
    """Best at cfg 2, top-p 0.9, temperature 0.9; top-k does nothing."""
    value = abs(sampling.cfg_scale - 2) + abs(sampling.top_p - 0.9) + abs(sampling.temperature - 0.9)
    return {"frechet_distance[j]": metric("frechet_distance[j]", value, False)}


@pytest.mark.parametrize("grid", ["one_by_one", "full"])
def test_the_search_finds_the_best_and_asks_once_a_setting(grid):
    asked = []

    def evaluate(sampling):
        asked.append(sampling)
        return quality(sampling)

    stages = search(Options(grid=grid, objectives=("frechet_distance",)), evaluate)
    best = stages[-1].winner.sampling
    assert best == SamplingOptions(cfg_scale=2, temperature=0.9, top_p=0.9)
    assert len(asked) == len(set(asked)) == (5 * 2 * 2 * 3 if grid == "full" else 5 + 1 + 1 + 2)
    assert [stage.knob for stage in stages] == ([""] if grid == "full" else list(KNOBS))
    assert flags(best) == "--cfg-scale 2 --temperature 0.9 --top-k 0 --top-p 0.9"
    assert setting_name(best) == "cfg2-t0.9-k0-p0.9"


def test_the_search_starts_at_values_that_were_given():
    options = Options(
        cfg_scales=(7.0, 9.0),
        temperatures=(0.5,),
        top_ks=(10,),
        top_ps=(0.8,),
        objectives=("frechet_distance",),
    )
    stages = search(options, quality)
    assert len(stages) == 1
    assert stages[0].winner.sampling == SamplingOptions(cfg_scale=7.0, temperature=0.5, top_k=10, top_p=0.8)
    single = search(replace(options, cfg_scales=(9.0,)), quality)
    assert len(single) == 1 and single[0].winner.sampling.cfg_scale == 9.0


def test_a_whole_sweep(tmp_path, shards, judge_dir, generator_dir, capsys):
    (tmp_path / "p.txt").write_text(
        "\n".join(["一件红色的连衣裙", "一双黑色的鞋", "白色的杯子", "条纹T恤"]), "utf-8"
    )
    line = [
        "--checkpoint", str(generator_dir), "--reference", str(shards), "--judge", str(judge_dir),
        "--prompts", str(tmp_path / "p.txt"), "--out", str(tmp_path / "sweep"), "--cache", str(tmp_path / "cache"),
        "--cfg-scales", "1", "3", "--temperatures", "1", "--top-ks", "0", "--top-ps", "0.5", "1",
        "--search-prompts", "2", "--report-prompts", "2", "--num-images", "2", "--batch-size", "4",
        "--objectives", "frechet_distance", "--measure.replicates", "40", "--measure.set-replicates", "10",
        "--device", "cpu",
    ]  # fmt: skip
    sweep = main(line)
    found = json.loads((tmp_path / "sweep" / "sweep.json").read_text("utf-8"))
    assert [stage["knob"] for stage in found["stages"]] == ["cfg_scale", "top_p"]
    assert found["prompts"] == {"search": 2, "report": 2}
    winner = yaml.safe_load((tmp_path / "sweep" / "winner.yaml").read_text("utf-8"))
    assert SamplingOptions(**winner["sampling"]) == sweep.winner
    searched = {json.loads(t)["text"] for t in lines(tmp_path / "sweep" / "search")}
    reported = {json.loads(t)["text"] for t in lines(tmp_path / "sweep" / "report")}
    assert len(searched) == len(reported) == 2 and not searched & reported, "the report is on other prompts"
    page = (tmp_path / "sweep" / "sweep.html").read_text("utf-8")
    assert page.count("<polyline") >= 2 and not re.findall(r'(?:href|src)="(?!data:)', page)
    assert f"winning flags: {flags(sweep.winner)}" in capsys.readouterr().out

    from common.config import from_mapping
    from generate import Options as Generate

    assert from_mapping(Generate, winner).sampling == sweep.winner


def lines(folder):
    return [text for path in folder.glob("*/images.jsonl") for text in path.read_text("utf-8").splitlines()]


def test_sure_differences_are_printed_by_the_name_of_their_metric(capsys):
    sure = Difference("category_right[judge]", "default", "winner", Interval(0.1, 0.05, 0.2), True)
    chance = replace(sure, metric="coverage", value=Interval(0.1, -0.05, 0.2))
    show(SimpleNamespace(stages=[], differences=[sure, chance]))
    assert capsys.readouterr().out == "category_right[judge]: +0.1 [+0.05, +0.2] against the defaults\n"


def test_what_cannot_be_swept_is_refused(tmp_path, shards, judge_dir, generator_dir, ranker_dir, capsys):
    (tmp_path / "p.txt").write_text("白色的杯子", "utf-8")
    base = {"--checkpoint": generator_dir, "--reference": shards, "--judge": judge_dir, "--device": "cpu"}
    base |= {"--prompts": tmp_path / "p.txt", "--out": tmp_path / "o", "--search-prompts": 1}
    for changed, expected in [
        ({"--reference": ""}, "name real images"),
        ({"--checkpoint": ranker_dir}, "of kind ranker, which makes no images"),
        ({}, "1 prompts leave none for the report"),
        ({"--prompts": tmp_path / "none"}, "no prompts file"),
        ({"--cfg-scales": -1}, "cfg_scale must lie in [0, 1000]"),
        ({"--top-ps": 2}, "top_p must lie in"),
        ({"--num-images": 0}, "num_images must be at least 1"),
    ]:
        with pytest.raises(SystemExit) as end:
            main([str(word) for pair in (base | changed).items() for word in pair])
        message = capsys.readouterr().err
        assert end.value.code == 2 and expected in message, message
