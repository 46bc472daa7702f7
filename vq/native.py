"""Pictures to codes by compiled code (native.cpp), for x86 CPUs with AVX512-BF16 or AVX2: the `fast` encoder as a call.

The convolutions of PyTorch reach nine tenths of the speed of these, and what lies between them costs as much again.
"""

import ctypes
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from common import native
from common.log import say
from common.precision import Precision, autocast
from vq.autoencoder import AttentionBlock, Encoder, ResBlock, haar_matrix
from vq.layers import GroupNorm
from vq.model import ImageTokenizer
from vq.quantizer import VectorQuantizer

SOURCE = Path(__file__).with_name("native.cpp")
RESIDUAL, DOWN, ATTENTION = range(3)  # kinds of a block, as in native.cpp
REGISTER = 16  # floats
KERNEL_TO_TILE = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])  # Winograd's G
Engine = Literal["auto", "native", "plain"]

_pointer, _integer = ctypes.c_void_p, ctypes.c_int64


class _Conv(ctypes.Structure):
    _fields_ = (
        *((name, _pointer) for name in ("weight", "transformed", "bias")),
        *((name, _integer) for name in ("inputs", "outputs", "kernel", "stride")),
    )


class _Norm(ctypes.Structure):
    _fields_ = (
        ("weight", _pointer),
        ("bias", _pointer),
        ("channels", _integer),
        ("groups", _integer),
        ("eps", ctypes.c_float),
    )


class _Block(ctypes.Structure):
    _fields_ = (("kind", _integer), ("norm", _Norm), ("first", _Conv), ("second", _Conv))


class _Encoder(ctypes.Structure):
    _fields_ = (
        ("bands", _pointer),
        ("blocks", ctypes.POINTER(_Block)),
        ("codes", _pointer),
        ("conv_in", _Conv),
        ("conv_out", _Conv),
        ("norm_out", _Norm),
        *(
            (name, _integer)
            for name in (
                "patch",
                "num_blocks",
                "head_dim",
                "latent_dim",
                "num_codes",
                "unit",
                "levels",
                "codebook_size",
            )
        ),
    )


class _Pictures(ctypes.Structure):
    _fields_ = (
        ("pixels", _pointer),
        ("strides", _integer * 4),
        *((name, _integer) for name in ("number", "height", "width")),
    )


def fits(tokenizer: ImageTokenizer) -> bool:
    """Whether native.cpp knows the encoder, and its heads are whole groups of weights."""
    encoder = tokenizer.encoder
    if not isinstance(encoder, Encoder):
        return False
    return all(_head_dim(b) % native.GROUP == 0 for b in encoder.body if isinstance(b, AttentionBlock))


def why_not() -> str:
    """Why this machine cannot run it; empty where it can."""
    return native.why_not(SOURCE)


def _head_dim(block: AttentionBlock) -> int:
    return block.qkv.in_channels // block.num_heads


