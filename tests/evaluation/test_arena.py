import json
import re
from xml.etree import ElementTree

import pytest
from reference_shards import caption, write_out_dir
from tiny_goods import COLORS, KINDS

from evaluation.arena import join_systems, main

TEXTS = [caption(kind, color) for kind in KINDS for color in COLORS]
FEW = ["--measure.replicates", "50", "--measure.set-replicates", "10"]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Every image shows what its title says."""
    return write_out_dir(tmp_path_factory.mktemp("sets") / "good", per_text=4)


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """Half of the titles show something else."""
    return write_out_dir(tmp_path_factory.mktemp("sets") / "bad", per_text=4, wrong=6)


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join([*TEXTS, TEXTS[0], ""]), "utf-8")
    return path


def arguments(tmp_path, shards, judge_dir, *systems, **values):
    options = {"reference": shards, "judge": judge_dir, "out": tmp_path / "arena", "num_images": 4} | values
    options = {"language": "en"} | options
    options |= {"cache": tmp_path / "cache", "device": "cpu"}
    flags = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return [*flags, *FEW, "--system", *systems]


def test_arms_that_were_drawn_before(tmp_path, shards, judge_dir, ranker_dir, good, bad, prompts, capsys):
    match = main(
        arguments(
            tmp_path, shards, judge_dir, f"好={good}", f"bad={bad}", f"again={good}",
            prompts=prompts, ranker=ranker_dir, show_prompts=3,
        )
    )  # fmt: skip
    assert match.texts == tuple(TEXTS), "a prompt that comes twice is drawn once"
    found = json.loads((tmp_path / "arena" / "metrics.json").read_text("utf-8"))
    assert list(found["systems"]) == ["again", "bad", "好"] and found["prompts"] == 12
    assert found["systems"]["好"]["seconds_per_image"] == 0.5
    points = found["systems"]["bad"]["best_of"]["category right"]["points"]
    assert [p["width"] for p in points] == [1, 4] and points[0]["prompts"] == 12
    by_pair = {(d["first"], d["second"], d["metric"].split("[")[0]): d for d in found["differences"]}
    worse = by_pair["好", "bad", "category_right"]
    assert worse["value"]["value"] < -0.3 and worse["is_sure"], "half of the titles show another kind"
    same = [d["value"] for (a, b, _), d in by_pair.items() if (a, b) == ("好", "again")]
    assert same and all(abs(end) < 1e-9 for value in same for end in value.values())
    page = (tmp_path / "arena" / "report.html").read_text("utf-8")
    assert not re.findall(r'(?:href|src)="(?!data:)', page) and "<script" not in page
    for chart in re.findall(r"<svg .*?</svg>", page, re.DOTALL):
        ElementTree.fromstring(chart)
    assert {"Summary", "Metrics", "Differences", "Choosing the best of n", "Nearest training images"} <= set(
        re.findall("<h2>(.*?)</h2>", page)
    )
    assert page.count('class="pair"') >= 6 and TEXTS[0] in page and page.count("<polyline") == 12
    assert "frechet" in capsys.readouterr().out


def test_our_generator_against_itself_drawn_here_and_gone_on(tmp_path, shards, judge_dir, generator_dir):
    texts = ["白色的杯子", "一双黑色的鞋", "@@@"]
    (tmp_path / "p.txt").write_text("\n".join(texts), "utf-8")
    systems = (f"a={generator_dir}", f"b={generator_dir}?cfg_scale=1&top_k=3")
    line = arguments(
        tmp_path, shards, judge_dir, *systems, prompts=tmp_path / "p.txt", num_images=2, batch_size=4
    )
    match = main(line)
    assert match.texts == tuple(texts[:2]) and len(match.unusable) == 1
    a, b = (system.samples for system in match.systems)
    assert a.settings["sampling"]["cfg_scale"] == 4.5
    assert b.settings["sampling"]["top_k"] == 3
    assert [len(system.curves) > 0 for system in match.systems] == [True, True], "chosen by likelihoods"
    assert all(p.width <= 2 for system in match.systems for c in system.curves for p in c.points)
    stamps = {s.path: s.path.stat().st_mtime_ns for s in (*a.samples, *b.samples)}
    main(line)
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps, "nothing is drawn twice"
    with pytest.raises(SystemExit) as end:
        main([*line, "--seed", "1"])
    assert end.value.code == 2 and {path: path.stat().st_mtime_ns for path in stamps} == stamps


def test_captions_of_the_reference_are_the_prompts_without_a_file(tmp_path, shards, judge_dir, monkeypatch):
    (tmp_path / "arena_painter.py").write_text(
        "from PIL import Image\n"
        "def load():\n"
        "    return lambda text, n, seed=0, level=9: [Image.new('RGB', (40, 40), (level, i, 0)) for i in range(n)]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    system = "p=python:arena_painter:load?level=200"
    match = main(arguments(tmp_path, shards, judge_dir, system, num_prompts=5, num_images=2))
    assert len(match.texts) == 5 and len(match.systems[0].samples) == 10
    assert match.systems[0].samples.samples[1].image.getpixel((0, 0)) == (200, 1, 0)
    assert any("no likelihoods, and no --ranker" in reason for reason in match.systems[0].left_out)
    assert match.differences == ()


def test_repeated_arm_flags_are_one_list():
    assert join_systems(["--system", "a=1", "--out", "o", "--arm", "b=2", "c=3", "--system=d=4"]) == [
        "--out", "o", "--system", "a=1", "b=2", "c=3", "d=4",
    ]  # fmt: skip
    assert join_systems(["--out", "o"]) == ["--out", "o"]


def test_what_cannot_be_compared_is_refused(tmp_path, shards, judge_dir, ranker_dir, good, prompts, capsys):
    def refused(*systems, expected, **values):
        with pytest.raises(SystemExit) as end:
            main(arguments(tmp_path, shards, judge_dir, *systems, **({"prompts": prompts} | values)))
        message = capsys.readouterr().err
        assert end.value.code == 2 and expected in message.replace("\n", " "), message

    system = f"a={good}"
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "other.txt").write_text("别的")
    refused(expected="name the systems")
    refused(system, system, expected="a name of its own")
    refused(f"{system}?top_k=3", expected="exist already: leave ?... away")
    refused(f"a={tmp_path}/none", expected="none")
    refused(f"a={ranker_dir}", expected="of kind ranker, which makes no images")
    refused(system, reference="", expected="name real images")
    refused(system, reference=tmp_path / "x", expected="no data folder")
    refused(system, prompts=tmp_path / "none.txt", expected="no prompts file")
    refused(system, prompts=tmp_path / "empty.txt", expected="holds no texts")
    refused(system, prompts=tmp_path / "other.txt", expected="a has 0 images of '别的', 4 are needed")
    refused(system, num_images=5, expected="has 4 images of")
    refused(system, judge=ranker_dir, expected="judge")
    refused(system, ranker=ranker_dir, clip=ranker_dir, expected="cannot judge them too")
    refused(system, num_images=0, expected="num_images must be at least 1")
    assert not (tmp_path / "arena" / "metrics.json").exists()
