"""Import of DALLE-pytorch checkpoints: logits against those of the published package (dalle_pytorch_1_6_6.npz)."""

import json
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

from dalle.convert import import_checkpoint, main
from dalle.pipeline import Request, TextToImage
from dalle.published.dalle_pytorch import DallePytorch
from dalle.sampling import SamplingOptions
from vq.model import ImageTokenizer, TokenizerConfig
from vq.published.taming import TamingConfig

DATA = Path(__file__).parent / "data"
GOLDEN = np.load(DATA / "dalle_pytorch_1_6_6.npz")
MAKER = runpy.run_path(str(DATA / "make_dalle_pytorch_golden.py"))
values, inputs = MAKER["values"], MAKER["inputs"]
LISTING = json.loads(str(GOLDEN["listing"]))


def checkpoint(variant: str) -> dict:
    """The dictionary that upstream's trainer would have saved for this variant."""
    entry = LISTING[variant]
    shared = entry["shared"]
    weights = {n: torch.from_numpy(values(shared.get(n, n), s)) for n, s in entry["shapes"].items()}
    if f"{variant}.pos_emb" in GOLDEN:
        weights["transformer.pos_emb"] = torch.from_numpy(GOLDEN[f"{variant}.pos_emb"])
    return {
        "hparams": dict(entry["hparams"]),
        "vae_params": entry["vae_params"],
        "vae_class_name": "DiscreteVAE",
        "version": "1.6.6",
        "epoch": 3,
        "weights": weights,
        "opt_state": {"state": {}, "param_groups": []},
    }


def save(content: dict, directory: Path) -> Path:
    torch.save(content, directory / "dalle.pt")
    return directory / "dalle.pt"


def build(path: Path) -> DallePytorch:
    imported = import_checkpoint(path)
    model = DallePytorch(imported.config)
    model.load_state_dict(imported.weights)
    return model.eval()


def logits_of(model: DallePytorch) -> torch.Tensor:
    text, image = map(torch.from_numpy, inputs())
    with torch.no_grad():
        logits = model(text, image)
    return logits.masked_fill(logits < -1e30, 0)[:1, ::3]


@pytest.mark.parametrize("variant", sorted(LISTING))
def test_logits_equal_those_of_the_published_package(variant, tmp_path):
    model = build(save(checkpoint(variant), tmp_path))
    torch.testing.assert_close(
        logits_of(model), torch.from_numpy(GOLDEN[f"{variant}.logits"]), rtol=1e-4, atol=2e-4
    )


@pytest.mark.parametrize("variant", ["plain", "rotary_shift", "reversible", "axial"])
def test_older_names_give_the_same_logits(variant, tmp_path):
    """Wrapper depths before 2022, axial names after 2025, T + 2 position rows of the fork, a mask that was stored."""
    content = checkpoint(variant)
    renamed = {}
    for name, tensor in content["weights"].items():
        name = name.replace("pos_emb.weights_", "pos_emb.weights.")
        name = re.sub(r"(?:fn\.){5}to_", "fn.fn.fn.to_", re.sub(r"\.fn\.fn\.fn\.to_", ".fn.fn.to_", name))
        name = re.sub(r"(?:fn\.){4}net", "fn.fn.fn.net", name)
        if name == "text_pos_emb.weight":
            tensor = torch.cat([tensor, torch.full((1, tensor.shape[1]), 9.0)])
        renamed[name] = tensor
    assert set(renamed) != set(content["weights"])
    renamed["logits_mask"] = torch.zeros(1, 70, 40, dtype=torch.bool)
    content["weights"] = renamed
    model = build(save(content, tmp_path))
    torch.testing.assert_close(
        logits_of(model), torch.from_numpy(GOLDEN[f"{variant}.logits"]), rtol=1e-4, atol=2e-4
    )


