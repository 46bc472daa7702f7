"""ControlNet: starts as nothing, learns, resumes exactly; published names; lists in, numbered images and a zip out."""

import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from tiny_base import tiny_base
from tiny_shards import write_image_shards

from common.checkpoint import read_config
from common.outputs.label import open_labelled, read_labels, read_manifest
from diffusion import control, train_controlnet
from diffusion.base import load_base, save_base
from diffusion.control import answer_id, read_pairs
from diffusion.controlnet.model import (
    KIND,
    ControlledDenoiser,
    controlled,
    from_original,
    load_controlnet,
    new_controlnet,
    to_diffusers,
    to_hint,
)
from diffusion.controlnet.pipeline import ControlPipeline
from diffusion.controlnet.task import hide_lines
from diffusion.sampling import SamplingOptions


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """base/, images/ and run/: a ControlNet of 4 steps."""
    folder = tmp_path_factory.mktemp("control")
    (folder / "base").mkdir()
    save_base(tiny_base(folder / "vocab"), folder / "base")
    write_image_shards(folder / "images", 12, 4, size=64)
    train_controlnet.main(flags(folder, folder / "run"))
    return folder


def flags(
    made: Path, run: Path, *more: str, data: str = "images", lines: str = "canny", steps: int = 4
) -> list[str]:
    return [
        *(
            "--base",
            str(made / "base"),
            "--data",
            str(made / data),
            "--lines",
            lines,
            "--loop.run-dir",
            str(run),
        ),
        *("--loop.num-steps", str(steps), "--loop.global-batch-size", "4", "--loop.save-every", "2"),
        *("--loop.tensorboard", "False", "--num-workers", "0", "--device", "cpu", "--precision", "fp32"),
        *(
            "--optim.lr",
            "1e-3",
            "--optim.warmup-steps",
            "1",
            "--num-steps",
            "2",
            "--sample-images",
            "1",
            *more,
        ),
    ]


def inputs(base, count: int = 2):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(count, 4, 16, 16, generator=generator)
    conditions = torch.randn(count, 12, 16, generator=generator)
    drawings = (torch.rand(count, 1, 64, 64, generator=generator) > 0.8).to(torch.uint8) * 255
    return latents, torch.tensor([10, 700])[:count], conditions, to_hint(drawings)


def enlarge_(controlnet) -> None:
    with torch.no_grad():
        for parameter in controlnet.parameters():
            if parameter.abs().max() == 0:
                parameter.normal_(std=0.1)


class TestModel:
    def test_a_new_one_changes_nothing_and_a_trained_one_does(self, tmp_path):
        base = tiny_base(tmp_path)
        controlnet, args = new_controlnet(base), inputs(base)
        plain = base.unet(*args[:3]).sample
        assert torch.equal(controlled(controlnet, base.unet, *args), plain)
        enlarge_(controlnet)
        changed = controlled(controlnet, base.unet, *args)
        assert (changed - plain).abs().max() > 0.01
        torch.testing.assert_close(controlled(controlnet, base.unet, *args, scale=0.0), plain)

    def test_a_locked_unet_is_no_part_of_it(self, tmp_path):
        base = tiny_base(tmp_path)
        locked = ControlledDenoiser(new_controlnet(base), base.unet, is_locked=True)
        assert all(n.startswith("controlnet.") for n in locked.state_dict())
        locked(*inputs(base)).square().mean().backward()
        assert all(p.grad is None for p in base.unet.parameters())
        assert locked.controlnet.controlnet_down_blocks[0].weight.grad.abs().max() > 0
        free = ControlledDenoiser(new_controlnet(base), base.unet, is_locked=False)
        names = {n for n, p in free.named_parameters() if p.requires_grad and not n.startswith("controlnet.")}
        assert names and all(n.startswith("decoder.") for n in names)
        assert not any(p.requires_grad for p in base.unet.down_blocks.parameters())

    def test_hints_are_white_on_black_from_0_to_1(self):
        hint = to_hint(torch.tensor([[[[0, 255], [51, 0]]]], dtype=torch.uint8))
        assert hint.shape == (1, 3, 2, 2)
        torch.testing.assert_close(hint[0, 2], torch.tensor([[0.0, 1.0], [0.2, 0.0]]))


