"""LoRA files against diffusers' own writer and reader, kohya's names on the real UNet, merging, foreign files."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_base import tiny_base

from diffusion import convert_lora, fuse
from diffusion.base import load_base, make_pipeline, save_base
from diffusion.lora.adapters import (
    LoraOptions,
    LoraSpec,
    add_adapter,
    fuse_,
    layers_of,
    load_loras,
    parts_of,
    relative_norm,
    trained_norm,
)
from diffusion.lora.formats import METADATA_KEY, WEIGHTS_FILE, LoraLayer, read_lora, write_lora
from diffusion.plan import SD15_UNET

OPTIONS = LoraOptions(rank=4, alpha=12.0, text_encoder=True)


def tiny_pipeline(folder, text="bert", width=16):
    """Random weights, the same each time; another width of the text: another architecture."""
    base = tiny_base(folder, text)
    if width != 16:
        config = dict(base.unet.config) | {"cross_attention_dim": width}
        base = replace(base, unet=UNet2DConditionModel.from_config(config))
    pipeline = make_pipeline(base)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def images_of(pipeline):
    """(1, 3, H, W) in [0, 1], the same seed each time."""
    options = {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "pt"}
    return pipeline("red,", generator=torch.Generator().manual_seed(7), **options).images


def trained(folder, text="bert", options=OPTIONS, seed=0):
    """A tiny pipeline whose adapters are random in both factors, as after training."""
    pipeline = tiny_pipeline(folder, text)
    parameters = add_adapter(pipeline.unet, options, "unet")
    if options.text_encoder:
        parameters += add_adapter(pipeline.text_encoder, options, "text_encoder")
    generator = torch.Generator().manual_seed(seed + 1)
    for parameter in parameters:
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    pipeline.unet.eval(), pipeline.text_encoder.eval()
    return pipeline


@pytest.mark.parametrize("text", ["bert", "clip"])
def test_our_file_loads_with_plain_diffusers(tmp_path, text):
    ours = trained(tmp_path / "a", text)
    expected = images_of(ours)
    write_lora(tmp_path / WEIGHTS_FILE, parts_of(ours))
    plain = tiny_pipeline(tmp_path / "b", text)
    before = images_of(plain)
    plain.load_lora_weights(tmp_path)
    assert torch.allclose(images_of(plain), expected, atol=1e-3)
    assert (before - expected).abs().max() > 0.01  # the adapter matters


@pytest.mark.parametrize("text", ["bert", "clip"])
@pytest.mark.parametrize("with_metadata", [True, False])
def test_a_file_of_diffusers_example_loads_here(tmp_path, text, with_metadata):
    theirs = tiny_pipeline(tmp_path / "a", text)
    targets = ["to_k", "to_q", "to_v", "to_out.0"]
    config = LoraConfig(r=4, lora_alpha=12, init_lora_weights="gaussian", target_modules=targets)
    theirs.unet.add_adapter(config)
    generator = torch.Generator().manual_seed(5)
    for parameter in theirs.unet.parameters():
        if parameter.requires_grad:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(theirs.unet))
    metadata = _collate_lora_metadata({"unet": theirs.unet}) if with_metadata else {}
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers, **metadata)
    file = read_lora(tmp_path)
    assert file.has_alpha == with_metadata
    assert {layer.alpha for layer in file.parts["unet"].values()} == {12.0 if with_metadata else 4.0}
    ours, plain = tiny_pipeline(tmp_path / "b", text), tiny_pipeline(tmp_path / "c", text)
    load_loras(ours, [LoraSpec.parse(str(tmp_path))])
    plain.load_lora_weights(tmp_path)
    assert torch.allclose(images_of(ours), images_of(plain), atol=1e-5)
    if with_metadata:
        assert torch.allclose(images_of(ours), images_of(theirs), atol=1e-3)


def test_a_file_of_save_lora_adapter_loads_here(tmp_path):
    theirs = trained(tmp_path / "a", options=LoraOptions(rank=4, alpha=12.0))
    theirs.unet.save_lora_adapter(tmp_path, weight_name="adapter.safetensors")
    assert not any(key.startswith("unet.") for key in load_file(tmp_path / "adapter.safetensors"))
    ours = tiny_pipeline(tmp_path / "b")
    load_loras(ours, [LoraSpec(tmp_path / "adapter.safetensors")])
    assert torch.allclose(images_of(ours), images_of(theirs), atol=1e-5)


@pytest.mark.parametrize("text", ["bert", "clip"])
def test_kohya_round_trip(tmp_path, text):
    ours = trained(tmp_path / "a", text)
    write_lora(tmp_path / "k.safetensors", parts_of(ours), "kohya")
    file = read_lora(tmp_path / "k.safetensors")
    assert file.layout == "kohya" and file.has_alpha
    again = tiny_pipeline(tmp_path / "b", text)
    load_loras(again, [LoraSpec(tmp_path / "k.safetensors")])
    assert torch.allclose(images_of(again), images_of(ours), atol=1e-5)
    if text == "clip":
        names = [k for k in load_file(tmp_path / "k.safetensors") if k.startswith("lora_te_")]
        assert "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight" in names


def test_plain_diffusers_loads_our_kohya_file(tmp_path):
    ours = trained(tmp_path / "a", "clip", LoraOptions(rank=4, alpha=12.0))
    write_lora(tmp_path / "k.safetensors", parts_of(ours), "kohya")
    plain = tiny_pipeline(tmp_path / "b", "clip")
    plain.load_lora_weights(tmp_path, weight_name="k.safetensors")
    assert torch.allclose(images_of(plain), images_of(ours), atol=1e-3)


def test_names_of_the_real_unet(tmp_path):
    """128 modules, 1,594,368 weights, and each name as kohya-ss spells it for SD 1.x: that of diffusers' UNet."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SD15_UNET)
    parameters = add_adapter(unet, LoraOptions(), "unet")
    assert sum(p.numel() for p in parameters) == 1_594_368
    layers = {
        name.removesuffix(".lora_A.default.weight"): LoraLayer(torch.zeros(p.shape), torch.zeros(8, 8), 16.0)
        for name, p in unet.named_parameters()
        if ".lora_A." in name
    }
    assert len(layers) == 128
    write_lora(tmp_path / "k.safetensors", {"unet": layers}, "kohya")
    expected = set()
    blocks = [f"down_blocks_{i}_attentions_{j}" for i in range(3) for j in range(2)]
    blocks += [f"up_blocks_{i}_attentions_{j}" for i in (1, 2, 3) for j in range(3)] + [
        "mid_block_attentions_0"
    ]
    for block in blocks:
        for module in ("to_q", "to_k", "to_v", "to_out_0"):
            for attention in ("attn1", "attn2"):
                stem = f"lora_unet_{block}_transformer_blocks_0_{attention}_{module}"
                expected |= {f"{stem}.{part}" for part in ("lora_down.weight", "lora_up.weight", "alpha")}
    found = load_file(tmp_path / "k.safetensors")
    assert set(found) == expected
    assert all(float(found[key]) == 16.0 for key in found if key.endswith(".alpha"))
    with safe_open(str(tmp_path / "k.safetensors"), "pt") as file:
        assert file.metadata()["ss_network_dim"] == "8" and file.metadata()["ss_network_alpha"] == "16.0"