@pytest.mark.parametrize("variant", ["plain", "rotary_shift", "reversible", "axial", "conv_like"])
def test_cached_equals_uncached(variant, tmp_path):
    model = build(save(checkpoint(variant), tmp_path))
    text, image = map(torch.from_numpy, inputs())
    with torch.no_grad():
        expected = model(text, image)[:, model.config.max_text_len :, model.config.text_vocab_size :]
        cache = model.new_cache(text)
        steps = [model.prefill(text, cache, image[:, :10])]
        steps += [
            model.decode_step(image[:, n], n, cache) for n in range(10, model.config.num_image_tokens - 1)
        ]
    torch.testing.assert_close(torch.stack(steps, 1), expected[:, 10:], rtol=1e-4, atol=1e-4)


def test_weights_win_over_options_and_every_override_is_reported(tmp_path):
    content = checkpoint("plain")
    content["hparams"] |= {"rotary_emb": True, "shift_tokens": True, "dim_head": 64}
    imported = import_checkpoint(save(content, tmp_path))
    assert not imported.config.rotary and not imported.config.shift_tokens and imported.config.head_dim == 18
    assert sorted(line.split(":")[0] for line in imported.overrides) == [
        "dim_head",
        "rotary_emb",
        "shift_tokens",
    ]


def test_embedded_tokenizer_comes_along_without_its_training_losses(tmp_path):
    content = checkpoint("plain")
    content["weights"]["vae.model.loss.discriminator.main.0.weight"] = torch.zeros(3)
    imported = import_checkpoint(save(content, tmp_path))
    assert imported.vae_class == "DiscreteVAE" and imported.vae_options["num_tokens"] == 11
    assert "codebook.weight" in imported.vae_weights and not any("loss" in n for n in imported.vae_weights)


def taming_tokenizer() -> ImageTokenizer:
    """A small VQGAN of 8 x 8 of 11 codes, as `plain` and `rotary_shift` draw."""
    torch.manual_seed(0)
    sizes = TamingConfig(channels=32, channel_mults=(1, 1, 2), res_blocks=1, z_channels=16)
    return ImageTokenizer(
        TokenizerConfig(32, "taming", taming=sizes, codebook_size=11, codebook_dim=16, l2_normalize=False)
    ).eval()


def as_published(tokenizer: ImageTokenizer) -> dict[str, torch.Tensor]:
    """Its weights under the names of VQGanVAE: `model` is the taming network."""
    renamed = {}
    for name, tensor in tokenizer.state_dict().items():
        name = re.sub(r"^(encoder|decoder)\.((?:post_)?quant_conv)\.", r"\2.", name)
        renamed["vae.model." + name.replace("quantizer.codebook.", "quantize.embedding.")] = tensor
    return renamed


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("variant", ["plain", "rotary_shift"])
def test_a_vqgan_in_the_file_comes_along(variant, named, tmp_path, vocabulary):
    content, original = checkpoint(variant), taming_tokenizer()
    weights = {n: t for n, t in content["weights"].items() if not n.startswith("vae.")}
    content |= {"weights": weights | as_published(original), "vae_params": None}
    content |= {"vae_class_name": "VQGanVAE"} if named else {}
    if not named:
        del content["vae_class_name"]
    path = save(content, tmp_path)
    main([str(path), str(tmp_path / "imported"), "--text-tokenizer", str(vocabulary)])
    pipeline = TextToImage.from_pretrained(tmp_path / "imported", "cpu")
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(
            pipeline.image_tokenizer.encode_ids(pixels), original.encode_ids(pixels), rtol=0, atol=0
        )
    assert next(pipeline.generate(["红色的鞋子"])).image.size == (32, 32)
    torch.testing.assert_close(
        logits_of(build(path)), torch.from_numpy(GOLDEN[f"{variant}.logits"]), rtol=1e-4, atol=2e-4
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["weights"].pop("text_pos_emb.weight"), "lacks the weight text_pos_emb.weight"),
        (
            lambda c: c["weights"]["to_logits.1.weight"].fill_(float("nan")),
            "to_logits.1.weight .* not finite",
        ),
        (lambda c: c.update(weights="nonsense value"), "DeepSpeed"),
        (lambda c: c["weights"].pop("to_logits.1.weight"), "to_logits.1.weight"),
        (lambda c: c["weights"].pop("transformer.layers.layers.1.0.scale"), "blocks.1.attention.scale"),
        (lambda c: c["weights"].update({"surprise.weight": torch.zeros(2)}), "surprise.weight"),
        (lambda c: c["hparams"].update(attn_types=("sparse",)), "sparse"),
        (lambda c: c["hparams"].update(attn_types=("full", "mlp")), r"'mlp' \(gMLP blocks"),
        (lambda c: c["hparams"].update(attn_types="full,mlp"), r"'mlp' \(gMLP blocks"),
        (lambda c: c["hparams"].pop("depth"), "vq.convert"),
        (lambda c: c.pop("hparams"), "hparams"),
        (lambda c: c["hparams"].update(heads=5), "5 heads"),
    ],
)
def test_what_cannot_be_imported_says_why(change, message, tmp_path):
    content = checkpoint("plain")
    change(content)
    with pytest.raises(ValueError, match=message):
        import_checkpoint(save(content, tmp_path))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model."])
