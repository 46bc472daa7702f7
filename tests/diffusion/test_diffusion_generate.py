"""python -m diffusion.generate on a tiny base: the out directory, and what reads it."""

import json
from pathlib import Path

import pytest
from PIL import Image
from tiny_base import tiny_base

from common.files import read_json
from common.outputs.label import open_labelled, read_labels, read_manifest
from common.outputs.out_directory import OutDirectory
from data_tools import submit
from diffusion import generate
from diffusion.base import base_sha256, save_base
from diffusion.pipeline import DiffusionToImage
from diffusion.white_background import Whitener, WhitenOptions
from evaluation.sets import SampleSet
from rankers.outdir import read_out_directory


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("base")
    save_base(tiny_base(path / "vocabulary"), path)
    return path


def flags(folder: Path, text: str, count: int, out: Path, *more: str) -> list[str]:
    base = ("--base", str(folder), "--device", "cpu", "--precision", "fp32", "--num-steps", "2")
    return [text, str(count), str(out), *base, *more]


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "images.jsonl").read_text("utf-8").splitlines()]


def test_whitened_images_are_the_plain_ones_put_on_white(folder, tmp_path):
    plain = generate.main(flags(folder, "红色的鞋", 2, tmp_path / "plain"))
    white = generate.main(
        flags(folder, "红色的鞋", 2, tmp_path / "white", "--whiten", "--white.feather", "1")
    )
    assert lines(white)[0]["whiten"]["feather"] == 1.0 and "whiten" not in lines(plain)[0]
    whitener = Whitener.open(WhitenOptions(feather=1))
    for name in ("0000.png", "0001.png"):
        with Image.open(plain / name) as before, Image.open(white / name) as after:
            assert after.tobytes() == whitener(before).image.tobytes()
    with pytest.raises(SystemExit):
        generate.main(flags(folder, "红色的鞋", 2, tmp_path / "none", "--white.feather", "1"))
    assert not (tmp_path / "none").exists()


def test_an_out_directory_is_what_generate_py_writes(folder, tmp_path):
    out = generate.main(flags(folder, "红色的鞋", 2, tmp_path / "out", "--style", "金", "--seed", "5"))
    found = lines(out)
    assert [(x["file"], x["text"], x["index"], x["seed"]) for x in found] == [
        ("0000.png", "红色的鞋", 0, 5),
        ("0001.png", "红色的鞋", 1, 5),
    ]
    assert found[0]["checkpoint"] == base_sha256(folder)
    assert found[0]["sampling"] == {
        "num_steps": 2,
        "cfg_scale": 4.0,
        "cfg_rescale": 0.0,
        "scheduler": "dpm++",
        "size": 64,
    }
    assert (found[0]["prompting"]["style"], found[0]["loras"]) == ("金", [])
    assert (out / "grid.png").is_file()
    expected = DiffusionToImage.from_pretrained(folder, "cpu", precision="fp32")(
        "红色的鞋", 2, seed=5, num_steps=2, style="金"
    )
    for i, image in enumerate(expected):
        with Image.open(out / f"{i:04d}.png") as written:
            assert written.tobytes() == image.tobytes()


def test_ranking_and_evaluation_read_it(folder, tmp_path):
    out = generate.main(flags(folder, "红色的鞋", 2, tmp_path / "out"))
    assert [row.text for row in read_out_directory(out)] == ["红色的鞋"] * 2
    samples = SampleSet.from_out_dir(out, "sd").samples
    assert len(samples) == 2
    assert all(s.seconds > 0 for s in samples)