def test_the_header_keeps_alpha(tmp_path):
    write_lora(tmp_path / WEIGHTS_FILE, parts_of(trained(tmp_path / "a")))
    with safe_open(str(tmp_path / WEIGHTS_FILE), "pt") as file:
        config = json.loads(file.metadata()[METADATA_KEY])
    assert config["unet.lora_alpha"] == 12.0 and config["unet.r"] == 4 and config["text_encoder.r"] == 4


@pytest.mark.parametrize("text", ["bert", "clip"])
def test_merging_equals_loading(tmp_path, text):
    write_lora(tmp_path / "a.safetensors", parts_of(trained(tmp_path / "a", text)))
    write_lora(tmp_path / "b.safetensors", parts_of(trained(tmp_path / "b", text, seed=3)), "kohya")
    specs = [
        LoraSpec.parse(f"{tmp_path}/a.safetensors:0.7"),
        LoraSpec.parse(f"{tmp_path}/b.safetensors:-0.4"),
    ]
    loaded, merged = tiny_pipeline(tmp_path / "c", text), tiny_pipeline(tmp_path / "d", text)
    load_loras(loaded, specs)
    said = fuse_(merged, specs)
    assert len(said) == 2 and "weight 0.7" in said[0]
    assert torch.allclose(images_of(loaded), images_of(merged), atol=1e-4)
    merged.save_pretrained(tmp_path / "folder")
    plain = StableDiffusionPipeline.from_pretrained(tmp_path / "folder")
    plain.set_progress_bar_config(disable=True)
    assert torch.equal(images_of(plain), images_of(merged))


