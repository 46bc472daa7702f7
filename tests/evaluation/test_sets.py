import json

import pytest
from drawn_images import write_out_dir as out_dir
from PIL import Image

from common.files import write_json
from evaluation.sets import LIKELIHOOD, Sample, SampleSet


def test_an_out_directory_is_read_with_all_that_it_says(tmp_path):
    found = SampleSet.from_out_dir(out_dir(tmp_path / "out"), "ours")
    assert (found.name, len(found), found.texts) == ("ours", 6, ["a", "b"])
    assert found.settings == {"seed": 7, "sampling": {"cfg_scale": 3.0}, "checkpoint": "abc"}
    sample = found.by_prompt()["b"][2]
    assert (sample.text, sample.index, sample.seed, sample.seconds) == ("b", 2, 7, 0.5)
    assert sample.scores == {LIKELIHOOD: 4.0}
    assert sample.options == {"cfg_scale": 3.0}
    assert sample.image.mode == "RGB" and sample.image.getpixel((0, 0)) == (98, 40, 0)


def test_best_of_takes_the_first_n_only(tmp_path):
    found = SampleSet.from_out_dir(out_dir(tmp_path / "out", num=4))
    best = found.best_of(2)
    assert [s.index for s in best.samples] == [1, 1]
    assert best.settings["rerank_width"] == 2 and best.settings["reranker"] == LIKELIHOOD
    assert [s.index for s in found.best_of(1, "nothing").samples] == [0, 0]
    scored = found.with_scores("other", [-s.index for s in found.samples])
    assert [s.index for s in scored.best_of(4, "other").samples] == [0, 0]
    with pytest.raises(ValueError, match="needs 5 images of every text: 'a' has 4"):
        found.best_of(5)
    with pytest.raises(ValueError, match=r"no score 'other' .its scores: likelihood."):
        found.best_of(2, "other")


def test_parts_of_a_set(tmp_path):
    found = SampleSet.from_out_dir(out_dir(tmp_path / "out"))
    assert [s.index for s in found.first(2).samples] == [0, 1, 0, 1]
    assert found.only(["b"]).texts == ["b"]
    with pytest.raises(ValueError, match="holds no images"):
        found.only(["c"])


def test_scores_go_to_their_own_images_in_any_order(tmp_path):
    found = SampleSet.from_out_dir(out_dir(tmp_path / "out"))
    turned = SampleSet("turned", tuple(reversed(found.samples)))
    scored = turned.scored("red", lambda text, images: [sum(image.getpixel((0, 0))) for image in images])
    assert [s.scores["red"] for s in scored.samples] == [138, 118, 98, 137, 117, 97]


def test_a_ranking_is_read_with_the_images(tmp_path):
    path = out_dir(tmp_path / "out", texts=("a",))
    images = [{"file": f"{i:04d}.png", "rank": 2 - i, "score": 0.1 * i} for i in range(3)]
    write_json(
        path / "ranking.json",
        {"ranker": "runs/r", "sha": "1", "texts": [{"text": "a", "pictures": images}]},
    )
    found = SampleSet.from_out_dir(path)
    assert found.settings["ranking"] == {"ranker": "runs/r", "sha": "1"}
    assert found.best_of(3, "runs/r").samples[0].index == 2
    write_json(path / "ranking.json", [])
    with pytest.raises(ValueError, match="is no ranking"):
        SampleSet.from_out_dir(path)


def test_settings_that_differ_are_said_to(tmp_path):
    path = out_dir(tmp_path / "out", texts=("a",), num=1)
    line = json.loads((path / "images.jsonl").read_text("utf-8"))
    with (path / "images.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line | {"seed": 8}) + "\n")
    assert SampleSet.from_out_dir(path).settings["seed"] == {"several": [7, 8]}


def test_corrupt_images_are_counted(tmp_path):
    path = out_dir(tmp_path / "out")
    (path / "0001.png").write_bytes((path / "0001.png").read_bytes()[:40])
    (path / "0002.png").write_bytes(b"")
    found = SampleSet.from_out_dir(path)
    assert len(found) == 4 and [c.split(":")[0][-8:] for c in found.corrupt] == ["0001.png", "0002.png"]
    for file in path.glob("*.png"):
        file.write_bytes(b"no image")
    with pytest.raises(ValueError, match="none of the 6 images"):
        SampleSet.from_out_dir(path)
    with pytest.raises(ValueError, match=r"0000\.png is no readable image"):
        Sample("a", path / "0000.png").image  # noqa: B018


def test_a_plain_folder_takes_texts_from_beside_or_one_for_all(tmp_path):
    for name in ("x.png", "y.jpg", "grid.png", "rank00.png"):
        Image.new("L", (8, 6)).save(tmp_path / name)
    (tmp_path / "x.txt").write_text("\nfirst\nsecond\n", "utf-8")
    with pytest.raises(ValueError, match=r"y\.txt beside it, or give one for all of them with --text"):
        SampleSet.from_out_dir(tmp_path)
    found = SampleSet.from_out_dir(tmp_path, text="other")
    assert [(s.text, s.path.name, s.index) for s in found.samples] == [
        ("first", "x.png", 0),
        ("other", "y.jpg", 0),
    ]
    assert found.samples[0].image.mode == "RGB" and found.samples[0].seed is None
    (tmp_path / "y.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match="is not valid UTF-8"):
        SampleSet.from_out_dir(tmp_path)


def test_nothing_to_read_is_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match="no directory of images"):
        SampleSet.from_out_dir(tmp_path / "none")
    with pytest.raises(ValueError, match=r"holds no images and no images\.jsonl"):
        SampleSet.from_out_dir(tmp_path)
    path = out_dir(tmp_path / "out")
    (path / "0000.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"names 0000\.png, which is not in"):
        SampleSet.from_out_dir(path)
