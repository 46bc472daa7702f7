from dataclasses import replace

import pytest
import torch

from common.config import from_mapping, to_mapping
from common.files import read_json, write_json
from vq import levels
from vq.autoencoder import FastConfig, from_bands, haar, to_bands
from vq.levels import first_levels
from vq.model import ImageTokenizer, TokenizerConfig
from vq.published.dvae import DvaeConfig
from vq.published.taming import TamingConfig
from vq.quantizer import GumbelConfig

FAST = FastConfig(haar_levels=1, channels=(32, 32), encoder_blocks=(0, 1), decoder_blocks=(1, 0))
TAMING = TamingConfig(
    channels=32, channel_mults=(1, 1, 1), res_blocks=1, attention_factors=(4,), z_channels=16
)
SIZES = {"image_size": 16, "codebook_size": 16, "codebook_dim": 4}
CONFIGS = {
    "fast-vq": TokenizerConfig(fast=FAST, **SIZES),
    "fast-free": TokenizerConfig(fast=FAST, l2_normalize=False, **SIZES),
    "fast-depth": TokenizerConfig(fast=FAST, code_depth=2, **SIZES),
    "fast-ema": TokenizerConfig(fast=FAST, quantizer="ema", **SIZES),
    "fast-gumbel": TokenizerConfig(fast=FAST, quantizer="gumbel", **SIZES),
    "fast-fsq": TokenizerConfig(fast=FAST, quantizer="fsq", fsq_levels=(4, 4), **SIZES),
    "taming-vq": TokenizerConfig(architecture="taming", taming=TAMING, **SIZES),
    "taming-gumbel": TokenizerConfig(architecture="taming", taming=TAMING, quantizer="gumbel", **SIZES),
    "dvae": TokenizerConfig(architecture="dvae", dvae=DvaeConfig(8, 2, 1), quantizer="gumbel", **SIZES),
    "dvae-plain": TokenizerConfig(architecture="dvae", dvae=DvaeConfig(8, 2, 0), quantizer="gumbel", **SIZES),
}


def make(name: str) -> ImageTokenizer:
    torch.manual_seed(0)
    return ImageTokenizer(CONFIGS[name]).eval()


def test_haar_is_orthonormal_and_constant_background_is_in_one_band():
    x = torch.randint(-512, 512, (2, 3, 16, 24)).float() / 256  # sums stay exact in float32
    y = haar(x)
    assert y.shape == (2, 12, 8, 12)
    assert y.square().sum().item() == pytest.approx(x.square().sum().item(), rel=1e-6)
    flat = haar(torch.full((1, 3, 4, 4), 0.5))
    assert torch.equal(flat[:, 3:], torch.zeros(1, 9, 2, 2)) and torch.equal(
        flat[:, :3], torch.ones(1, 3, 2, 2)
    )