def test_layers_of_different_rank_and_alpha(tmp_path):
    ours = trained(tmp_path / "a", options=LoraOptions(rank=4, alpha=12.0))
    layers = layers_of(ours.unet)
    first, second = list(layers)[:2]
    layers[first] = LoraLayer(
        torch.randn(2, layers[first].down.shape[1]), torch.randn(layers[first].up.shape[0], 2), 3.0
    )
    layers[second] = LoraLayer(layers[second].down, layers[second].up, 1.5)
    merged, loaded = tiny_pipeline(tmp_path / "b"), tiny_pipeline(tmp_path / "c")
    for layout in ("diffusers", "kohya"):
        write_lora(tmp_path / f"{layout}.safetensors", {"unet": layers}, layout)
    load_loras(loaded, [LoraSpec(tmp_path / "diffusers.safetensors")])
    fuse_(merged, [LoraSpec(tmp_path / "kohya.safetensors")])
    assert torch.allclose(images_of(loaded), images_of(merged), atol=1e-4)
    plain = tiny_pipeline(tmp_path / "d")
    plain.load_lora_weights(tmp_path, weight_name="diffusers.safetensors")
    assert torch.allclose(images_of(plain), images_of(merged), atol=1e-3)


def test_the_norm_is_that_of_the_product(tmp_path):
    pipeline = trained(tmp_path / "a")
    update = base = 0.0
    layers = layers_of(pipeline.unet)
    for name, layer in layers.items():
        update += float(layer.delta().square().sum())
        base += float(pipeline.unet.get_submodule(name).base_layer.weight.square().sum())
    expected = (update / base) ** 0.5
    assert trained_norm(pipeline.unet) == pytest.approx(expected, rel=1e-5)
    assert relative_norm(tiny_pipeline(tmp_path / "b").unet, layers) == pytest.approx(expected, rel=1e-5)


def test_the_bert_pooler_is_left_alone(tmp_path):
    names = layers_of(trained(tmp_path / "a").text_encoder)
    assert len(names) == 6 and not any("pooler" in name for name in names)


