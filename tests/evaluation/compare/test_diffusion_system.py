"""Diffusion bases in the arena, what systems cost, and the line that says which wins."""

import json
from types import SimpleNamespace

import torch

from common.outputs.out_directory import Request
from common.text.language import words_of
from diffusion.base import save_base
from diffusion.scratch.networks import AutoencoderConfig, TextConfig, UnetConfig
from diffusion.scratch.unet_task import make_base_scheduler
from evaluation.arena import join_systems
from evaluation.compare.arena_results import Difference, Match
from evaluation.compare.costs import Costs, read_costs
from evaluation.compare.systems import Setting, SystemSpec, open_system
from evaluation.metrics.statistics import Interval


def write_base(folder):
    from transformers import BertTokenizer

    from diffusion.base import DiffusionBase

    folder.mkdir()
    (folder / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"红色的鞋"]), "utf-8"
    )
    tokenizer = BertTokenizer(vocab=str(folder / "vocab.txt"), model_max_length=8)
    torch.manual_seed(0)
    latents = AutoencoderConfig(image_size=16, channels=(8, 16), norm_groups=4, latent_channels=2)
    unet = UnetConfig((8, 16), attention=(False, True), head_dim=8, norm_groups=4).build(latents, 16)
    text = TextConfig(dim=16, num_layers=1, num_heads=2, text_len=8).build(tokenizer)
    parts = (latents.build(), text, tokenizer, unet)
    for part in (parts[0], parts[1], parts[3]):
        part.requires_grad_(False).eval()
    base = DiffusionBase(*parts, make_base_scheduler("v_prediction", True), 8, "", folder)
    save_base(base, folder)
    return sum(p.numel() for part in (parts[0], parts[1], parts[3]) for p in part.parameters())


def test_a_base_is_a_system_by_its_folder(tmp_path):
    write_base(tmp_path / "base")
    spec = SystemSpec.parse(f"sd={tmp_path / 'base'}?num_steps=2&cfg_scale=2&style=红")
    system = open_system(spec, Setting(3, batch_size=2, device="cpu"))
    assert system.origin["sampling"]["num_steps"] == 2
    assert system.origin["prompting"]["style"] == "红"
    found = list(system.generate([Request("红色的鞋", 1), Request("鞋", 0)]))
    direct = system.pipeline("红色的鞋", 2, seed=3, num_steps=2, cfg_scale=2.0, style="红")
    assert found[0].image.tobytes() == direct[1].tobytes()
    assert system.complaint("鞋") == ""
    assert "knows nothing" in open_system(SystemSpec("sd", spec.what), Setting(device="cpu")).complaint("猫")


def test_what_a_system_cost_is_read_from_its_checkpoint(tmp_path):
    count = write_base(tmp_path / "base")
    (tmp_path / "base" / "config.json").write_text(json.dumps({"training_hours": 2.5, "images_seen": 640}))
    assert read_costs(str(tmp_path / "base")) == Costs(count, 2.5, 640)
    ar = tmp_path / "ar"
    ar.mkdir()
    (ar / "config.json").write_text('{"step": 10}')
    (ar / "train_config.json").write_text('{"loop": {"global_batch_size": 16}}')
    assert read_costs(str(ar)) == Costs(None, None, 160)
    assert read_costs("python:a:b") == Costs()


def test_one_line_says_which_system_wins_at_what():
    def difference(name, low, high, higher):
        return Difference(name, "sd", "ar", Interval((low + high) / 2, low, high), higher)

    systems = [
        SimpleNamespace(spec=SimpleNamespace(name=n), seconds=s) for n, s in (("sd", 0.4), ("ar", 0.2))
    ]
    differences = [
        difference("kind_right[judge]", 0.1, 0.3, True),
        difference("frechet[x]", 1.0, 2.0, False),
        difference("color_right[judge]", -0.1, 0.1, True),
    ]
    match = SimpleNamespace(systems=systems, differences=differences)
    assert (
        Match.winners(match, words_of("en", "arena"))
        == "ar wins at kind_right, seconds an image; sd wins at frechet"
    )
    nothing = SimpleNamespace(systems=systems[:1], differences=())
    assert Match.winners(nothing, words_of("en", "arena")) == "no system wins at anything beyond doubt"


def test_systems_and_arms_are_one_list():
    assert join_systems(["--system", "a=1", "--arm", "b=2", "--system=c=3"]) == [
        "--system",
        "a=1",
        "b=2",
        "c=3",
    ]