@pytest.mark.parametrize("variant", ["plain", "reversible"])
def test_wrapped_names_give_the_same_generator(variant, prefix, tmp_path):
    plain = import_checkpoint(save(checkpoint(variant), tmp_path))
    content = checkpoint(variant)
    content["weights"] = {f"{prefix}{name}": tensor for name, tensor in content["weights"].items()}
    found = import_checkpoint(save(content, tmp_path))
    assert found.config == plain.config and list(found.weights) == list(plain.weights)
    assert all(torch.equal(found.weights[n], plain.weights[n]) for n in plain.weights)
    assert list(found.vae_weights) == list(plain.vae_weights)


@pytest.mark.parametrize(
    ("version", "centred"),
    [(None, True), ("1.4.2", True), ("1.0.0", True), ("0.14.3", True), ("1.5.0", False), ("1.10.1", False)],
)
def test_conv_like_looked_around_the_token_before_1_5(version, centred, tmp_path):
    """By hand, on the 8 x 8 grid behind 7 text positions: the token in row 4, column 4 sees what is at most 2 away and
    not behind it."""
    content = checkpoint("conv_like") | {"version": version}
    if version is None:
        del content["version"]
    model = build(save(content, tmp_path))
    mask = model.mask_conv_like[7 + 4 * 8 + 4]
    seen = {(int(i) // 8, int(i) % 8) for i in mask[7:].nonzero()[:, 0]}
    around = {(r, c) for r in range(2, 5) for c in range(2, 7) if (r, c) <= (4, 4)}
    above_left = {(r, c) for r in range(5) for c in range(5)}
    assert mask[:7].all() and seen == (around if centred else above_left)
    corner = (
        model.mask_conv_like[7 + 7][7:].nonzero()[:, 0].tolist()
    )  # the last of the first row: nothing wraps
    assert corner == ([5, 6, 7] if centred else [3, 4, 5, 6, 7])
    published = torch.from_numpy(GOLDEN["conv_like.logits"])
    assert (logits_of(model) - published).abs().max().gt(0.01) == centred


def test_a_rotary_table_that_is_one_row_short(tmp_path):
    """As releases 1.1.0 and 1.1.1 wrote it: the last row is never read."""
    content = checkpoint("rotary")
    content["weights"]["transformer.pos_emb"] = content["weights"]["transformer.pos_emb"][:, :-1]
    torch.testing.assert_close(
        logits_of(build(save(content, tmp_path))),
        torch.from_numpy(GOLDEN["rotary.logits"]),
        rtol=1e-4,
        atol=2e-4,
    )


def test_a_generator_of_chinese_is_told_its_tokenizer(tmp_path, monkeypatch, vocabulary, capsys):
    monkeypatch.setattr("dalle.convert.CHINESE_VOCAB", 23)
    monkeypatch.setattr("dalle.convert.Options.text_tokenizer", str(vocabulary))
    convert(tmp_path, vocabulary)
    assert "--text-tokenizer bert-base-chinese (or its folder)" in capsys.readouterr().out


def test_a_foreign_pickle_is_not_executed(tmp_path):
    class Foreign:
        def __reduce__(self):
            return (Path(tmp_path / "touched").touch, ())

    torch.save({"hparams": {}, "weights": Foreign()}, tmp_path / "dalle.pt")
    with pytest.raises(ValueError, match="no plain tensors"):
        import_checkpoint(tmp_path / "dalle.pt")
    assert not (tmp_path / "touched").exists()


@pytest.fixture
def vocabulary(tmp_path) -> Path:
    """A BERT vocabulary of 23 entries."""
    (tmp_path / "bert").mkdir()
    entries = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"一件红色的连衣裙双黑鞋白杯子条纹"]
    (tmp_path / "bert" / "vocab.txt").write_text(
        "\n".join([*entries, "x", "y"][:23]) + "\n", encoding="utf-8"
    )
    return tmp_path / "bert"


def convert(tmp_path, vocabulary, variant="rotary_shift", *arguments: str) -> Path:
    path = save(checkpoint(variant), tmp_path)
    main([str(path), str(tmp_path / "imported"), "--text-tokenizer", str(vocabulary), *arguments])
    return tmp_path / "imported"


def test_an_imported_generator_draws(tmp_path, vocabulary, capsys):
    pipeline = TextToImage.from_pretrained(convert(tmp_path, vocabulary), "cpu")
    assert "3 layers of width 32" in capsys.readouterr().out
    ids, note = pipeline.encode_text("红色的鞋子")
    assert note == "" and ids[0].tolist() == [7, 8, 9, 15, 18, 0]  # no marks, zeros behind
    assert pipeline.encode_text("红" * 9)[1] and pipeline.encode_text("红" * 9)[0].min() == 7
    images = list(pipeline.generate(["红色的鞋子"], 2, 0, SamplingOptions(cfg_scale=2.0)))
    assert images[0].image.size == (32, 32) and not torch.equal(images[0].ids, images[1].ids)
    with torch.no_grad():  # the likelihood that was recorded, by a pass over the whole sequence
        logits = pipeline.generator.model(ids, images[1].ids[None])[:, 6:, 29:].log_softmax(-1)
    expected = logits.gather(-1, images[1].ids[None, :, None]).sum()
    assert images[1].log_likelihood == pytest.approx(float(expected), rel=1e-4)
    alone = next(pipeline.generate_requests([Request("红色的鞋子", 1)], 0, SamplingOptions(cfg_scale=2.0)))
    assert alone.image.tobytes() == images[1].image.tobytes()


def test_openais_tokenizer_is_named_as_unsupported(tmp_path, vocabulary, capsys):
    content = checkpoint("plain") | {"vae_class_name": "OpenAIDiscreteVAE", "vae_params": None}
    with pytest.raises(SystemExit):
        main([str(save(content, tmp_path)), str(tmp_path / "imported"), "--text-tokenizer", str(vocabulary)])
    assert "OpenAI's discrete VAE, which is not supported" in capsys.readouterr().err


def test_what_does_not_belong_together_is_refused(tmp_path, vocabulary, roberta, generator_dir, capsys):
    for tokenizer, arguments, message in (
        (roberta, (), "23 text tokens"),
        (vocabulary, ("--image-tokenizer", str(generator_dir / "image_tokenizer")), "8 x 8 of 11 codes"),
        (tmp_path / "nothing", (), "nothing"),
    ):
        with pytest.raises(SystemExit) as stopped:
            convert(tmp_path, tokenizer, "plain", *arguments)
        assert stopped.value.code == 2 and message in capsys.readouterr().err
    convert(tmp_path, vocabulary)
    with pytest.raises(SystemExit):
        convert(tmp_path, vocabulary)
    assert "exists already" in capsys.readouterr().err
