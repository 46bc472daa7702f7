"""Compiled encoding finds the codes of the model in float32, but for near ties."""

import pytest
import torch

import common.native
from vq import native
from vq.autoencoder import FastConfig
from vq.model import ImageTokenizer, TokenizerConfig
from vq.native import NativeEncoder, PictureEncoder
from vq.quantizer import GumbelConfig

CPU = torch.device("cpu")
needs_native = pytest.mark.skipif(bool(native.why_not()), reason=f"no native encoding: {native.why_not()}")
DEEP = FastConfig(haar_levels=1, channels=(32, 64), encoder_blocks=(1, 2), decoder_blocks=(0, 0))
BARE = FastConfig(haar_levels=0, channels=(96,), encoder_blocks=(1,), decoder_blocks=(0,), attention=False)
PATCHED = FastConfig(
    haar_levels=3, channels=(64, 128, 128), encoder_blocks=(0, 1, 0), decoder_blocks=(0, 0, 0)
)
CASES = [
    (DEEP, {}, (20, 28)),  # 5 x 7 places: less than a register, and an odd number
    (DEEP, {"codebook_size": 40, "l2_normalize": False}, (88, 88)),
    (DEEP, {"codebook_size": 40, "code_depth": 2}, (40, 64)),
    (BARE, {"quantizer": "ema"}, (6, 29)),
    (PATCHED, {"quantizer": "fsq", "codebook_size": 64, "fsq_levels": (4, 4, 4)}, (64, 96)),
    (PATCHED, {"quantizer": "gumbel", "gumbel": GumbelConfig()}, (96, 96)),
]


def make(fast, **changes):
    """A tokenizer whose every part says something, those that start at zero too."""
    torch.manual_seed(0)
    sizes = dict(image_size=32, codebook_size=64, codebook_dim=6) | changes
    tokenizer = ImageTokenizer(TokenizerConfig(fast=fast, **sizes)).eval()
    for name, parameter in tokenizer.encoder.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.kaiming_normal_(parameter)
        else:
            torch.nn.init.normal_(parameter, float(name.endswith("norm.weight")), 0.1)
    last = tokenizer.encoder.conv_out
    with torch.no_grad():  # whitened, so that codes differ
        spread, mean = torch.std_mean(tokenizer.encoder(pictures(64, 64)), (0, 2, 3))
        last.weight /= spread.view(-1, 1, 1, 1)
        last.bias.sub_(mean).div_(spread)
    return tokenizer


def pictures(height, width, count=5):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


@needs_native
@pytest.mark.parametrize(("fast", "changes", "sides"), CASES)
def test_codes_are_those_of_the_model(fast, changes, sides):
    tokenizer, images = make(fast, **changes), pictures(*sides)
    found = NativeEncoder(tokenizer).encode_ids(images)
    expected = tokenizer.encode_ids(images)
    assert found.shape == expected.shape and expected.unique().numel() > 8
    assert (found == expected).float().mean() > 0.9
    with torch.autocast("cpu", torch.bfloat16):
        in_bf16 = tokenizer.encode_ids(images)
    assert (found != expected).sum() <= 1.5 * (in_bf16 != expected).sum() + 3


@needs_native
def test_latents_are_as_exact_as_bf16():
    tokenizer, images = make(DEEP, quantizer="gumbel", gumbel=GumbelConfig()), pictures(36, 60)
    seen = []
    tokenizer.quantizer.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].float()))
    NativeEncoder(tokenizer).encode_ids(images)
    tokenizer.encode_ids(images)
    with torch.autocast("cpu", torch.bfloat16):
        tokenizer.encode_ids(images)
    native_error, bf16_error = ((seen[i] - seen[1]).square().mean().sqrt() for i in (0, 2))
    assert 0 < native_error < 1.2 * bf16_error < 0.1 * seen[1].std()


@needs_native
def test_a_picture_depends_on_itself_alone():
    tokenizer, images = make(DEEP), pictures(32, 32, 7)
    encoder = NativeEncoder(tokenizer)
    together = encoder.encode_ids(images)
    assert torch.equal(encoder.encode_ids(images[3:4]), together[3:4])
    assert torch.equal(encoder.encode_ids(images.to(memory_format=torch.channels_last)), together)
    assert torch.equal(encoder.encode_ids(images.flip(3).flip(3)), together)
    assert encoder.encode_ids(images[:0]).shape == (0, 64)
    try:
        torch.set_num_threads(3)
        assert torch.equal(encoder.encode_ids(images), together)
    finally:
        torch.set_num_threads(1)


@needs_native
def test_another_size_of_picture_after_a_larger_one():
    encoder = NativeEncoder(make(DEEP))
    small = encoder.encode_ids(pictures(16, 16))
    encoder.encode_ids(pictures(48, 64))
    assert torch.equal(encoder.encode_ids(pictures(16, 16)), small)


@needs_native
def test_pixels_that_are_no_numbers_get_codes():
    images = pictures(16, 16)
    images[2] = float("nan")
    encoder = NativeEncoder(make(DEEP))
    ids = encoder.encode_ids(images)
    assert ids.min() >= 0 and ids.max() < 64
    assert torch.equal(ids[[0, 1, 3, 4]], encoder.encode_ids(images[[0, 1, 3, 4]]))


@needs_native
def test_what_it_refuses():
    with pytest.raises(ValueError, match="multiples of 4"):
        NativeEncoder(make(DEEP)).encode_ids(pictures(18, 16))
    odd_heads = FastConfig(haar_levels=1, channels=(160,), encoder_blocks=(1,), decoder_blocks=(0,))
    with pytest.raises(ValueError, match="multiples of 32"):
        NativeEncoder(make(odd_heads))
    taming = ImageTokenizer(TokenizerConfig(architecture="taming", image_size=32)).eval()
    with pytest.raises(ValueError, match="fast architecture"):
        PictureEncoder(taming, CPU, "bf16", "native")
    with pytest.raises(ValueError, match="in bf16 on a CPU"):
        PictureEncoder(make(DEEP), CPU, "fp32", "native")


def test_engines(monkeypatch):
    monkeypatch.setattr(common.native, "is_outdone", lambda: False)
    tokenizer, images = make(DEEP), pictures(32, 32)
    expected = tokenizer.encode_ids(images)
    for precision, engine in (("fp32", "auto"), ("fp32", "plain"), ("bf16", "plain")):
        encoder = PictureEncoder(tokenizer, CPU, precision, engine)
        assert encoder.native is None
        found = encoder(images)
        assert (
            torch.equal(found, expected) if precision == "fp32" else (found == expected).float().mean() > 0.9
        )
    by_itself = PictureEncoder(tokenizer, CPU)
    assert (by_itself.native is not None) == (not native.why_not())
    monkeypatch.setattr(common.native, "is_outdone", lambda: True)
    assert PictureEncoder(tokenizer, CPU).native is None


@pytest.mark.skipif(not common.native.level(), reason="a CPU without native encoding")
def test_without_a_compiler_pytorch_takes_over(no_compiler, capsys):
    assert PictureEncoder(make(DEEP), CPU, "bf16").native is None
    assert "compiling native.cpp failed: exit code 1" in capsys.readouterr().out
    with pytest.raises(ValueError, match="cannot run here"):
        PictureEncoder(make(DEEP), CPU, "bf16", "native")