def test_a_prompts_file_goes_on_where_it_was_stopped_and_is_submitted(folder, tmp_path, monkeypatch):
    prompts = tmp_path / "T2I_test.text.tsv"
    prompts.write_text("a1\t红色的鞋\nb2\t苹果\n", "utf-8")
    argv = flags(folder, "", 1, tmp_path / "out", "--prompts-file", str(prompts))
    whole = generate.main(flags(folder, "", 1, tmp_path / "whole", "--prompts-file", str(prompts)))
    to_end = OutDirectory.add

    def add_one(self, made):
        if self.count == 1:
            raise KeyboardInterrupt
        return to_end(self, made)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(OutDirectory, "add", add_one)
        generate.main(argv)
    assert len(lines(tmp_path / "out")) == 1
    out = generate.main(argv)
    assert [line["key"] for line in lines(out)] == ["a1", "b2"]
    for name in ("0000.png", "0001.png"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    written = submit.main([str(out), str(prompts)])
    assert [row.split("\t")[0] for row in written.read_text().splitlines()] == ["a1", "b2"]


def test_an_image_and_its_strength_are_recorded(folder, tmp_path):
    Image.new("RGB", (64, 64), (200, 30, 30)).save(tmp_path / "shoe.png")
    more = ("--image", str(tmp_path / "shoe.png"), "--strength", "0.5")
    out = generate.main(flags(folder, "红色的鞋", 1, tmp_path / "out", *more))
    source = lines(out)[0]["source"]
    assert source["strength"] == 0.5
    assert len(source["image_sha256"]) == 64


def test_loras_are_merged_and_recorded(folder, tmp_path):
    import torch

    from diffusion.lora.formats import LoraLayer, write_lora

    generator = torch.Generator().manual_seed(0)
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    layer = LoraLayer(
        torch.randn(4, 16, generator=generator), torch.randn(16, 4, generator=generator), alpha=4.0
    )
    file = write_lora(tmp_path / "style.safetensors", {"unet": {name: layer}})
    plain = generate.main(flags(folder, "红色的鞋", 1, tmp_path / "plain"))
    half = generate.main(flags(folder, "红色的鞋", 1, tmp_path / "half", "--lora", f"{file}:0.5"))
    none = generate.main(flags(folder, "红色的鞋", 1, tmp_path / "none", "--lora", f"{file}:0"))
    images = [(out / "0000.png").read_bytes() for out in (plain, half, none)]
    assert images[0] == images[2] != images[1]
    assert [(x["file"], x["weight"]) for x in lines(half)[0]["loras"]] == [("style.safetensors", 0.5)]


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (("--strength", "0.5"), "--strength needs --image"),
        (("--negative", "黑", "--cfg-scale", "1"), "works through guidance"),
        (("--image", "nothing.png"), "no image nothing.png"),
        (("--size", "30"), "size must be a multiple of 8"),
        (("--lora", "nothing.safetensors"), "nothing.safetensors"),
        (("--base", "nowhere"), "no base model nowhere"),
        (("--text-len", "40"), "text_len must lie in 3..32"),
    ],
)
def test_bad_input_ends_in_one_sentence(more, sentence, folder, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        generate.main(flags(folder, "红色的鞋", 1, tmp_path / "out", *more))
    assert stop.value.code == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out" / "images.jsonl").exists()


def test_the_newest_base_of_the_runs_is_taken(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        generate.main(["红色的鞋", "1", "out"])
    assert "no base was trained yet under runs/" in capsys.readouterr().err
    step = tmp_path / "runs" / "base" / "step_00000001"
    step.mkdir(parents=True)
    save_base(tiny_base(tmp_path / "vocabulary"), step)
    (step / "config.json").write_text('{"kind": "diffusion", "sha256": "abc"}')
    (step.parent / "latest").symlink_to(step.name)
    out = generate.main(["红色的鞋", "1", "out", "--num-steps", "1", "--device", "cpu"])
    assert lines(out)[0]["checkpoint"] == "abc"
    assert read_json(step / "config.json")["kind"] == "diffusion"


def test_labels(folder, tmp_path):
    out = generate.main(flags(folder, "红色的鞋", 1, tmp_path / "out", "--label", "both"))
    with open_labelled(out / "0000.png") as image:
        assert read_labels(image) and read_manifest(image)["visible_mark"]
        assert read_manifest(image)["model"] == base_sha256(folder)
