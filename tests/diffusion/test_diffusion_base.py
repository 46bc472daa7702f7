import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from tiny_base import bert_tokenizer, tiny_base

from common.files import read_json, write_json
from diffusion.base import load_base, save_base


def saved(path: Path, **options) -> Path:
    folder = path / "base"
    folder.mkdir(parents=True)
    save_base(tiny_base(path / "tokenizer", **options), folder)
    return folder


def rewrite(folder: Path, file: str, **values) -> None:
    write_json(folder / file, read_json(folder / file) | values)


@pytest.mark.parametrize("text", ["bert", "clip"])
def test_a_saved_base_is_loaded_with_the_same_weights_and_by_plain_diffusers(text, tmp_path):
    base = tiny_base(tmp_path / "tokenizer", text)
    save_base(base, tmp_path)
    loaded = load_base(tmp_path)
    for part in ("vae", "text_encoder", "unet"):
        before, after = getattr(base, part).state_dict(), getattr(loaded, part).state_dict()
        assert all(torch.equal(before[n], after[n]) for n in before), part
        assert not getattr(loaded, part).training
        assert not any(p.requires_grad for p in getattr(loaded, part).parameters())
    assert (loaded.text_len, loaded.licence, loaded.image_size) == (12, "mit", 64)
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)
    images = pipeline("红色", num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 64, 64, 3)


def test_text_length_of_a_base_can_be_set_and_is_kept_by_its_folder(tmp_path):
    longer = load_base(saved(tmp_path), text_len=20)
    (tmp_path / "again").mkdir()
    save_base(longer, tmp_path / "again")
    assert load_base(tmp_path / "again").text_len == 20
    with pytest.raises(ValueError, match=r"text_len must lie in 3\.\.32"):
        load_base(tmp_path / "again", text_len=33)


@pytest.mark.parametrize("part", ["vae", "text_encoder", "tokenizer", "unet", "scheduler"])
def test_a_missing_part_is_named(part, tmp_path):
    folder = saved(tmp_path)
    shutil.rmtree(folder / part)
    with pytest.raises(FileNotFoundError, match=f"the folder {part} is missing"):
        load_base(folder)


def test_missing_weights_are_named(tmp_path):
    folder = saved(tmp_path)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"unet holds no weights"):
        load_base(folder)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("StableDiffusionXLPipeline", "two text encoders"),
        ("StableDiffusion3Pipeline", "flow-matching"),
        ("FluxPipeline", "diffusion transformer"),
        ("StableDiffusionInpaintPipeline", "mask"),
        ("AltDiffusionPipeline", "only Stable Diffusion 1.x"),
    ],
)
def test_other_kinds_are_refused_by_name(name, reason, tmp_path):
    folder = saved(tmp_path)
    rewrite(folder, "model_index.json", _class_name=name)
    with pytest.raises(ValueError, match=rf"holds a {name}, which is not supported: .*{reason}"):
        load_base(folder)


def test_flow_schedulers_and_other_predictions_are_refused(tmp_path):
    folder = saved(tmp_path)
    rewrite(folder, "scheduler/scheduler_config.json", prediction_type="sample")
    with pytest.raises(ValueError, match="predicts 'sample'"):
        load_base(folder)
    rewrite(folder, "model_index.json", scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"])
    with pytest.raises(ValueError, match="flow-matching"):
        load_base(folder)


def test_a_tokenizer_of_another_vocabulary_is_refused(tmp_path):
    folder = saved(tmp_path)
    vocab = tmp_path / "vocab.txt"
    vocab.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(str, range(90))]))
    shutil.rmtree(folder / "tokenizer")
    tokenizer = bert_tokenizer(tmp_path / "other")
    type(tokenizer)(vocab=str(vocab), model_max_length=12).save_pretrained(folder / "tokenizer")
    with pytest.raises(
        ValueError, match=r"has 95 pieces and its text encoder 28: they do not belong together"
    ):
        load_base(folder)


def test_a_text_encoder_of_another_width_is_refused(tmp_path):
    folder = saved(tmp_path)
    from transformers import BertConfig, BertModel

    BertModel(
        BertConfig(vocab_size=28, hidden_size=24, num_hidden_layers=1, num_attention_heads=2)
    ).save_pretrained(folder / "text_encoder")
    with pytest.raises(ValueError, match="gives 24 numbers a token, its UNet reads 16"):
        load_base(folder)


def test_bin_weights_are_read_and_pickles_with_code_are_not(tmp_path):
    folder = saved(tmp_path)
    unet = folder / "unet"
    base = load_base(folder)
    (unet / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(base.unet.state_dict(), unet / "diffusion_pytorch_model.bin")
    loaded = load_base(folder)
    assert torch.equal(loaded.unet.conv_in.weight, base.unet.conv_in.weight)

    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"conv_in.weight": Evil()}, unet / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match=r"the unet in .* cannot be loaded"):
        load_base(folder)
    assert not (tmp_path / "ran").exists()


def test_what_is_no_base_is_said_in_one_sentence(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"it holds no model_index\.json"):
        load_base(tmp_path)
    (tmp_path / "model.ckpt").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"convert it to \.safetensors"):
        load_base(tmp_path / "model.ckpt")
    with pytest.raises(FileNotFoundError, match="no base model"):
        load_base(tmp_path / "nothing")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="hub cannot be reached: copy a folder"):
        load_base("IDEA-CCNL/Taiyi-Stable-Diffusion-1B-Chinese-v0.1")


def test_a_gated_repository_names_its_licence(monkeypatch):
    import httpx
    from huggingface_hub.errors import GatedRepoError

    def refuse(*args, **kwargs):
        raise GatedRepoError("403", response=httpx.Response(403, request=httpx.Request("GET", "http://hub")))

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(FileNotFoundError, match="owner/gated asks for its licence to be accepted"):
        load_base("owner/gated")


def test_damaged_files_are_named(tmp_path):
    folder = saved(tmp_path)
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"the vae in .* cannot be loaded"):
        load_base(folder)
    (folder / "model_index.json").write_text(json.dumps([]))
    with pytest.raises(ValueError, match="is not supported"):
        load_base(folder)