class NativeEncoder:
    """A tokenizer's encoder and nearest-code search, as they were when this was made.

    The codes of a picture depend neither on its company nor on the number of threads.
    """

    def __init__(self, tokenizer: ImageTokenizer) -> None:
        """Raises ValueError where the machine or the architecture does not allow it."""
        if reason := why_not():
            raise ValueError(f"compiled encoding cannot run here: {reason}")
        if not fits(tokenizer):
            raise ValueError("compiled encoding knows the fast architecture with heads of multiples of 32")
        self.tokenizer = tokenizer
        encoder: Encoder = tokenizer.encoder
        self._kept: list[Tensor] = []  # what the structures point to
        attention = [b for b in encoder.body if isinstance(b, AttentionBlock)]
        self._blocks = (_Block * len(encoder.body))(*map(self._block, encoder.body))
        bands = haar_matrix(3, encoder.haar_levels, torch.device("cpu"))
        codes = self._codes(tokenizer.quantizer)
        self._struct = _Encoder(
            self._keep(nn.functional.pad(bands, (0, -len(bands) % REGISTER))),
            self._blocks,
            None if codes is None else self._keep(codes),
            self._conv(encoder.conv_in),
            self._conv(encoder.conv_out),
            self._norm(encoder.norm_out),
            2**encoder.haar_levels,
            len(encoder.body),
            _head_dim(attention[0]) if attention else 0,
            encoder.conv_out.out_channels,
            0 if codes is None else codes.shape[2],
            codes is not None and tokenizer.quantizer.l2_normalize,
            tokenizer.config.code_depth,
            tokenizer.config.codebook_size,
        )

    @torch.no_grad()
    def encode_ids(self, images: Tensor) -> Tensor:
        """As `ImageTokenizer.encode_ids`: (B, 3, H, W) float32 in [-1, 1] -> (B, N) long, raster order."""
        factor = self.tokenizer.downsample_factor
        batch, _, height, width = images.shape
        if height % factor or width % factor:
            raise ValueError(f"picture sides must be multiples of {factor}, not {(height, width)}")
        images = images.float()
        grid = height // factor, width // factor
        ids = torch.empty(batch, grid[0] * grid[1], dtype=torch.long)
        latents = torch.empty(0)
        if not self._struct.codes:
            latents = torch.empty(batch, *grid, self._struct.latent_dim)
        pictures = _Pictures(images.data_ptr(), (_integer * 4)(*images.stride()), batch, height, width)
        encode = native.library(SOURCE).encode
        encode.argtypes, encode.restype = (*(_pointer,) * 4, ctypes.c_int), None
        encode(
            ctypes.addressof(self._struct), ctypes.addressof(pictures), latents.data_ptr(), ids.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        if not self._struct.codes:
            ids = self.tokenizer.quantizer(latents.permute(0, 3, 1, 2)).ids.flatten(1)
        return ids

    def _keep(self, tensor: Tensor) -> int:
        self._kept.append(tensor.detach().contiguous())
        return self._kept[-1].data_ptr()

    def _block(self, block: nn.Module) -> _Block:
        if isinstance(block, ResBlock):
            first, second = (self._conv(conv, by_tiles=True) for conv in (block.conv1, block.conv2))
            return _Block(RESIDUAL, self._norm(block.norm), first, second)
        if isinstance(block, AttentionBlock):
            return _Block(ATTENTION, self._norm(block.norm), self._conv(block.qkv), self._conv(block.out))
        if isinstance(block, nn.Conv2d):
            return _Block(DOWN, _Norm(), self._conv(block), _Conv())
        raise TypeError(f"no compiled form of {type(block).__name__}")

    def _norm(self, norm: GroupNorm) -> _Norm:
        weight, bias = self._keep(norm.weight.float()), self._keep(norm.bias.float())
        return _Norm(weight, bias, norm.num_channels, norm.num_groups, norm.eps)

    def _conv(self, conv: nn.Conv2d, by_tiles: bool = False) -> _Conv:
        """Inputs are rounded up to whole pairs, outputs to whole groups."""
        kernel, stride = conv.kernel_size[0], conv.stride[0]
        weight = conv.weight.detach().float().flatten(2).transpose(1, 2)  # (N, taps, C)
        weight = nn.functional.pad(weight, (0, weight.shape[2] % 2))
        packed = self._keep(native.group_weights(weight).bfloat16())
        transformed = None
        if by_tiles:
            tiles = torch.einsum(
                "ij,njkc,lk->nilc", KERNEL_TO_TILE, weight.unflatten(1, (3, 3)), KERNEL_TO_TILE
            )
            transformed = self._keep(native.group_weights(tiles.flatten(1, 2)).bfloat16())
        bias = nn.functional.pad(conv.bias.detach().float(), (0, -len(conv.bias) % native.GROUP))
        return _Conv(packed, transformed, self._keep(bias), weight.shape[2], len(bias), kernel, stride)

    @staticmethod
    def _codes(quantizer: nn.Module) -> Tensor | None:
        """(levels, D + 1, V'): a distance is their product with (z, 1); None where no codebook is searched."""
        if not isinstance(quantizer, VectorQuantizer):
            return None
        levels = []
        for level in range(quantizer.depth):
            entries = quantizer.entries(level).detach().float()
            far = nn.functional.pad(
                entries.square().sum(1), (0, -len(entries) % REGISTER), value=float("inf")
            )
            entries = nn.functional.pad(entries, (0, 0, 0, -len(entries) % REGISTER))
            levels.append(torch.cat([-2.0 * entries.t(), far.unsqueeze(0)]))
        return torch.stack(levels)


class PictureEncoder:
    """Pictures to codes by the fastest way that the machine and the precision allow."""

    def __init__(
        self,
        tokenizer: ImageTokenizer,
        device: torch.device,
        precision: Precision = "auto",
        engine: Engine = "auto",
    ) -> None:
        """Raises ValueError for a native engine that cannot be; auto then takes PyTorch, and says why."""
        self.tokenizer, self.device, self.precision = tokenizer, device, precision
        self.native: NativeEncoder | None = None
        in_bf16 = precision != "fp32"
        if engine == "native" and (device.type != "cpu" or not in_bf16):
            raise ValueError(f"the native engine computes in bf16 on a CPU, not in {precision} on {device}")
        wanted = device.type == "cpu" and in_bf16 and fits(tokenizer)
        wanted = wanted and bool(native.level()) and not native.is_outdone()
        if engine == "auto" and wanted and (reason := why_not()):
            say(f"encoding slower, with PyTorch's convolutions: {reason}")
        elif engine == "native" or (engine == "auto" and wanted):
            self.native = NativeEncoder(tokenizer)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, N) long, raster order, on the device."""
        if self.native:
            return self.native.encode_ids(images)
        images = images.to(self.device, memory_format=torch.channels_last)
        with autocast(self.device, self.precision):
            return self.tokenizer.encode_ids(images)
