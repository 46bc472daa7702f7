"""Twice the side, the same codes: against 2x2 means computed by PyTorch."""

import pytest
import torch
import torch.nn.functional as F

from vq import enlarge
from vq.autoencoder import FastConfig, coarse_bands, to_bands
from vq.enlarge import enlarged
from vq.model import ImageTokenizer, TokenizerConfig
from vq.published.dvae import DvaeConfig

SMALL = TokenizerConfig(
    image_size=16,
    codebook_size=64,
    codebook_dim=4,
    fast=FastConfig(haar_levels=1, channels=(32, 64), encoder_blocks=(1, 1), decoder_blocks=(1, 1)),
)


@pytest.fixture
def tokenizer() -> ImageTokenizer:
    torch.manual_seed(0)
    model = ImageTokenizer(SMALL)
    for parameter in model.parameters():  # blocks start as identities
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_coarse_bands_are_twice_the_bands_of_the_means(levels):
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    found = to_bands(images, levels)[:, coarse_bands(levels)]
    torch.testing.assert_close(found, 2 * to_bands(F.avg_pool2d(images, 2), levels - 1))


def test_an_enlarged_tokenizer_has_the_codes_of_the_means_and_repeats_pixels(tokenizer):
    large = enlarged(tokenizer)
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    ids = large.encode_ids(images)
    assert torch.equal(ids, tokenizer.encode_ids(F.avg_pool2d(images, 2)))
    assert len(ids.unique()) > 8 and large.grid_size == tokenizer.grid_size
    expected = F.interpolate(tokenizer.decode_ids(ids), scale_factor=2, mode="nearest")
    torch.testing.assert_close(large.decode_ids(ids), expected)


def test_codes_keep_their_identity_until_the_encoder_reads_detail(tokenizer):
    twice = enlarged(enlarged(tokenizer))
    assert twice.codes_sha256 == tokenizer.codes_sha256
    changed = enlarged(tokenizer)
    with torch.no_grad():
        changed.encoder.conv_in.weight[0, 3, 1, 1] = 0.1  # band 1 of level 1
    assert changed.codes_sha256 != tokenizer.codes_sha256


def test_the_command_writes_what_trains_on_with_frozen_codes(tokenizer, tmp_path, capsys):
    tokenizer.save_pretrained(tmp_path / "small")
    enlarge.main([str(tmp_path / "small"), str(tmp_path / "large")])
    found = ImageTokenizer.from_pretrained(tmp_path / "large")
    assert found.image_size == 32 and found.codes_sha256 == tokenizer.codes_sha256
    assert "32 px, 16 codes" in capsys.readouterr().out


def test_other_architectures_are_refused(tmp_path, capsys):
    config = TokenizerConfig(
        architecture="dvae",
        dvae=DvaeConfig(8, 2, 0),
        quantizer="gumbel",
        image_size=16,
        codebook_size=16,
        codebook_dim=4,
    )
    ImageTokenizer(config).save_pretrained(tmp_path / "dvae")
    with pytest.raises(SystemExit) as stop:
        enlarge.main([str(tmp_path / "dvae"), str(tmp_path / "large")])
    assert stop.value.code == 2 and "not of dvae" in capsys.readouterr().err
    assert not (tmp_path / "large").exists()