def test_a_lora_of_another_architecture_is_refused(tmp_path):
    write_lora(tmp_path / WEIGHTS_FILE, parts_of(trained(tmp_path / "a")))
    with pytest.raises(
        ValueError, match=r"another architecture: .*attn2.to_k of the unet has a weight of \(16, 24\)"
    ):
        load_loras(tiny_pipeline(tmp_path / "b", width=24), [LoraSpec.parse(str(tmp_path))])
    with pytest.raises(ValueError, match=r"the text_encoder has no module encoder\.layer\.0"):
        load_loras(tiny_pipeline(tmp_path / "c", "clip"), [LoraSpec.parse(str(tmp_path))])
    target = tiny_pipeline(tmp_path / "d", width=24)
    before = {n: t.clone() for n, t in target.unet.state_dict().items()}
    with pytest.raises(ValueError, match="another architecture"):
        fuse_(target, [LoraSpec.parse(str(tmp_path))])
    assert all(torch.equal(before[n], t) for n, t in target.unet.state_dict().items())


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        ({"unet.a.to_q.lora.down.weight": torch.zeros(4, 8)}, "a.to_q has no up factor"),
        (
            {"unet.a.lora.down.weight": torch.zeros(4, 8), "unet.a.lora.up.weight": torch.zeros(8, 3)},
            r"the factors of a are \(4, 8\) and \(8, 3\)",
        ),
        ({"lora_te2_a.lora_down.weight": torch.zeros(4, 8)}, "is a LoRA for SDXL"),
        ({"transformer.a.lora_A.weight": torch.zeros(4, 8)}, "diffusion transformer"),
        ({"lora_unet_a.dora_scale": torch.zeros(4, 8)}, "DoRA adapter"),
        ({"conv_in.weight": torch.zeros(4, 8)}, "holds no LoRA"),
        ({"unet.a.bias": torch.zeros(4)}, "the key 'unet.a.bias' is not understood"),
    ],
)
def test_files_that_are_no_lora_for_sd_1(tmp_path, tensors, sentence):
    save_file(tensors, str(tmp_path / "x.safetensors"))
    with pytest.raises(ValueError, match=sentence):
        read_lora(tmp_path / "x.safetensors")


def test_missing_damaged_and_pickled_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no LoRA"):
        read_lora(tmp_path)
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is damaged"):
        read_lora(tmp_path / "x.safetensors")
    (tmp_path / "x.bin").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="pickled weights are not read"):
        read_lora(tmp_path / "x.bin")
    with pytest.raises(ValueError, match="is no number"):
        LoraSpec.parse(f"{tmp_path / 'x.bin'}:much")


@pytest.mark.parametrize(
    "values", [{"rank": 0}, {"alpha": 0.0}, {"dropout": 1.0}, {"targets": ()}, {"text_targets": ("q",)}]
)
def test_bad_options(values):
    with pytest.raises(ValueError):
        LoraOptions(**values)


def test_targets_that_are_not_there(tmp_path):
    with pytest.raises(ValueError, match="the unet has no module 'to_w'"):
        add_adapter(tiny_pipeline(tmp_path / "a").unet, LoraOptions(targets=("to_w",)), "unet")


def test_the_commands_merge_and_convert(tmp_path, capsys):
    write_lora(tmp_path / WEIGHTS_FILE, parts_of(trained(tmp_path / "a")))
    (tmp_path / "base").mkdir()
    save_base(tiny_base(tmp_path / "b"), tmp_path / "base")
    fuse.main([str(tmp_path / "base"), str(tmp_path / "out"), "--lora", f"{tmp_path}:0.5"])
    expected = tiny_pipeline(tmp_path / "c")
    fuse_(expected, [LoraSpec(tmp_path / WEIGHTS_FILE, 0.5)])
    found = make_pipeline(load_base(tmp_path / "out"))
    found.set_progress_bar_config(disable=True)
    assert torch.equal(images_of(found), images_of(expected))
    comfy, back = tmp_path / "comfy.safetensors", tmp_path / "back.safetensors"
    convert_lora.main([str(tmp_path), str(comfy)])
    with pytest.raises(SystemExit):
        convert_lora.main([str(comfy), str(back), "--layout", "diffusers"])
    assert "name the base that it is for with --base" in capsys.readouterr().err
    convert_lora.main([str(comfy), str(back), "--layout", "diffusers", "--base", str(tmp_path / "base")])
    before, after = load_file(tmp_path / WEIGHTS_FILE), load_file(back)
    assert set(before) == set(after) and all(torch.equal(before[k], after[k]) for k in before)
    with pytest.raises(SystemExit):
        fuse.main([str(tmp_path / "base"), str(tmp_path / "out"), "--lora", str(tmp_path)])
    assert "is there already" in capsys.readouterr().err
