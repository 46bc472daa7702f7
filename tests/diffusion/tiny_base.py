"""Random tiny bases in the layouts of Taiyi (BERT) and of Stable Diffusion 1.x (CLIP): 64 pixels, half a megabyte."""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import BertConfig, BertModel, BertTokenizer, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffusion.base import DiffusionBase

CHARACTERS = list(dict.fromkeys("一件红色的连衣裙蓝双黑鞋金冠苹果盒牛奶香蕉,."))
MARKS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def bert_tokenizer(directory: Path, text_len: int = 12) -> BertTokenizer:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "vocab.txt").write_text("\n".join(MARKS + CHARACTERS) + "\n", "utf-8")
    return BertTokenizer(vocab=str(directory / "vocab.txt"), do_lower_case=True, model_max_length=text_len)


def clip_tokenizer(directory: Path, text_len: int = 12) -> CLIPTokenizer:
    """Bytes without merges: letters, and letters that end a word."""
    directory.mkdir(parents=True, exist_ok=True)
    letters = list("abcdefghijklmnopqrstuvwxyz,.")
    pieces = letters + [f"{c}</w>" for c in letters] + ["<|startoftext|>", "<|endoftext|>"]
    (directory / "vocab.json").write_text(json.dumps({p: i for i, p in enumerate(pieces)}))
    (directory / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(
        vocab=str(directory / "vocab.json"),
        merges=str(directory / "merges.txt"),
        model_max_length=text_len,
    )


def tiny_base(
    directory: Path,
    text: str = "bert",
    prediction: str = "epsilon",
    zero_snr: bool = False,
    text_len: int = 12,
) -> DiffusionBase:
    """`directory`: for the tokenizer's files."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=64,
        mid_block_add_attention=False,
    )
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=8,
    )
    if text == "bert":
        tokenizer = bert_tokenizer(directory, text_len)
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        encoder = BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=32, **sizes))
    else:
        tokenizer = clip_tokenizer(directory, text_len)
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        marks = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        config = CLIPTextConfig(vocab_size=len(tokenizer), max_position_embeddings=32, **sizes, **marks)
        encoder = CLIPTextModel(config)
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction,
        rescale_betas_zero_snr=zero_snr,
        timestep_spacing="trailing" if zero_snr else "leading",
    )
    for part in (vae, encoder, unet):
        part.requires_grad_(False).eval()
    return DiffusionBase(vae, encoder, tokenizer, unet, scheduler, text_len, "mit", directory)
