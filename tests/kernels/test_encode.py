"""Compiled encoding finds the codes of the model in float32, but for near ties."""

import copy

import pytest
import torch

from kernels import accelerate, compiler, encode
from kernels.encode import CompiledEncoder
from vq.autoencoder import FastConfig, ResBlock
from vq.encoding import ImageEncoder
from vq.model import ImageTokenizer, TokenizerConfig
from vq.quantizer import GumbelConfig

CPU = torch.device("cpu")
needs_native = pytest.mark.skipif(bool(encode.unavailable_reason()), reason="no compiled encoding here")
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
        spread, mean = torch.std_mean(tokenizer.encoder(some_images(64, 64)), (0, 2, 3))
        last.weight /= spread.view(-1, 1, 1, 1)
        last.bias.sub_(mean).div_(spread)
    return tokenizer


def some_images(height, width, count=5):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


@needs_native
@pytest.mark.parametrize(("fast", "changes", "sides"), CASES)
def test_codes_are_those_of_the_model(fast, changes, sides):
    tokenizer, images = make(fast, **changes), some_images(*sides)
    found = CompiledEncoder(tokenizer).encode_ids(images)
    expected = tokenizer.encode_ids(images)
    assert found.shape == expected.shape and expected.unique().numel() > 8
    assert (found == expected).float().mean() > 0.9
    with torch.autocast("cpu", torch.bfloat16):
        in_bf16 = tokenizer.encode_ids(images)
    assert (found != expected).sum() <= 1.5 * (in_bf16 != expected).sum() + 3


@needs_native
def test_latents_are_as_exact_as_bf16():
    tokenizer, images = make(DEEP, quantizer="gumbel", gumbel=GumbelConfig()), some_images(36, 60)
    seen = []
    tokenizer.quantizer.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].float()))
    CompiledEncoder(tokenizer).encode_ids(images)
    tokenizer.encode_ids(images)
    with torch.autocast("cpu", torch.bfloat16):
        tokenizer.encode_ids(images)
    native_error, bf16_error = ((seen[i] - seen[1]).square().mean().sqrt() for i in (0, 2))
    assert 0 < native_error < 1.2 * bf16_error < 0.1 * seen[1].std()


@needs_native
def test_a_image_depends_on_itself_alone():
    tokenizer, images = make(DEEP), some_images(32, 32, 7)
    encoder = CompiledEncoder(tokenizer)
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
def test_another_size_of_image_after_a_larger_one():
    encoder = CompiledEncoder(make(DEEP))
    small = encoder.encode_ids(some_images(16, 16))
    encoder.encode_ids(some_images(48, 64))
    assert torch.equal(encoder.encode_ids(some_images(16, 16)), small)


@needs_native
def test_pixels_that_are_no_numbers_get_codes():
    images = some_images(16, 16)
    images[2] = float("nan")
    encoder = CompiledEncoder(make(DEEP))
    ids = encoder.encode_ids(images)
    assert ids.min() >= 0 and ids.max() < 64
    assert torch.equal(ids[[0, 1, 3, 4]], encoder.encode_ids(images[[0, 1, 3, 4]]))


@needs_native
def test_what_it_refuses():
    with pytest.raises(ValueError, match="multiples of 4"):
        CompiledEncoder(make(DEEP)).encode_ids(some_images(18, 16))
    odd_heads = FastConfig(haar_levels=1, channels=(160,), encoder_blocks=(1,), decoder_blocks=(0,))
    with pytest.raises(ValueError, match="multiples of 32"):
        CompiledEncoder(make(odd_heads))
    taming = ImageTokenizer(TokenizerConfig(architecture="taming", image_size=32)).eval()
    assert "fast architecture" in encode.unsupported_reason(taming)
    with pytest.raises(ValueError, match="fast architecture"):
        accelerate(taming, insist=True)
    with pytest.raises(ValueError, match="computed in float32"):
        accelerate(make(DEEP), in_bf16=False, insist=True)


@needs_native
def test_compiled_code_encodes_under_bf16_autocast_alone(monkeypatch):
    monkeypatch.setattr(compiler, "prefers_torch", lambda: False)
    tokenizer, images = make(DEEP), some_images(32, 32)
    exact, compiled = tokenizer.encode_ids(images), CompiledEncoder(tokenizer).encode_ids(images)
    assert not torch.equal(exact, compiled)  # or the next lines show nothing
    assert accelerate(tokenizer).record()["image encoders"] == "1 of 1 image encoders by compiled code"
    assert torch.equal(tokenizer.encode_ids(images), exact)
    assert torch.equal(ImageEncoder(tokenizer, CPU, "fp32")(images), exact)
    assert torch.equal(ImageEncoder(tokenizer, CPU, "bf16")(images), compiled)


@needs_native
def test_weights_that_changed_are_packed_again(monkeypatch):
    monkeypatch.setattr(compiler, "prefers_torch", lambda: False)
    tokenizer, images = make(DEEP), some_images(32, 32)
    accelerate(tokenizer)
    other = copy.deepcopy(tokenizer)
    with torch.no_grad():
        tokenizer.encoder.conv_out.bias += 0.5
    encoders = [ImageEncoder(t, CPU, "bf16") for t in (tokenizer, other)]
    for encoder in encoders:
        assert torch.equal(encoder(images), CompiledEncoder(encoder.tokenizer).encode_ids(images))
    assert not torch.equal(*(encoder(images) for encoder in encoders))


@needs_native
@pytest.mark.parametrize("change", ["silu", "hook", "subclass", "padding"])
def test_a_changed_encoder_stays_with_pytorch(change, monkeypatch, capsys):
    monkeypatch.setattr(compiler, "prefers_torch", lambda: False)
    tokenizer = make(DEEP)
    block = next(m for m in tokenizer.encoder.body if isinstance(m, ResBlock))
    if change == "silu":
        monkeypatch.setattr(
            ResBlock, "forward", lambda self, x: x + self.conv2(self.conv1(self.norm(x)).relu().relu())
        )
    elif change == "hook":
        block.conv1.register_forward_hook(lambda *_: None)
    elif change == "subclass":
        block.__class__ = type("MyBlock", (ResBlock,), {})
    else:
        block.conv1.padding_mode = "reflect"
    report = accelerate(tokenizer)
    assert report.record()["image encoders"].startswith("0 of 1") and "encode_ids" not in vars(tokenizer)
    assert ("warning" in capsys.readouterr().out) == (change == "silu")


@pytest.mark.skipif(not compiler.level(), reason="a CPU without compiled encoding")
def test_without_a_compiler_pytorch_takes_over(no_compiler):
    tokenizer, images = make(DEEP), some_images(32, 32)
    expected = ImageEncoder(tokenizer, CPU, "bf16")(images)
    assert "compiling encode.cpp failed: exit code 1" in str(accelerate(tokenizer))
    assert torch.equal(ImageEncoder(tokenizer, CPU, "bf16")(images), expected)
    with pytest.raises(ValueError, match="cannot run here"):
        accelerate(tokenizer, insist=True)
