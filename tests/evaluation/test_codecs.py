"""Image tokenizers and autoencoders behind one call: equal to calling them directly."""

import pytest
import torch

from evaluation.codecs import open_codec
from vq.autoencoder import FastConfig
from vq.model import ImageTokenizer, TokenizerConfig

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images():
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module")
def tokenizer():
    torch.manual_seed(0)
    fast = FastConfig(channels=(32, 32), encoder_blocks=(1, 1), decoder_blocks=(1, 1), attention=False)
    return ImageTokenizer(TokenizerConfig(image_size=32, fast=fast, codebook_size=16)).eval()


def test_a_tokenizer_alone_and_inside_a_generator(tokenizer, images, tmp_path):
    tokenizer.save_pretrained(tmp_path / "alone")
    tokenizer.save_pretrained(tmp_path / "generator" / "image_tokenizer")
    (tmp_path / "generator" / "config.json").write_text('{"kind": "generator"}')
    ids = tokenizer.encode_ids(images)
    expected = tokenizer.decode_ids(ids, (tokenizer.grid_size, tokenizer.grid_size)).clamp(-1, 1)
    for name in ("alone", "generator"):
        codec = open_codec(str(tmp_path / name), CPU, "fp32")
        torch.testing.assert_close(codec.reconstruct(images), expected)
        assert codec.image_size == 32 and codec.downsample_factor == tokenizer.downsample_factor
        assert codec.code(32) == f"{ids.shape[1]} tokens of a codebook of 16" and len(codec.identity) == 64


def test_an_autoencoder_of_diffusers_alone_and_inside_a_pipeline(images, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, sample_size=32,
    )  # fmt: skip
    model.save_pretrained(tmp_path / "pipeline" / "vae")
    with torch.no_grad():
        expected = model.eval().decode(model.encode(images).latent_dist.mean).sample.clamp(-1, 1)
    for folder in (tmp_path / "pipeline", tmp_path / "pipeline" / "vae"):
        codec = open_codec(str(folder), CPU, "fp32")
        torch.testing.assert_close(codec.reconstruct(images), expected, atol=1e-5, rtol=1e-4)
        assert codec.image_size == 32 and codec.downsample_factor == 2
        assert codec.code(32) == "4 x 16 x 16 numbers"
    (tmp_path / "pipeline" / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no \.safetensors"):
        open_codec(str(tmp_path / "pipeline"), CPU)


def test_what_is_neither_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint directory"):
        open_codec("nowhere", CPU)
    (tmp_path / "config.json").write_text('{"kind": "ranker"}')
    with pytest.raises(ValueError, match="kind 'ranker', not 'image_tokenizer'"):
        open_codec(str(tmp_path), CPU)
