"""A whole generator checkpoint, small enough for tests: 100 image tokens, 24 codes, images of 40 pixels."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from common.checkpoint import write_model
from common.files import read_json, sha256_file, write_json
from dalle.model import KIND, Dalle, ModelOptions, config_mapping
from dalle.text_tokenizer import TextTokenizer
from vq.autoencoder import FastConfig
from vq.model import ImageTokenizer, TokenizerConfig

CAPTIONS = ["一件红色的连衣裙", "一双黑色的鞋", "白色的杯子", "条纹T恤", "蓝色牛仔裤"]


def enlarge_(model: nn.Module) -> None:
    """Weights so large that every path moves the result."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                torch.randn_like(parameter) * (0.25 if parameter.ndim > 1 else 0.3) + (parameter.ndim == 1)
            )


def replace_weights(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """As if it had been saved with other weights: config.json goes along."""
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors")
    config = read_json(directory / "config.json")
    write_json(directory / "config.json", config | {"sha256": sha256_file(directory / "model.safetensors")})


def write_generator(directory: Path, seed: int = 0, line_factor: int = 0) -> Path:
    """A checkpoint directory of kind generator, as the trainer writes it; line_factor 4: it follows drawings."""
    torch.manual_seed(seed)
    fast = FastConfig(channels=(32,), encoder_blocks=(1,), decoder_blocks=(1,), attention=False)
    image_tokenizer = ImageTokenizer(
        TokenizerConfig(image_size=40, fast=fast, codebook_size=24, codebook_dim=4)
    )
    text_tokenizer = TextTokenizer.train(CAPTIONS * 5, vocab_size=64, model_type="char")
    options = ModelOptions(dim=32, num_layers=2, num_heads=2, text_embed_dim=8)
    config = options.config(text_tokenizer.vocab_size, text_tokenizer.pad_id, 12, 24, 10)
    model = Dalle(replace(config, line_factor=line_factor, line_width=16) if line_factor else config)
    enlarge_(model)
    (directory / "image_tokenizer").mkdir(parents=True)
    image_tokenizer.write(directory / "image_tokenizer", 0)
    text_tokenizer.save(directory)
    tokenizer = {"image_tokenizer_sha256": read_json(directory / "image_tokenizer/config.json")["sha256"]}
    write_model(directory, KIND, config_mapping(model.config), model.state_dict(), 7, **tokenizer)
    return directory
