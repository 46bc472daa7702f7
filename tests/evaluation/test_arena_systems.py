"""Systems beside generators and bases: drawings, a GAN, the prior of an autoencoder, other pipelines of diffusers."""

import io
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from reference_shards import caption
from tiny_goods import COLORS, KINDS

from common.checkpoint import write_model
from common.config import to_mapping
from common.files import read_json
from common.outputs.out_directory import Request
from common.text.bert_text import TextTowerConfig, write_text_tower
from dalle.lines import LineControl
from dalle.model import KIND as GENERATOR
from dalle.model import Dalle
from data_tools.images.line_drawings import canny
from data_tools.shards.image_shards import ShardWriter
from evaluation import released
from evaluation.compare.systems import Setting, SystemSpec, open_system
from evaluation.reference_drawings import ReferenceDrawings
from gan.model import KIND as GAN
from gan.model import GeneratorConfig
from gan.pipeline import GanConfig, TextToGan, build_model

sys.path.append(str(Path(__file__).parent.parent / "diffusion"))
TEXT = caption(KINDS[0], next(iter(COLORS)))


@pytest.fixture(scope="module")
def follower_dir(generator_dir, tmp_path_factory) -> Path:
    """The tiny generator with an encoder of drawings that changes its images."""
    folder = tmp_path_factory.mktemp("lines") / "step_00000007"
    shutil.copytree(generator_dir, folder)
    plain = Dalle.from_pretrained(generator_dir)
    config = replace(plain.config, line_factor=4, line_width=16)
    weights = Dalle(config).state_dict() | plain.state_dict()
    weights["line_encoder.out.weight"] = torch.randn_like(weights["line_encoder.out.weight"])
    sha256 = read_json(generator_dir / "config.json")["image_tokenizer_sha256"]
    write_model(folder, GENERATOR, to_mapping(config), weights, 7, image_tokenizer_sha256=sha256)
    return folder


def test_a_drawing_of_the_reference_image_is_followed(follower_dir, shards):
    setting = Setting(3, batch_size=2, device="cpu", reference=str(shards))
    system = open_system(SystemSpec.parse(f"ar+lines={follower_dir}?lines=canny&top_k=5"), setting)
    assert system.complaint(TEXT) == ""
    assert "no reference image has the caption" in system.complaint("一双黑色的鞋")
    found = list(system.generate([Request(TEXT, 0), Request(TEXT, 1)]))
    index = system.drawings.index_of[TEXT]
    data = system.drawings.index.read(index, ("png",))["png"]
    with Image.open(io.BytesIO(data)) as image:
        lines = canny(np.asarray(image.convert("RGB")))
    direct = system.pipeline(TEXT, 2, seed=3, top_k=5, line=LineControl(lines))
    assert [f.image.tobytes() for f in found] == [d.tobytes() for d in direct]
    plain = system.pipeline(TEXT, 2, seed=3, top_k=5)
    assert found[0].image.tobytes() != plain[0].tobytes()
    assert system.origin["source"]["lines"] == "canny"


def test_drawings_that_cannot_be_are_refused(follower_dir, generator_dir, shards):
    setting = Setting(device="cpu", reference=str(shards))
    for what, query, message in [
        (follower_dir, "lines=pencil", "system s: lines must be one of canny"),
        (follower_dir, "line_scale=2", "line_scale and line_cfg_scale need lines"),
        (generator_dir, "lines=canny", "system s: this generator follows no drawings"),
    ]:
        with pytest.raises(ValueError, match=message):
            open_system(SystemSpec.parse(f"s={what}?{query}"), setting)


def test_the_first_image_of_a_caption_is_drawn(tmp_path):
    from reference_shards import record

    with ShardWriter(tmp_path, "val", 50) as writer:
        for i in range(3):
            writer.write(record(KINDS[i % 2], "红色", f"val{i}", i))
    drawings = ReferenceDrawings.open(str(tmp_path), "val", "contour")
    assert drawings.index_of == {caption(KINDS[0], "红色"): 0, caption(KINDS[1], "红色"): 1}
    assert drawings.lines(caption(KINDS[1], "红色"), 64).shape == (64, 64)


