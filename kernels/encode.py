"""Images to codes by compiled code (csrc/encode.cpp), for x86 CPUs with AVX512-BF16 or AVX2: the `fast` encoder and the
search for the nearest code as one call.

The convolutions of PyTorch reach nine tenths of the speed of these, and what lies between them costs as much again.
"""

import copy
import ctypes

import torch
from torch import Tensor, nn

from common.precision import trains_in_bf16
from kernels import compiler
from kernels.compiler import address
from kernels.packing import GROUP, group_weights
from kernels.structure import CONV, Known, is_exactly, is_touched, named, why_changed

RESIDUAL, DOWN, ATTENTION = range(3)  # kinds of a block, as in encode.cpp
REGISTER = 16  # floats
KERNEL_TO_TILE = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])  # Winograd's G
TOLERANCE = 0.1  # of the spread of latents; bfloat16 itself costs a few hundredths
GROUP_NORM = Known("vq.layers.GroupNorm", ("weight", "bias"))
BLOCKS = {
    "vq.autoencoder.ResBlock": Known(
        "vq.autoencoder.ResBlock", children={"norm": GROUP_NORM, "conv1": CONV, "conv2": CONV}
    ),
    "vq.autoencoder.AttentionBlock": Known(
        "vq.autoencoder.AttentionBlock", children={"norm": GROUP_NORM, "qkv": CONV, "out": CONV}
    ),
    CONV.name: CONV,
}
VECTOR_QUANTIZER = "vq.quantizer.VectorQuantizer"

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


class _Images(ctypes.Structure):
    _fields_ = (
        ("pixels", _pointer),
        ("strides", _integer * 4),
        *((name, _integer) for name in ("number", "height", "width")),
    )


def _declare(library: ctypes.CDLL) -> None:
    library.encode.argtypes, library.encode.restype = (*(_pointer,) * 4, ctypes.c_int), None


SOURCE = compiler.Source("encode.cpp", (_Conv, _Norm, _Block, _Encoder, _Images), _declare)


def unavailable_reason() -> str:
    """Why this machine cannot run it; empty where it can."""
    return compiler.unavailable_reason(SOURCE)


def unsupported_reason(tokenizer: nn.Module) -> str:
    """Why it is not for this ImageTokenizer; empty where it is."""
    if not is_exactly(tokenizer, "vq.model.ImageTokenizer"):
        return f"{type(tokenizer).__qualname__} is not vq.model.ImageTokenizer"
    encoder = tokenizer.encoder
    if not is_exactly(encoder, "vq.autoencoder.Encoder"):
        return "compiled encoding knows the fast architecture"
    body = {
        str(i): BLOCKS.get(f"{type(b).__module__}.{type(b).__qualname__}") for i, b in enumerate(encoder.body)
    }
    if other := [type(encoder.body[int(i)]).__qualname__ for i, known in body.items() if known is None]:
        return f"no compiled form of {other[0]}"
    children = {
        "conv_in": CONV,
        "body": Known("torch.nn.modules.container.Sequential", children=body),
        "norm_out": GROUP_NORM,
        "conv_out": CONV,
    }
    if reason := why_changed(encoder, Known("vq.autoencoder.Encoder", children=children)):
        return reason
    if is_exactly(tokenizer.quantizer, VECTOR_QUANTIZER) and is_touched(tokenizer.quantizer):
        return "a hook on the quantizer"
    attention = [b for b in encoder.body if is_exactly(b, "vq.autoencoder.AttentionBlock")]
    if any(_head_dim(block) % GROUP for block in attention):
        return "compiled encoding needs heads of multiples of 32"
    if any(_is_unusual(m) for m in encoder.modules() if isinstance(m, nn.Conv2d)):
        return "a convolution is dilated, grouped or padded otherwise"
    return ""


def _is_unusual(conv: nn.Conv2d) -> bool:
    expected = {(3, 1): 1, (1, 1): 0, (4, 2): 1}.get((conv.kernel_size[0], conv.stride[0]))  # padding
    square = conv.kernel_size[0] == conv.kernel_size[1] and conv.stride[0] == conv.stride[1]
    usual = square and conv.padding == (expected, expected) and conv.padding_mode == "zeros"
    return not usual or conv.dilation != (1, 1) or conv.groups != 1


def _head_dim(block: nn.Module) -> int:
    return block.qkv.in_channels // block.num_heads


