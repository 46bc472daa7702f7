import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_gan import TEXTS

from common import checkpoint
from common.files import sha256_file, write_json
from common.outputs.out_directory import Request
from common.run_dir import point_latest
from gan.pipeline import BATCH, SamplingOptions, TextToGan, default_checkpoint


@pytest.fixture(scope="module")
def pipeline(run_dir) -> TextToGan:
    return TextToGan.from_pretrained(run_dir, "cpu")


def pixels(images) -> list[bytes]:
    return [image.tobytes() for image in images]


def test_image_i_of_a_seed_is_the_same_in_any_batch(pipeline):
    many = pixels(pipeline(TEXTS[0], BATCH + 3, seed=5))
    assert pixels(pipeline(TEXTS[0], 2, seed=5)) == many[:2] and len(set(many)) == len(many)
    requests = [Request(TEXTS[0], i) for i in (BATCH + 1, 0)]
    requests[1:1] = [Request(TEXTS[1], 3)] * 4
    found = list(pipeline.generate(requests, 5, SamplingOptions()))
    assert [found[0].image.tobytes(), found[-1].image.tobytes()] == [many[BATCH + 1], many[0]]
    assert (
        pixels(pipeline(TEXTS[0], 2, seed=6)) != many[:2]
        and pixels(pipeline(TEXTS[1], 2, seed=5)) != many[:2]
    )


def test_psi_0_is_the_mean_of_the_caption_whatever_the_noise(pipeline):
    first, second = pipeline(TEXTS[0], 2, psi=0.0)
    assert np.abs(np.asarray(first, int) - np.asarray(second, int)).max() <= 1
    assert pixels(pipeline(TEXTS[0], 1, psi=0.5)) != pixels(pipeline(TEXTS[0], 1))


def test_an_interpolation_starts_and_ends_at_the_images_of_its_texts(pipeline):
    strip = pipeline.interpolate(TEXTS[0], TEXTS[5], 5, seed=2, options=SamplingOptions())
    ends = [pipeline(text, 1, seed=2)[0].tobytes() for text in (TEXTS[0], TEXTS[5])]
    assert [strip[0].tobytes(), strip[-1].tobytes()] == ends and len(set(pixels(strip))) == 5


def test_a_category_alone_and_with_a_text(pipeline):
    assert set(pipeline.config.labels) == {"杯子", "鞋子", "帽子"}
    alone = pixels(pipeline("", 2, category="鞋子"))
    assert alone != pixels(pipeline("", 2, category="杯子")) != pixels(pipeline(TEXTS[0], 2, category="杯子"))
    assert pixels(pipeline(TEXTS[0], 2, category="杯子")) != pixels(pipeline(TEXTS[0], 2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": ""}, "is empty"),
        ({"text": "qwz"}, "holds only characters that the text tower does not know"),
        ({"text": TEXTS[0], "category": "Boat"}, "knows no category 'Boat'"),
        ({"text": TEXTS[0], "num_images": 0}, "num_images must be at least 1"),
        ({"text": TEXTS[0], "psi": -1.0}, "psi must lie in"),
        ({"text": TEXTS[0], "seed": -1}, "seed must be 0 or more"),
    ],
)
def test_what_cannot_be_generated_is_said(pipeline, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipeline(**arguments)


def test_a_text_that_is_too_long_is_cut_and_said(pipeline):
    long = TEXTS[0] * 20
    assert "longer than 48 tokens" in pipeline.complain(long) and not pipeline.complain(TEXTS[0])
    assert len(pipeline(long, 1)) == 1


def test_a_run_directory_gives_its_best_checkpoint(run_dir, tmp_path, monkeypatch):
    run = tmp_path / "runs" / "gan"
    shutil.copytree(run_dir, run, symlinks=True)
    shutil.copytree(checkpoint.step_directory(run, 4), run / "step_00000009")
    weights = load_file(run / "step_00000009" / "model.safetensors")
    save_file({n: t + 0.1 for n, t in weights.items()}, run / "step_00000009" / "model.safetensors")
    config = json.loads((run / "step_00000009" / "config.json").read_text("utf-8"))
    config["sha256"] = sha256_file(run / "step_00000009" / "model.safetensors")
    write_json(run / "step_00000009" / "config.json", config)
    point_latest(run, "step_00000009")
    assert (run / "best").resolve().name == "step_00000004"
    best, last = (TextToGan.from_pretrained(p, "cpu").sha256 for p in (run, run / "latest"))
    assert best != last == config["sha256"]
    assert default_checkpoint(tmp_path / "runs").resolve() == run.resolve()
    with pytest.raises(FileNotFoundError, match=r"run python -m gan\.train"):
        default_checkpoint(tmp_path / "nothing")


def test_damaged_checkpoints_are_named(run_dir, tmp_path):
    directory = tmp_path / "copy"
    shutil.copytree(run_dir / "step_00000004", directory)
    weights = load_file(directory / "model.safetensors")
    name = "generator.first.of_noise"
    save_file(weights | {name: torch.full_like(weights[name], float("nan"))}, directory / "model.safetensors")
    with pytest.raises(ValueError, match="is not the file that was saved"):
        TextToGan.from_pretrained(directory, "cpu")
    config = json.loads((directory / "config.json").read_text("utf-8"))
    write_json(directory / "config.json", config | {"sha256": sha256_file(directory / "model.safetensors")})
    with pytest.raises(ValueError, match="not finite"):
        TextToGan.from_pretrained(directory, "cpu")(TEXTS[0])
    for broken in (None, 3, {"text_dim": 16}, {"text_dim": 16, "generator": 3}):
        write_json(directory / "config.json", config | {"model": broken})
        with pytest.raises(ValueError, match=r"config\.json"):
            TextToGan.from_pretrained(directory, "cpu")
    write_json(directory / "config.json", config)
    shutil.rmtree(directory / "text")
    with pytest.raises(FileNotFoundError, match="text holds no config"):
        TextToGan.from_pretrained(directory, "cpu")