@pytest.fixture(scope="module")
def gan_dir(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("gan")
    folder = run / "step_00000004"
    folder.mkdir()
    write_text_tower(folder / "text", ["一个红色的杯子"], TextTowerConfig(16, 1, 2, 16), None)
    torch.manual_seed(0)
    config = GanConfig(GeneratorConfig(32, 16, 16, 16, 8), 16)
    model = build_model(config, folder / "text")
    write_model(folder, GAN, to_mapping(config), model.state_dict(), 4)
    (run / "latest").symlink_to(folder.name)
    return run


def test_a_gan_is_a_system_with_its_own_options(gan_dir):
    system = open_system(SystemSpec.parse(f"gan={gan_dir}?psi=0.7"), Setting(5, device="cpu"))
    found = list(system.generate([Request("红色的杯子", 1), Request("杯子", 0)]))
    direct = TextToGan.from_pretrained(gan_dir, "cpu")("红色的杯子", 2, seed=5, psi=0.7)
    assert found[0].image.tobytes() == direct[1].tobytes() and found[1].text == "杯子"
    assert system.origin["sampling"] == {"psi": 0.7, "category": ""}
    assert "does not know" in system.complaint("xyz")
    with pytest.raises(ValueError, match="system gan: unknown option psii"):
        open_system(SystemSpec.parse(f"gan={gan_dir}?psii=1"), Setting(device="cpu"))


def test_an_autoencoder_is_sampled_from_its_prior(tmp_path):
    from tiny_base import tiny_base

    vae = tiny_base(tmp_path / "tokenizer").vae
    vae.save_pretrained(str(tmp_path / "vae"))
    system = open_system(SystemSpec.parse(f"vae={tmp_path / 'vae'}"), Setting(3, device="cpu"))
    requests = [Request("红", 0), Request("红", 1), Request("鞋", 0)]
    found = list(system.generate(requests))
    assert [f.image.size for f in found] == [(64, 64)] * 3
    assert len({f.image.tobytes() for f in found}) == 3
    again = next(system.generate(requests[1:2]))
    assert np.abs(np.asarray(again.image, int) - np.asarray(found[1].image, int)).max() <= 1
    latents = []
    vae.decode = lambda z: latents.append(z) or type("Out", (), {"sample": torch.zeros(len(z), 3, 64, 64)})
    system.vae = vae
    list(system.generate([Request(str(i), 0) for i in range(40)]))
    scaled = torch.cat(latents) * vae.config.scaling_factor
    assert abs(float(scaled.mean())) < 0.05 and abs(float(scaled.std()) - 1) < 0.05
    with pytest.raises(ValueError, match="system vae: an autoencoder's prior has no option psi"):
        open_system(SystemSpec.parse(f"vae={tmp_path / 'vae'}?psi=1"), Setting(device="cpu"))


def test_any_other_pipeline_of_diffusers_is_a_system(tmp_path):
    from diffusers import LatentConsistencyModelPipeline, LCMScheduler, UNet2DConditionModel
    from tiny_base import tiny_base

    base = tiny_base(tmp_path / "tokenizer", text="clip")
    sizes = {name: value for name, value in base.unet.config.items() if not name.startswith("_")}
    unet = UNet2DConditionModel(**sizes | {"time_cond_proj_dim": 8})
    parts = (base.vae, base.text_encoder, base.tokenizer, unet, LCMScheduler(), None, None)
    pipeline = LatentConsistencyModelPipeline(*parts, requires_safety_checker=False)
    pipeline.save_pretrained(str(tmp_path / "lcm"))
    Image.new("RGB", (8, 8)).save(tmp_path / "lcm" / "sample.png")
    spec = SystemSpec.parse(f"theirs={tmp_path / 'lcm'}?num_steps=2&cfg_scale=3")
    assert not spec.is_made
    system = open_system(spec, Setting(3, device="cpu"))
    both = list(system.generate([Request("a red shoe", 0), Request("a red shoe", 1)]))
    assert both[0].image.size == (64, 64) and both[0].image.tobytes() != both[1].image.tobytes()
    one = list(system.generate([Request("a red shoe", 0)]))
    difference = np.abs(np.asarray(one[0].image, int) - np.asarray(both[0].image, int))
    assert difference.max() <= 2, "image 0 of a seed is the same whatever else is asked for, but for rounding"
    with pytest.raises(ValueError, match="LatentConsistencyModelPipeline has no option colour"):
        bad = SystemSpec.parse(f"theirs={tmp_path / 'lcm'}?colour=3")
        list(open_system(bad, Setting(device="cpu")).generate([Request("a shoe", 0)]))
    (tmp_path / "lcm" / "unet" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"system theirs: the pipeline in .* cannot be loaded by diffusers"):
        open_system(spec, Setting(device="cpu"))


def test_hours_may_be_given_and_must_be_a_number():
    spec = SystemSpec.parse("sd=runs/x?training_hours=3.5&num_steps=4")
    assert (spec.training_hours, spec.sampling) == (3.5, {"num_steps": "4"})
    for bad in ("long", "-1", "inf", "nan"):
        with pytest.raises(ValueError, match="training_hours is a number of hours"):
            SystemSpec.parse(f"sd=runs/x?training_hours={bad}")


def write_run(folder: Path, kind: str, data=None, **config) -> Path:
    (folder / "step_00000004").mkdir(parents=True)
    values = {"kind": kind, "model": {}} | config
    (folder / "step_00000004" / "config.json").write_text(json.dumps(values))
    (folder / "step_00000004" / "train_config.json").write_text(json.dumps({"data": data}))
    (folder / "latest").symlink_to("step_00000004")
    return folder


def test_the_comparison_of_what_ships_takes_what_was_trained_on_the_data(tmp_path, monkeypatch):
    pretrained, runs = tmp_path / "pretrained", tmp_path / "runs"
    (pretrained / "goods" / "generator").mkdir(parents=True)
    (pretrained / "goods" / "generator" / "config.json").write_text('{"kind": "generator", "model": {}}')
    write_run(runs / "demo_dalle", "generator", "")
    write_run(runs / "own_dalle", "generator", "data/tokens")
    write_run(runs / "lines", "generator", "data/tokens", model={"line_factor": 8})
    base = write_run(runs / "base", "diffusion", "data/goods")
    (base / "vae").mkdir()
    write_run(runs / "style", "lora", {"source": "data/emoji"}, base=str(base))
    write_run(runs / "gan", "gan", "data/goods")
    write_run(runs / "tokenizer", "image_tokenizer", "data/goods")
    found = released.checkpoints(False, runs, pretrained)
    assert released.systems_of(found) == [
        f"ar={pretrained}/goods/generator",
        f"ar+lines={runs}/lines?lines=canny",
        f"sd={base}",
        f"lora={base}?lora={runs}/style",
        f"gan={runs}/gan",
        f"vae={base}/vae",
    ]
    assert released.systems_of(released.checkpoints(True, runs, pretrained)) == [f"ar={runs}/demo_dalle"]
    assert released.systems_of([]) == []
    follower = {"kind": "generator", "model": {"line_factor": 8}}
    (pretrained / "goods" / "generator" / "config.json").write_text(json.dumps(follower))
    assert released.systems_of(released.checkpoints(False, runs, pretrained))[:2] == [
        f"ar={pretrained}/goods/generator",
        f"ar+lines={pretrained}/goods/generator?lines=canny",
    ], "one generator, without a drawing and with it"