def original_name(name: str) -> str:
    """diffusers' name of a tensor of Stable Diffusion 1's ControlNet in ControlNet's own words, written by hand."""
    parts = name.split(".")
    resnet = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1"}
    resnet |= {"norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
    if parts[0] == "time_embedding":
        return f"time_embed.{0 if parts[1] == 'linear_1' else 2}.{parts[-1]}"
    if parts[0] == "conv_in":
        return f"input_blocks.0.0.{parts[-1]}"
    if parts[0] == "controlnet_mid_block":
        return f"middle_block_out.0.{parts[-1]}"
    if parts[0] == "controlnet_down_blocks":
        return f"zero_convs.{parts[1]}.0.{parts[-1]}"
    if parts[0] == "controlnet_cond_embedding":
        place = {"conv_in": 0, "conv_out": 14}
        return (
            f"input_hint_block.{place[parts[1]] if parts[1] in place else 2 * int(parts[2]) + 2}.{parts[-1]}"
        )
    if parts[0] == "mid_block":
        number = 1 if parts[1] == "attentions" else 2 * int(parts[2])
        rest = ".".join([resnet.get(parts[3], parts[3]), *parts[4:]])
        return f"middle_block.{number}.{rest}"
    block = int(parts[1])
    if parts[2] == "downsamplers":
        return f"input_blocks.{3 * block + 3}.0.op.{parts[-1]}"
    number = 3 * block + int(parts[3]) + 1
    rest = ".".join([resnet.get(parts[4], parts[4]), *parts[5:]])
    return f"input_blocks.{number}.{int(parts[2] == 'attentions')}.{rest}"


class TestPublishedWeights:
    def test_names_of_the_original_file_of_full_size(self):
        from diffusers import ControlNetModel

        with torch.device("meta"):
            expected = ControlNetModel(cross_attention_dim=768).state_dict()
        assert len(expected) == 340
        original = {f"control_model.{original_name(n)}": t for n, t in expected.items()}
        assert len(original) == len(expected)
        original |= {"model.diffusion_model.out.2.weight": torch.zeros(1), "logvar": torch.zeros(1)}
        found = from_original(original, Path("control_sd15_canny.pth"))
        assert found.keys() == expected.keys()
        assert all(found[n].shape == expected[n].shape for n in expected)

    def test_a_pth_file_a_folder_and_a_run_give_the_same(self, made, tmp_path):
        base = load_base(made / "base")
        trained = load_controlnet(made / "run", base)
        folder = load_controlnet(made / "run/latest/controlnet", base)
        assert all(torch.equal(t, folder.state_dict()[n]) for n, t in trained.state_dict().items())
        torch.save({"state_dict": dict(trained.state_dict())}, tmp_path / "control.pth")
        again = load_controlnet(tmp_path / "control.pth", base)
        assert all(torch.equal(t, again.state_dict()[n]) for n, t in trained.state_dict().items())

    def test_what_does_not_fit_is_named(self, made, tmp_path):
        base = load_base(made / "base")
        for content, said in (
            ({"a": torch.zeros(1)}, "holds no ControlNet"),
            ({"controlnet_cond_embedding.conv_in.weight": torch.zeros(1)}, "is for another base: it lacks"),
        ):
            torch.save(content, tmp_path / "other.pth")
            with pytest.raises(ValueError, match=said):
                load_controlnet(tmp_path / "other.pth", base)
        with pytest.raises(FileNotFoundError):
            load_controlnet(tmp_path / "nowhere", base)
        with pytest.raises(ValueError, match="no place"):
            to_diffusers("something.else.weight", [], 14)


class TestTraining:
    def test_it_trains_the_controlnet_alone(self, made):
        config = read_config(made / "run/latest", KIND)["model"]
        assert config["sd_locked"] and config["image_size"] == 64
        base = load_base(made / "base")
        before, after = new_controlnet(base).state_dict(), load_controlnet(made / "run", base).state_dict()
        assert any(not torch.equal(before[n], after[n]) for n in before)
        assert not (made / "run/latest/unet").exists()
        rows = [json.loads(line) for line in (made / "run/metrics.jsonl").read_text("utf-8").splitlines()]
        assert any("line_gain" in row for row in rows) and any((made / "run/samples").glob("samples_*.png"))

    def test_a_killed_run_goes_on_exactly(self, made, tmp_path):
        run = tmp_path / "run"
        shutil.copytree(made / "run", run, symlinks=True)
        base = load_base(made / "base")
        whole = load_controlnet(run / "step_00000004", base).state_dict()
        shutil.rmtree(run / "step_00000004")
        train_controlnet.main(flags(made, run))
        again = load_controlnet(run / "step_00000004", base).state_dict()
        assert all(torch.equal(again[n], whole[n]) for n in whole)

    def test_an_unlocked_decoder_is_saved_and_used(self, made, tmp_path):
        train_controlnet.main(
            flags(made, tmp_path / "run", "--sd-locked", "False", "--ema-decay", "0.5", steps=2)
        )
        pipeline = ControlPipeline.open(str(tmp_path / "run"), device="cpu")
        before, after = load_base(made / "base").unet.state_dict(), pipeline.base.unet.state_dict()
        changed = {n.split(".")[0] for n in before if not torch.equal(before[n], after[n])}
        assert changed and changed <= {"up_blocks", "conv_norm_out", "conv_out"}

    def test_the_published_list_is_read(self, made, tmp_path):
        write_pairs(tmp_path / "pairs", 6)
        more = ("--data", str(tmp_path / "pairs"), "--prompt-suffix", ", photo")
        train_controlnet.main([*flags(made, tmp_path / "run", lines="given", steps=2), *more])
        assert read_config(tmp_path / "run/latest", KIND)["model"]["prompt_suffix"] == ", photo"

    @pytest.mark.parametrize(
        ("more", "said"),
        [
            (("--lines", "none"), "needs drawings"),
            (("--lines", "given"), "holds no drawings"),
            (("--image-size", "40"), "multiple of 32"),
            (("--init", "nowhere.pth"), "no ControlNet nowhere.pth"),
            (("--base", "nowhere"), "no base model nowhere"),
        ],
    )
    def test_refusals(self, made, tmp_path, capsys, more, said):
        with pytest.raises(SystemExit) as stopped:
            train_controlnet.main([*flags(made, tmp_path / "run"), *more])
        assert stopped.value.code == 2 and said in capsys.readouterr().err

    def test_hidden_drawings(self):
        lines = torch.full((500, 1, 2, 2), 255, dtype=torch.uint8)
        keys = [str(i) for i in range(500)]
        assert hide_lines(lines, keys, 0.0, (0, 1)) is lines
        found = hide_lines(lines, keys, 0.4, (0, 1))
        assert set(found.unique().tolist()) == {0, 255}
        assert abs((found[:, 0, 0, 0] == 0).float().mean() - 0.4) < 0.08


def write_pairs(folder: Path, count: int, split: str = "train") -> Path:
    """Parquet in the published layout, with a validation list beside it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for name in ("line", "color"):
        (folder / name).mkdir(parents=True)
    for i in range(count):
        for name, options in (("line", {"outline": 0}), ("color", {"fill": (200, 30, 30)})):
            image = Image.new("RGB", (64, 64), "white")
            ImageDraw.Draw(image).ellipse((8 + i, 8, 50, 50), **options)
            image.save(folder / name / f"{i}.png")
    for name in ("train", "valid"):
        table = {
            "pd_line_drawing": [f"line/{i}.png" for i in range(count)],
            "pd_realistic_drawing": [f"color/{i}.png" for i in range(count)],
            "pd_title": [f"红色{i}" for i in range(count)],
        }
        pq.write_table(pa.table(table), folder / f"{name}_data.parquet")
    return folder


@pytest.fixture
def drawing(tmp_path) -> Path:
    image = Image.new("L", (90, 90), 255)
    ImageDraw.Draw(image).ellipse((12, 12, 60, 60), outline=0, width=3)
    image.save(tmp_path / "drawing.png")
    return tmp_path / "drawing.png"


def follow(made, *arguments: str) -> Path:
    quick = ("--controlnet", str(made / "run"), "--device", "cpu", "--sampling.num-steps", "2")
    return control.main([*arguments, *quick])


class TestCommand:
    def test_images_of_a_drawing(self, made, tmp_path, drawing):
        out = follow(made, "红色", "3", str(tmp_path / "a"), "--line", str(drawing), "--batch-size", "2")
        rows = [json.loads(line) for line in (out / "images.jsonl").read_text("utf-8").splitlines()]
        assert [row["index"] for row in rows] == [0, 1, 2] and len(rows[0]["controlnet"]) == 64
        alone = follow(made, "红色", "1", str(tmp_path / "b"), "--line", str(drawing))
        first, again = (np.asarray(Image.open(d / "0000.png"), int) for d in (out, alone))
        assert first.shape == (64, 64, 3) and np.abs(first - again).max() <= 1

    def test_a_published_list_becomes_numbered_images_and_a_zip(self, made, tmp_path):
        write_pairs(tmp_path / "pairs", 3)
        (tmp_path / "pairs/line/1.png").unlink()
        shutil.rmtree(tmp_path / "pairs/color")  # what is asked for need not be there
        arguments = ("", "1", str(tmp_path / "out"), "--pairs", str(tmp_path / "pairs/valid_data.parquet"))
        out = follow(made, *arguments)
        folder = out / "Realistic Drawing"
        assert sorted(p.name for p in folder.glob("*.jpg")) == ["20000.jpg", "20002.jpg"]
        with zipfile.ZipFile(out / "Realistic Drawing.zip") as archive:
            assert archive.namelist() == ["Realistic Drawing/20000.jpg", "Realistic Drawing/20002.jpg"]
        before = (folder / "20000.jpg").stat().st_mtime_ns
        follow(made, *arguments)
        assert (folder / "20000.jpg").stat().st_mtime_ns == before
        with pytest.raises(SystemExit):
            follow(made, *arguments, "--seed", "1")

    def test_labels(self, made, tmp_path, drawing):
        out = follow(made, "红色", "1", str(tmp_path / "a"), "--line", str(drawing), "--label", "implicit")
        write_pairs(tmp_path / "pairs", 1)
        more = ("--pairs", str(tmp_path / "pairs/valid_data.parquet"), "--label", "both")
        answer = follow(made, "", "1", str(tmp_path / "b"), *more)
        for path in (out / "0000.png", answer / "Realistic Drawing/20000.jpg"):
            with open_labelled(path) as image:
                assert read_labels(image) and len(read_manifest(image)["controlnet"]) == 64

    def test_numbers_leave_one_out(self):
        assert (answer_id(0), answer_id(4806), answer_id(4807), answer_id(9998)) == (
            20000,
            24806,
            24808,
            29999,
        )

    def test_drawings_are_squashed_as_published(self, tmp_path):
        write_pairs(tmp_path, 1)
        Image.open(tmp_path / "line/0.png").resize((128, 64)).save(tmp_path / "line/0.png")
        ((row, title, lines),) = read_pairs(tmp_path / "valid_data.parquet", 32)
        assert (row, title, lines.shape) == (0, "红色0", (32, 32)) and lines.max() > 100 and lines[0, 0] == 0

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (("红色", "1", "{out}"), "give one of --line DRAWING and --pairs LIST"),
            (("红色", "1", "{out}", "--line", "nowhere.png"), "no drawing nowhere.png"),
            (("红色", "1", "{out}", "--pairs", "x.parquet"), "the titles are the texts"),
            (("红色", "1", "{out}", "--line", "{drawing}", "--scale", "3"), "scale must lie in"),
            (("红色", "1", "{out}", "--line", "{drawing}", "--white.erode", "2"), "need --whiten"),
        ],
    )
    def test_bad_input(self, made, tmp_path, capsys, drawing, arguments, said):
        with pytest.raises(SystemExit) as stopped:
            follow(made, *(a.format(out=tmp_path / "out", drawing=drawing) for a in arguments))
        assert stopped.value.code == 2 and said in capsys.readouterr().err

    def test_whitened_images_have_white_backgrounds_or_are_left(self, made, tmp_path, drawing):
        out = follow(made, "红色", "1", str(tmp_path / "w"), "--line", str(drawing), "--whiten")
        row = json.loads((out / "images.jsonl").read_text("utf-8"))
        assert row["whiten"]["method"] == "border"

    def test_a_pipeline_repeats_itself(self, made):
        pipeline = ControlPipeline.open(str(made / "run"), device="cpu")
        lines = np.zeros((64, 64), np.uint8)
        options = SamplingOptions(num_steps=2)
        first, second = (pipeline("红", lines, 1, 3, options)[0] for _ in range(2))
        assert first.tobytes() == second.tobytes()
