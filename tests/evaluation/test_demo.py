"""The demo's first stage and its page; the trainings in between are tested where they live."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image
from reference_shards import write_shards

import generate
from common.config import parse_options
from evaluation import demo


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """What the stages leave: shards, grids of two trainings, two ranked out directories."""
    write_shards(tmp_path / "synthetic", "train", 6, 1)
    monkeypatch.setattr(demo, "EMBEDDED", tmp_path / "synthetic")
    monkeypatch.setattr(demo, "run_dir", lambda config: tmp_path / Path(config).stem)
    for name, count in (("vqgan", 2), ("dalle", 9)):
        (tmp_path / name / "samples").mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (64, 32), (20 * i, 0, 0)).save(tmp_path / name / f"samples/grid_{i:08d}.png")
            Image.new("L", (8, 8)).save(tmp_path / name / f"samples/position_bits_{i:08d}.png")
    for out in (tmp_path / "out", tmp_path / "out/trained"):
        out.mkdir()
        Image.new("RGB", (64, 32), "red").save(out / "ranked.png")
    return tmp_path


@pytest.mark.parametrize(
    ("language", "title"), [("zh", "演示：从数据到图像"), ("en", "The demo, from data to images")]
)
def test_the_page_tells_the_whole_story_in_one_file(place, language, title):
    options = demo.Options(out=place / "out", language=language)
    rows = [
        demo.Row("image tokenizer", place / "vqgan", 65.0, "20.1 dB", ("train_vqgan.py",)),
        demo.Row("generator", place / "dalle", 70.0, "5.2 bits", ("train_dalle.py",)),
    ]
    page = demo.write_demo_page(options, rows).read_text("utf-8")
    assert f"<h1>{title}</h1>" in page and f'<html lang="{language}">' in page
    assert len(re.findall("<h2>", page)) == 6 and page.count("data:image/webp;base64,") == 1 + 6 + 2 + 4 + 1
    assert not re.search(r'(src|href)="(?!data:)', page), "self-contained"
    assert "0:02:15" in page and "python train_dalle.py" in page
    demo.write_demo_page(options, rows)  # again: what we wrote ourselves is replaced


def test_a_training_is_shown_from_its_first_to_its_last_grid(place):
    names = [path.stem[-1] for path in demo.first_to_last(place / "dalle/samples")]
    assert names == ["0", "3", "5", "8"]


def test_the_first_stage_is_one_command_on_what_ships():
    options = demo.Options()
    stage = demo.stages(options)[0]
    assert stage.program[0] == "generate.py" and stage.where == options.out
    read = parse_options(generate.Options, stage.program[1:])
    assert (read.text, read.num_images, read.rank) == (options.goods, 8, True)
    assert read.checkpoint == demo.GENERATOR and (Path(read.ranker) / "config.json").is_file()
    assert read.out_dir == Path("out") and demo.stages(options)[-1].where == Path("out/trained")


def test_how_good_the_best_is_comes_from_the_ranking(tmp_path):
    rows = [{"file": f"{i}.png", "rank": i, "score": -i, "percentile": p} for i, p in enumerate((38.6, 1.0))]
    best = {"ranker": "r", "texts": [{"text": "x", "pictures": rows}]}
    (tmp_path / "ranking.json").write_text(json.dumps(best))
    assert demo.goods_quality(tmp_path) == "the best scores above 39 % of real images with their captions"
