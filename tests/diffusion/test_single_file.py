"""A checkpoint in one file, as WebUI and ComfyUI keep them: weights in the original names, configs from a folder."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_base import tiny_base
from torch import Tensor

from diffusion import generate
from diffusion.base import load_base, save_base
from diffusion.pipeline import DiffusionToImage

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def original_unet_name(name: str, layers: int, attends_up: list[bool]) -> str:
    """Name of a weight of UNet2DConditionModel -> that of CompVis' UNetModel."""
    for ours, theirs in ENDS.items():
        if name.startswith(f"{ours}."):
            return name.replace(ours, theirs, 1)
    side, *_ = name.split("_block")
    part = re.match(r"(?:down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)|mid_block\.(\w+)\.(\d+)\.(.*)", name)
    if side == "mid":
        kind, place, rest = part[5], int(part[6]), part[7]
        start = "middle_block.1." if kind == "attentions" else f"middle_block.{2 * place}."
    else:
        level, kind, place, rest = int(part[1]), part[2], int(part[3]), part[4]
        step = layers + 1
        if kind == "downsamplers":
            return f"input_blocks.{step * (level + 1)}.0.op.{rest.removeprefix('conv.')}"
        if kind == "upsamplers":
            return f"output_blocks.{step * level + layers}.{1 + attends_up[level]}.{rest}"
        number = step * level + place + (side == "down")
        start = f"{'input' if side == 'down' else 'output'}_blocks.{number}.{int(kind == 'attentions')}."
    if kind == "resnets":
        module, _, rest = rest.partition(".")
        rest = f"{RESNET[module]}.{rest}"
    return start + rest


def original_vae_name(name: str, levels: int) -> str:
    """Name of a weight of AutoencoderKL without attention -> that of CompVis' AutoencoderKL."""
    name = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets", lambda m: f"up.{levels - 1 - int(m[1])}.block", name)
    return re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", name)


def write_single_file(base, path: Path) -> Path:
    unet = base.unet.config
    attends = ["CrossAttn" in kind for kind in unet.up_block_types]
    weights: dict[str, Tensor] = {}
    for name, tensor in base.unet.state_dict().items():
        new = original_unet_name(name, unet.layers_per_block, attends)
        weights[f"model.diffusion_model.{new}"] = tensor
    levels = len(base.vae.config.block_out_channels)
    for name, tensor in base.vae.state_dict().items():
        weights[f"first_stage_model.{original_vae_name(name, levels)}"] = tensor
    for name, tensor in base.text_encoder.state_dict().items():
        weights[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = tensor
    save_file({name: tensor.contiguous().clone() for name, tensor in weights.items()}, path)
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Path]:
    """A base as a folder, and its weights in one file."""
    folder = tmp_path_factory.mktemp("single")
    base = tiny_base(folder / "tokenizer", text="clip")
    (folder / "base").mkdir()
    save_base(base, folder / "base")
    return folder / "base", write_single_file(base, folder / "model.safetensors")


def test_its_weights_are_those_of_the_folder(made):
    folder, file = made
    whole, single = load_base(folder), load_base(file, config=str(folder))
    for part in ("unet", "vae", "text_encoder"):
        expected, found = getattr(whole, part).state_dict(), getattr(single, part).state_dict()
        assert set(found) == set(expected)
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items()), part
    assert single.text_len == whole.text_len


def test_the_command_makes_the_same_images_of_both(made, tmp_path):
    folder, file = made
    flags = ["--device", "cpu", "--precision", "fp32", "--num-steps", "2"]
    out = generate.main(
        ["a red shoe", "1", str(tmp_path / "out"), "--base", str(file), "--base-config", str(folder), *flags]
    )
    from PIL import Image

    expected = DiffusionToImage.from_pretrained(folder, "cpu", precision="fp32")("a red shoe", 1, num_steps=2)
    with Image.open(out / "0000.png") as image:
        assert image.tobytes() == expected[0].tobytes()


def test_without_a_folder_and_without_the_hub_the_sentence_names_the_option(made, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"cannot be loaded as Stable Diffusion 1\.x: .*--base-config"):
        load_base(made[1])