@pytest.mark.parametrize("levels", [0, 1, 2, 3])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_bands_are_haar_so_many_times_and_exactly_inverted(levels, memory_format):
    x = (torch.randint(-512, 512, (2, 3, 16, 24)).float() / 256).contiguous(memory_format=memory_format)
    expected = x
    for _ in range(levels):
        expected = haar(expected)
    with torch.autocast("cpu", torch.bfloat16):
        bands = to_bands(x, levels)
        back = from_bands(bands, levels)
    assert bands.dtype == back.dtype == torch.float32
    torch.testing.assert_close(bands, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_kind_encodes_decodes_trains_and_goes_to_other_sizes(name):
    model = make(name)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    ids = model.encode_ids(images)
    assert ids.shape == (2, model.grid_size**2) == (2, 16) and ids.dtype == torch.long
    assert model.decode_ids(ids).shape == images.shape
    assert model.decode_ids(ids).abs().max() <= 1
    wide = torch.rand(1, 3, 8, 24) * 2 - 1
    wide_ids = model.encode_ids(wide)
    assert wide_ids.shape == (1, 2 * 6)
    assert model.decode_ids(wide_ids, grid=(2, 6)).shape == wide.shape
    with pytest.raises(ValueError, match="multiples of 4"):
        model.encode_ids(torch.zeros(1, 3, 18, 16))

    torch.testing.assert_close(model(images)[0].clamp(-1, 1), model.decode_ids(ids), atol=1e-5, rtol=1e-4)
    reconstruction, quantized = model.train()(images)
    ((reconstruction - images).square().mean() + quantized.loss).backward()
    silent = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert silent == []


@pytest.mark.parametrize("name", CONFIGS)
def test_checkpoint_round_trip_is_bit_identical(name, tmp_path):
    model = make(name)
    model.write(tmp_path, 7)
    again = ImageTokenizer.from_pretrained(tmp_path)
    assert (
        again.config == model.config and again.codes_sha256 == model.codes_sha256 and len(again.sha256) == 64
    )
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    channels_last = images.to(memory_format=torch.channels_last)
    model = model.to(memory_format=torch.channels_last)
    assert torch.equal(model.encode_ids(channels_last), again.encode_ids(channels_last))
    assert torch.equal(model(channels_last)[0], again(channels_last)[0])


def test_codes_of_two_levels_are_one_number_and_the_first_level_stands_alone():
    model = make("fast-depth")
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    ids = model.encode_ids(images)
    assert model.codebook_size == 256 and 16 <= ids.max() < 256
    first = first_levels(model, 1)
    assert first.codebook_size == 16 and first.config.code_depth == 1
    assert torch.equal(first.encode_ids(images), ids // 16)
    with pytest.raises(ValueError, match="below the 1"):
        first_levels(first, 1)


def test_the_command_keeps_the_first_codes_and_replaces_nothing(tmp_path, capsys):
    make("fast-depth").save_pretrained(tmp_path / "two")
    levels.main([str(tmp_path / "two"), str(tmp_path / "one")])
    one = ImageTokenizer.from_pretrained(tmp_path / "one")
    assert one.config.code_depth == 1 and one.codes_sha256[:12] in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        levels.main([str(tmp_path / "two"), str(tmp_path / "one")])
    assert stop.value.code == 2 and "exists already" in capsys.readouterr().err


def test_save_pretrained_replaces_a_whole_directory(tmp_path):
    first, second = make("fast-vq"), make("fast-fsq")
    for model in (first, second):
        model.save_pretrained(tmp_path / "model")
        assert ImageTokenizer.from_pretrained(tmp_path / "model").config == model.config


def test_push_to_hub_uploads_what_from_pretrained_reads(tmp_path, monkeypatch):
    seen = {}

    class Api:
        def create_repo(self, repo_id, private, exist_ok):
            seen["repo"] = (repo_id, private)

        def upload_folder(self, repo_id, folder_path, commit_message):
            seen["codes"] = ImageTokenizer.from_pretrained(folder_path).codes_sha256

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    model = make("fast-vq")
    assert model.push_to_hub("me/tokenizer") == "https://huggingface.co/me/tokenizer"
    assert seen == {"repo": ("me/tokenizer", True), "codes": model.codes_sha256}


@pytest.mark.parametrize(("factor", "channels"), [(4, (32,)), (8, (32, 32)), (16, (32, 32, 64))])
@pytest.mark.parametrize("size", [64, 96, 512])
def test_geometry_follows_from_the_config(factor, channels, size):
    blocks = (1,) * len(channels)
    config = TokenizerConfig(image_size=size, fast=FastConfig(2, channels, blocks, blocks))
    assert (config.downsample_factor, config.grid_size) == (factor, size // factor)
    with torch.device("meta"):
        model = ImageTokenizer(config)
        latents = model.encoder(torch.zeros(1, 3, size, size))
        assert latents.shape == (1, 8, size // factor, size // factor)
        assert model.decode(latents).shape == (1, 3, size, size)


def test_published_sizes_have_the_published_number_of_parameters():
    with torch.device("meta"):
        f16 = ImageTokenizer(
            TokenizerConfig(256, "taming", codebook_dim=256, l2_normalize=False, codebook_size=1024)
        )
        f8 = TamingConfig(channel_mults=(1, 1, 2, 4), attention_factors=(8,))
        gumbel = ImageTokenizer(
            TokenizerConfig(
                256, "taming", taming=f8, codebook_dim=256, quantizer="gumbel", codebook_size=8192
            )
        )
        dvae = DvaeConfig(hidden_dim=256, num_layers=4, res_blocks=2)
        dalle = TokenizerConfig(
            256, "dvae", dvae=dvae, codebook_dim=256, quantizer="gumbel", codebook_size=1024
        )
        seed = ImageTokenizer(dalle)

    def count(model):
        return sum(p.numel() for p in model.parameters())

    # compatibility notes, sections 3.3 and 4.1
    assert (count(f16), len(f16.state_dict())) == (72_141_699, 343)
    assert (count(gumbel), len(gumbel.state_dict())) == (68_995_971, 301)
    assert (count(seed), len(seed.state_dict())) == (12_930_051, 47)


def test_activation_checkpointing_changes_no_gradient():
    for name in ("fast-vq", "taming-vq", "dvae"):
        gradients = []
        for checkpointing in (False, True):
            model = make(name).train()
            model.encoder.checkpointing = model.decoder.checkpointing = checkpointing
            images = torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16)
            torch.manual_seed(1)
            reconstruction, quantized = model(images)
            ((reconstruction - images).square().mean() + quantized.loss).backward()
            gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_config_of_the_first_version_still_loads(tmp_path, small_model):
    """Checkpoints that lack the newer options read with their defaults."""
    small_model.write(tmp_path, 1)
    config = read_json(tmp_path / "config.json")
    for name in ("taming", "dvae", "gumbel", "fsq_levels", "ema_decay"):
        del config["model"][name]
    write_json(tmp_path / "config.json", config)
    assert ImageTokenizer.from_pretrained(tmp_path).config == small_model.config
    assert {n.split(".")[0] for n in small_model.state_dict()} == {"encoder", "decoder", "quantizer"}
    assert "quantizer.codebook.weight" in small_model.state_dict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 18}, "multiple of the downsample factor 4, not 18"),
        ({"codebook_size": 1}, "too small"),
        ({"quantizer": "fsq"}, "8x8x4x4 make 1024 codes, codebook_size says 16"),
        (
            {"gumbel": GumbelConfig(kl_weight=0.1)},
            "gumbel has no effect with architecture fast and quantizer vq",
        ),
        ({"taming": TAMING}, "taming has no effect"),
        ({"architecture": "dvae", "fast": FastConfig()}, "dvae goes with quantizer gumbel"),
        ({"ema_decay": 1.0}, "ema_decay must lie in"),
        ({"code_depth": 5}, "code_depth must lie in 1..4"),
        ({"code_depth": 2, "quantizer": "ema"}, "quantizer other than vq"),
        ({"level_dropout": 0.5}, "no effect with code_depth 1"),
    ],
)
def test_sizes_that_cannot_be_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIGS["fast-vq"], **change)


@pytest.mark.parametrize("name", CONFIGS)
def test_config_survives_json(name):
    assert from_mapping(TokenizerConfig, to_mapping(CONFIGS[name])) == CONFIGS[name]
