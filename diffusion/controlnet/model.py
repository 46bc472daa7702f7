"""ControlNet (Zhang et al. 2023, arXiv:2302.05543) for any base of this package: built anew, loaded, joined to a UNet.

A copy of the UNet's encoder reads a drawing in pixels beside the noisy latents; products that start at zero add what it
found to the UNet's skip connections. Published weights are diffusers folders, or the original `control_sd15_canny.pth`,
which holds Stable Diffusion and ControlNet in one file and is read without running its pickle.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from common.checkpoint import resolve
from common.console.terminal import first_line
from diffusion.base import DiffusionBase, quiet
from diffusion.hub import download
from vq.published.foreign import read_tensors

KIND = "controlnet"
FOLDER = "controlnet"  # of a checkpoint, in diffusers' layout
HINT_WIDTHS = (16, 32, 96, 256)  # of the encoder of drawings; each but the first halves the sides
PREFIX = "control_model."


def new_controlnet(base: DiffusionBase) -> nn.Module:
    """diffusers' ControlNetModel with the weights of the base's UNet, whose products to the UNet are zero.

    Raises ValueError for an autoencoder that no hint encoder fits.
    """
    from diffusers import ControlNetModel

    levels = base.downsample_factor.bit_length()  # 8 -> 4 widths, of which three halve
    if not 2 <= levels <= len(HINT_WIDTHS):
        raise ValueError(
            f"ControlNet reads drawings at 2, 4 or 8 pixels a latent, not {base.downsample_factor}"
        )
    with quiet():
        return ControlNetModel.from_unet(
            base.unet, conditioning_embedding_out_channels=HINT_WIDTHS[:levels]
        ).requires_grad_(False)


def load_controlnet(name: str | Path, base: DiffusionBase) -> nn.Module:
    """A ControlNet for `base`, in float32 and eval mode: a folder of diffusers, a checkpoint or run of
    diffusion.train_controlnet, a hub id, or a file of the original layout (.pth, .ckpt, .safetensors).

    Raises FileNotFoundError or ValueError saying what is missing or does not fit.
    """
    path = Path(name)
    if path.is_file():
        model = new_controlnet(base)
        weights = from_original(read_tensors(path), path)
    else:
        model = _open_folder(find_folder(name))
        weights = None
    expected = new_controlnet(base).state_dict()
    require_same_shapes(model.state_dict() if weights is None else weights, expected, path)
    if weights is not None:
        model.load_state_dict(weights)
    return model.float().eval().requires_grad_(False)


def find_folder(name: str | Path) -> Path:
    """The folder in diffusers' layout that `name` stands for. Raises FileNotFoundError."""
    path = Path(name)
    if (path / "diffusion_pytorch_model.safetensors").is_file():
        return path
    if path.is_dir():
        directory = resolve(path)
        if (directory / FOLDER).is_dir():
            return directory / FOLDER
        raise FileNotFoundError(
            f"{path} holds no ControlNet: neither a checkpoint of one nor safetensors of diffusers"
        )
    if str(name).count("/") == 1 and not str(name).startswith((".", "/")):
        return download(str(name))
    raise FileNotFoundError(f"no ControlNet {name}: give a folder, a file or a hub id")


def _open_folder(folder: Path) -> nn.Module:
    from diffusers import ControlNetModel

    try:
        with quiet():
            return ControlNetModel.from_pretrained(str(folder), local_files_only=True, use_safetensors=True)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{folder} cannot be loaded as a ControlNet: {first_line(error)}") from error


def require_same_shapes(weights: dict[str, Tensor], expected: dict[str, Tensor], where: Path) -> None:
    """Raises ValueError naming the first tensor that a ControlNet of this base would not have."""
    missing, extra = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    wrong = sorted(n for n in expected.keys() & weights.keys() if expected[n].shape != weights[n].shape)
    for names, how in ((missing, "lacks"), (extra, "has the unknown"), (wrong, "has another shape of")):
        if names:
            raise ValueError(
                f"the ControlNet {where} is for another base: it {how} {names[0]} ({len(names)} in all)"
            )


# --- the original layout -------------------------------------------------------------------------------------------

_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_PLAIN = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "middle_block_out.0": "controlnet_mid_block",
}


