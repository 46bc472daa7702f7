import pytest
import torch
from tiny_base import tiny_base
from tiny_shards import write_image_shards

from common.distributed import start_world
from common.files import read_json
from data_tools.images.crops import CropFlip
from data_tools.shards.encode import Views
from data_tools.shards.index import ShardIndex, ShardSource
from data_tools.shards.loader import CorruptSample, DecodeImage, eval_batches
from data_tools.shards.remote import RemoteOptions
from diffusion.scratch.latents import (
    DecodeLatents,
    autoencoder_sha256,
    channel_statistics,
    encode_latents,
    encode_moments,
    fold_statistics_,
    read_latents,
    require_latents,
    sample_posterior,
)


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return tiny_base(tmp_path_factory.mktemp("tokenizer")).vae


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_image_shards(tmp_path_factory.mktemp("images"), size=32)


def encode(vae, images, target, views=2, image_size=32):
    source = ShardSource(str(images), RemoteOptions())
    return encode_latents(
        vae, source, target, Views(image_size, views, CropFlip(), 16), start_world("cpu"), "fp32"
    )


def test_moments_are_those_of_the_autoencoder_times_its_scaling_factor(vae):
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    moments = encode_moments(vae, pixels, "fp32")
    posterior = vae.encode(pixels).latent_dist
    scale = vae.config.scaling_factor
    assert moments.shape == (2, 8, 8, 8)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    expected = (posterior.mean + posterior.std * noise) * scale
    torch.testing.assert_close(sample_posterior(moments, noise), expected, rtol=1e-4, atol=1e-5)


def test_folding_gives_unit_latents_that_decode_alike(vae):
    import copy

    folded = copy.deepcopy(vae)
    folded.register_to_config(scaling_factor=1.0)
    pixels = torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    before = vae.encode(pixels).latent_dist
    mean, std = channel_statistics(torch.cat([before.mean, before.logvar], 1))
    fold_statistics_(folded, mean, std)
    moments = encode_moments(folded, pixels, "fp32")
    noise = torch.randn(16, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    latents = sample_posterior(moments, noise)
    assert latents.mean((0, 2, 3)).abs().max() < 0.1
    assert (latents.std((0, 2, 3)) - 1).abs().max() < 0.1
    torch.testing.assert_close(
        latents * std.view(-1, 1, 1) + mean.view(-1, 1, 1), before.mean + before.std * noise
    )
    torch.testing.assert_close(
        folded.decode(latents).sample, vae.decode(before.mean + before.std * noise).sample
    )


def test_shards_hold_the_moments_of_every_view(vae, images, tmp_path):
    assert encode(vae, images, tmp_path)["images"] == 40
    index = ShardIndex.open(tmp_path, "train")
    views = read_latents(index.read(5)["latent.npy"])
    assert views.shape == (2, 8, 8, 8)
    pixels = next(eval_batches(ShardIndex.open(images, "train"), DecodeImage(32, first_caption=True), 8))
    batch = next(eval_batches(index, DecodeLatents((8, 8, 8), first_view=True), 8))
    assert (batch["key"], batch["text"]) == (pixels["key"], pixels["text"])
    torch.testing.assert_close(
        batch["moments"], encode_moments(vae, pixels["image"], "fp32"), rtol=1e-2, atol=1e-2
    )
    assert read_latents(ShardIndex.open(tmp_path, "val").read(0)["latent.npy"]).shape[0] == 1
    assert encode(vae, images, tmp_path) == {"images": 0, "skipped": 0, "shards_kept": 3}


def test_latents_of_another_autoencoder_or_of_other_views_are_refused(vae, images, tmp_path):
    import copy

    encode(vae, images, tmp_path)
    assert read_json(tmp_path / "latents.json")["autoencoder_sha256"] == autoencoder_sha256(vae)
    with pytest.raises(ValueError, match="latents with views 2, not 3"):
        encode(vae, images, tmp_path, views=3)
    with pytest.raises(ValueError, match="latents with image_size 32, not 64"):
        encode(vae, images, tmp_path, image_size=64)
    other = copy.deepcopy(vae)
    with torch.no_grad():
        other.encoder.conv_in.bias[0] += 1
    with pytest.raises(ValueError, match="were encoded by the autoencoder"):
        require_latents(tmp_path, autoencoder_sha256(other))
    with pytest.raises(FileNotFoundError, match="no latent shards"):
        require_latents(images, autoencoder_sha256(vae))


def test_damaged_latents_count_as_corrupt(vae, images, tmp_path):
    import numpy as np

    encode(vae, images, tmp_path)
    index = ShardIndex.open(tmp_path, "train")
    with pytest.raises(CorruptSample, match=r"shape \(8, 8, 8\), not \(8, 4, 4\)"):
        DecodeLatents((8, 4, 4))(index, 0, np.random.default_rng(0))
    with pytest.raises(CorruptSample, match="damaged"):
        read_latents(b"\x93NUMPY")