class CompiledEncoder:
    """A tokenizer's encoder and nearest-code search, as they were when this was made.

    The codes of an image depend neither on its company nor on the number of threads.
    """

    @torch.autocast(
        "cpu", enabled=False
    )  # weights are transformed in float32, also where the first call is in bf16
    def __init__(self, tokenizer: nn.Module, with_codes: bool = True) -> None:
        """with_codes: search the codes too where the quantizer has a codebook. Raises ValueError where the machine or
        the architecture does not allow it."""
        if reason := unavailable_reason():
            raise ValueError(f"compiled encoding cannot run here: {reason}")
        if reason := unsupported_reason(tokenizer):
            raise ValueError(reason)
        self.tokenizer = tokenizer
        encoder = tokenizer.encoder
        self._kept: list[Tensor] = []  # what the structures point to
        attention = [b for b in encoder.body if is_exactly(b, "vq.autoencoder.AttentionBlock")]
        self._blocks = (_Block * len(encoder.body))(*map(self._block, encoder.body))
        bands = named("vq.autoencoder.haar_matrix")(3, encoder.haar_levels, torch.device("cpu"))
        codes = self._codes(tokenizer.quantizer) if with_codes else None
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
        height, width = images.shape[2:]
        if height % factor or width % factor:
            raise ValueError(f"image sides must be multiples of {factor}, not {(height, width)}")
        latents, ids = self._run(images.float())
        if not self._struct.codes:
            ids = self.tokenizer.quantizer(latents.permute(0, 3, 1, 2)).ids.flatten(1)
        return ids

    def _run(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """float32 on the CPU, of any strides -> latents (B, h, w, D) where there are no codes, ids (B, N) where there
        are; the other one is not filled."""
        if images.device.type != "cpu":
            raise ValueError(f"compiled encoding takes images on the CPU, not on {images.device}")
        factor = self.tokenizer.downsample_factor
        batch, _, height, width = images.shape
        grid = height // factor, width // factor
        ids = torch.empty(batch, grid[0] * grid[1], dtype=torch.long)
        latents = torch.empty(0)
        if not self._struct.codes:
            latents = torch.empty(batch, *grid, self._struct.latent_dim)
        view = _Images(images.data_ptr(), (_integer * 4)(*images.stride()), batch, height, width)
        compiler.load(SOURCE).encode(
            ctypes.addressof(self._struct), ctypes.addressof(view), address(latents, torch.float32),
            address(ids, torch.long), torch.get_num_threads(),
        )  # fmt: skip
        return latents, ids

    def _keep(self, tensor: Tensor) -> int:
        self._kept.append(tensor.detach().contiguous())
        return self._kept[-1].data_ptr()

    def _block(self, block: nn.Module) -> _Block:
        if is_exactly(block, "vq.autoencoder.ResBlock"):
            first, second = (self._conv(conv, by_tiles=True) for conv in (block.conv1, block.conv2))
            return _Block(RESIDUAL, self._norm(block.norm), first, second)
        if is_exactly(block, "vq.autoencoder.AttentionBlock"):
            return _Block(ATTENTION, self._norm(block.norm), self._conv(block.qkv), self._conv(block.out))
        return _Block(DOWN, _Norm(), self._conv(block), _Conv())

    def _norm(self, norm: nn.GroupNorm) -> _Norm:
        weight, bias = self._keep(norm.weight.float()), self._keep(norm.bias.float())
        return _Norm(weight, bias, norm.num_channels, norm.num_groups, norm.eps)

    def _conv(self, conv: nn.Conv2d, by_tiles: bool = False) -> _Conv:
        """Inputs are rounded up to whole pairs, outputs to whole groups."""
        kernel, stride = conv.kernel_size[0], conv.stride[0]
        weight = conv.weight.detach().float().flatten(2).transpose(1, 2)  # (N, taps, C)
        weight = nn.functional.pad(weight, (0, weight.shape[2] % 2))
        packed = self._keep(group_weights(weight).bfloat16())
        transformed = None
        if by_tiles:
            tiles = torch.einsum(
                "ij,njkc,lk->nilc", KERNEL_TO_TILE, weight.unflatten(1, (3, 3)), KERNEL_TO_TILE
            )
            transformed = self._keep(group_weights(tiles.flatten(1, 2)).bfloat16())
        bias = nn.functional.pad(conv.bias.detach().float(), (0, -len(conv.bias) % GROUP))
        return _Conv(packed, transformed, self._keep(bias), weight.shape[2], len(bias), kernel, stride)

    @staticmethod
    def _codes(quantizer: nn.Module) -> Tensor | None:
        """(levels, D + 1, V'): a distance is their product with (z, 1); None where no codebook is searched."""
        if not is_exactly(quantizer, VECTOR_QUANTIZER):
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


class EncodeIds:
    """What replaces `tokenizer.encode_ids`: compiled under bf16 autocast, the tokenizer's own code elsewhere.

    Weights are packed again when they have changed. Goes along with copies of the tokenizer."""

    def __init__(self, tokenizer: nn.Module) -> None:
        self.tokenizer = tokenizer
        self._pack()

    def _pack(self) -> None:
        self._stamp, self._compiled = self._now(), CompiledEncoder(self.tokenizer)

    def _now(self) -> list[tuple[int, int]]:
        return [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in self.tokenizer.parameters()]

    def __call__(self, images: Tensor) -> Tensor:
        compiled = images.device.type == "cpu" and trains_in_bf16() and not unsupported_reason(self.tokenizer)
        if not compiled:
            return type(self.tokenizer).encode_ids(self.tokenizer, images)
        if self._stamp != self._now():
            self._pack()
        return self._compiled.encode_ids(images)

    def __deepcopy__(self, memo: dict) -> "EncodeIds":
        other = memo[id(self)] = type(self).__new__(type(self))
        other.tokenizer, other._stamp = copy.deepcopy(self.tokenizer, memo), []
        return other


@torch.no_grad()
def mismatch(tokenizer: nn.Module) -> str:
    """Compares latents and codes of random images with the tokenizer's own in float32; says what differs."""
    side = 4 * tokenizer.downsample_factor
    images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.autocast("cpu", enabled=False):
        exact = tokenizer.encoder(images)
        found = CompiledEncoder(tokenizer, with_codes=False)._run(images)[0].permute(0, 3, 1, 2)
        error = float((found - exact).square().mean().sqrt() / exact.std())
        if not error <= TOLERANCE:
            return f"latents differ by {error:.1%} of their spread, {TOLERANCE:.0%} allowed"
        if is_exactly(tokenizer.quantizer, VECTOR_QUANTIZER):
            codes, expected = (
                CompiledEncoder(tokenizer)._run(images)[1],
                tokenizer.quantizer(found).ids.flatten(1),
            )
            same = float((codes == expected).float().mean())
            if (
                same < 1 - TOLERANCE
            ):  # sums of squares are rounded otherwise: near ties may fall the other way
                return f"{1 - same:.1%} of the codes of the same latents differ"
    return ""