def from_original(tensors: dict[str, Tensor], where: Path) -> dict[str, Tensor]:
    """Weights under the names of CompVis' and ControlNet's own code -> diffusers' names; Stable Diffusion beside them
    is left out. Raises ValueError where there is no ControlNet."""
    own = {n.removeprefix(PREFIX): t for n, t in tensors.items() if n.startswith(PREFIX)}
    own = own or {n: t for n, t in tensors.items() if n.startswith(("input_", "zero_", "middle_", "time_"))}
    if "input_hint_block.0.weight" not in own:
        if "controlnet_cond_embedding.conv_in.weight" in tensors:
            return tensors  # diffusers' names already
        raise ValueError(f"{where} holds no ControlNet: there is no {PREFIX}input_hint_block.0.weight")
    blocks = _blocks(own)
    hints = [n for n in own if n.startswith("input_hint_block.") and n.endswith(".weight")]
    last = max(int(n.split(".")[1]) for n in hints)
    return {to_diffusers(name, blocks, last): tensor for name, tensor in own.items()}


def _blocks(names: dict[str, Tensor]) -> list[tuple[int, int]]:
    """For every input block after the first: (down block, number of its resnet), or (down block, -1) for what halves
    the sides."""
    count = 1 + max(int(n.split(".")[1]) for n in names if n.startswith("input_blocks."))
    positions, block, resnet = [(0, 0)], 0, 0
    for i in range(1, count):
        if f"input_blocks.{i}.0.op.weight" in names:
            positions.append((block, -1))
            block, resnet = block + 1, 0
        else:
            positions.append((block, resnet))
            resnet += 1
    return positions


def to_diffusers(name: str, blocks: Sequence[tuple[int, int]], last_hint: int) -> str:
    """One name of ControlNet's own code in diffusers' words."""
    stem, _, kind = name.rpartition(".")
    if stem in _PLAIN:
        return f"{_PLAIN[stem]}.{kind}"
    if found := re.fullmatch(r"zero_convs\.(\d+)\.0", stem):
        return f"controlnet_down_blocks.{found[1]}.{kind}"
    if found := re.fullmatch(r"input_hint_block\.(\d+)", stem):
        number = int(found[1])
        part = (
            "conv_in" if number == 0 else "conv_out" if number == last_hint else f"blocks.{number // 2 - 1}"
        )
        return f"controlnet_cond_embedding.{part}.{kind}"
    if found := re.fullmatch(r"middle_block\.(\d)\.(.+)", stem):
        number = int(found[1])
        part = "attentions.0" if number == 1 else f"resnets.{number // 2}"
        return f"mid_block.{part}.{_RESNET.get(found[2], found[2])}.{kind}"
    if found := re.fullmatch(r"input_blocks\.(\d+)\.(\d)\.(.+)", stem):
        block, resnet = blocks[int(found[1])]
        if resnet < 0:
            return f"down_blocks.{block}.downsamplers.0.conv.{kind}"
        part = "attentions" if found[2] == "1" else "resnets"
        return f"down_blocks.{block}.{part}.{resnet}.{_RESNET.get(found[3], found[3])}.{kind}"
    raise ValueError(f"the ControlNet's tensor {name} has no place in diffusers' layout")


# --- joined to the UNet --------------------------------------------------------------------------------------------


def controlled(
    controlnet: nn.Module,
    unet: nn.Module,
    latents: Tensor,
    timesteps: Tensor,
    conditions: Tensor,
    drawings: Tensor,
    scale: float = 1.0,
) -> Tensor:
    """Noisy latents (B, C, h, w), timesteps (B,) or (), conditions (B, T, D) and drawings (B, 3, S, S) in [0, 1], white
    on black -> prediction (B, C, h, w)."""
    down, mid = controlnet(
        latents, timesteps, conditions, drawings, conditioning_scale=scale, return_dict=False
    )
    return unet(
        latents,
        timesteps,
        conditions,
        down_block_additional_residuals=down,
        mid_block_additional_residual=mid,
    ).sample


def to_hint(lines: Tensor) -> Tensor:
    """Drawings (B, 1, S, S) uint8 -> (B, 3, S, S) in [0, 1], as the published ControlNets read them."""
    return lines.float().div(255).expand(-1, 3, -1, -1)


class ControlledDenoiser(nn.Module):
    """What a training moves: the ControlNet, and the UNet's decoder where it is unlocked.

    A locked UNet is no part of it, so that checkpoints hold the ControlNet alone.
    """

    def __init__(self, controlnet: nn.Module, unet: nn.Module, is_locked: bool) -> None:
        super().__init__()
        self.controlnet = controlnet.requires_grad_(True)
        self._unet = [unet]  # in a list, so that it is no submodule
        if not is_locked:
            self.decoder = nn.ModuleList([unet.up_blocks, unet.conv_norm_out, unet.conv_out])
            self.decoder.requires_grad_(True)

    @property
    def unet(self) -> nn.Module:
        return self._unet[0]

    def forward(self, latents: Tensor, timesteps: Tensor, conditions: Tensor, drawings: Tensor) -> Tensor:
        return controlled(self.controlnet, self.unet, latents, timesteps, conditions, drawings)
