"""Random weights in the published layouts, imported, against a second computation straight from those weights.

The layouts were also run against the original code of the three projects: codes equal, images to 3e-5.
"""

import pickle

import pytest
import torch
import torch.nn.functional as F

from common.files import read_json
from vq.convert import main
from vq.model import ImageTokenizer
from vq.published.foreign import Inert, read_foreign

CHANNELS, MULTS, Z, DIM, SIZE = 32, (1, 1, 2), 16, 8, 40
LEVELS = len(MULTS)


def conv(weights, name, before, after, kernel=3):
    weights[f"{name}.weight"] = torch.randn(after, before, kernel, kernel) / (before * kernel * kernel) ** 0.5
    weights[f"{name}.bias"] = 0.1 * torch.randn(after)


def norm(weights, name, channels):
    weights[f"{name}.weight"] = 1 + 0.1 * torch.randn(channels)
    weights[f"{name}.bias"] = 0.1 * torch.randn(channels)


def resnet(weights, name, before, after):
    norm(weights, f"{name}.norm1", before)
    conv(weights, f"{name}.conv1", before, after)
    norm(weights, f"{name}.norm2", after)
    conv(weights, f"{name}.conv2", after, after)
    if before != after:
        conv(weights, f"{name}.nin_shortcut", before, after, 1)


def attention(weights, name, channels):
    norm(weights, f"{name}.norm", channels)
    for part in ("q", "k", "v", "proj_out"):
        conv(weights, f"{name}.{part}", channels, channels, 1)


class Names:
    """The two spellings of one network."""

    def __init__(self, style):
        self.llamagen = style == "llamagen"

    def down(self, level):
        return f"encoder.conv_blocks.{level}" if self.llamagen else f"encoder.down.{level}"

    def up(self, level):  # LlamaGen numbers coarse to fine
        return f"decoder.conv_blocks.{LEVELS - 1 - level}" if self.llamagen else f"decoder.up.{level}"

    @property
    def block(self):
        return "res" if self.llamagen else "block"

    def mid(self, half, i):
        return f"{half}.mid.{i}" if self.llamagen else f"{half}.mid.{('block_1', 'attn_1', 'block_2')[i]}"


def make_weights(style, gumbel=False):
    torch.manual_seed(0)
    names, w = Names(style), {}
    widths = [CHANNELS * m for m in MULTS]
    conv(w, "encoder.conv_in", 3, CHANNELS)
    before = CHANNELS
    for level, width in enumerate(widths):
        for i in range(2):
            resnet(w, f"{names.down(level)}.{names.block}.{i}", before, width)
            before = width
            if level == LEVELS - 1:
                attention(w, f"{names.down(level)}.attn.{i}", width)
        if level < LEVELS - 1:
            conv(w, f"{names.down(level)}.downsample.conv", width, width)
    for half in ("encoder", "decoder"):
        resnet(w, names.mid(half, 0), widths[-1], widths[-1])
        attention(w, names.mid(half, 1), widths[-1])
        resnet(w, names.mid(half, 2), widths[-1], widths[-1])
    norm(w, "encoder.norm_out", widths[-1])
    conv(w, "encoder.conv_out", widths[-1], Z)
    conv(w, "quant_conv", Z, DIM, 1)
    conv(w, "post_quant_conv", DIM, Z, 1)
    conv(w, "decoder.conv_in", Z, widths[-1])
    before = widths[-1]
    for level in reversed(range(LEVELS)):
        for i in range(3):
            resnet(w, f"{names.up(level)}.{names.block}.{i}", before, widths[level])
            before = widths[level]
            if level == LEVELS - 1:
                attention(w, f"{names.up(level)}.attn.{i}", before)
        if level:
            conv(w, f"{names.up(level)}.upsample.conv", before, before)
    norm(w, "decoder.norm_out", widths[0])
    conv(w, "decoder.conv_out", widths[0], 3)
    if gumbel:
        conv(w, "quantize.proj", DIM, SIZE, 1)
        w["quantize.embed.weight"] = torch.randn(SIZE, DIM)
    else:
        w["quantize.embedding.weight"] = torch.randn(SIZE, DIM)
    return w


def independent(w, style, images, gumbel=False):
    """Codes (B, h, w) and reconstruction, from the formulas of the compatibility notes."""
    names = Names(style)

    def c(x, name, stride=1, padding=1):
        return F.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], stride=stride, padding=padding)

    def n(x, name):
        return F.group_norm(x, 32, w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-6)

    def r(x, name):
        h = n(x, f"{name}.norm1")
        h = c(h * torch.sigmoid(h), f"{name}.conv1")
        h = n(h, f"{name}.norm2")
        h = c(h * torch.sigmoid(h), f"{name}.conv2")
        return h + (c(x, f"{name}.nin_shortcut", padding=0) if f"{name}.nin_shortcut.weight" in w else x)

    def a(x, name):
        h = n(x, f"{name}.norm")
        q, k, v = (c(h, f"{name}.{part}", padding=0).flatten(2) for part in "qkv")
        attention_map = torch.softmax(q.transpose(1, 2) @ k * x.shape[1] ** -0.5, dim=2)  # (B, query, key)
        out = (v @ attention_map.transpose(1, 2)).view_as(x)
        return x + c(out, f"{name}.proj_out", padding=0)

    def mid(x, half):
        return r(a(r(x, names.mid(half, 0)), names.mid(half, 1)), names.mid(half, 2))

    x = c(images, "encoder.conv_in")
    for level in range(LEVELS):
        for i in range(2):
            x = r(x, f"{names.down(level)}.{names.block}.{i}")
            if level == LEVELS - 1:
                x = a(x, f"{names.down(level)}.attn.{i}")
        if level < LEVELS - 1:
            x = c(F.pad(x, (0, 1, 0, 1)), f"{names.down(level)}.downsample.conv", stride=2, padding=0)
    x = n(mid(x, "encoder"), "encoder.norm_out")
    z = c(c(x * torch.sigmoid(x), "encoder.conv_out"), "quant_conv", padding=0)
    if gumbel:
        ids = c(z, "quantize.proj", padding=0).argmax(1)
        codes = w["quantize.embed.weight"][ids]
    else:
        points, book = z.permute(0, 2, 3, 1), w["quantize.embedding.weight"]
        if style == "llamagen":
            points, book = (t / t.norm(dim=-1, keepdim=True) for t in (points, book))
        ids = torch.stack([(points - entry).square().sum(-1) for entry in book], -1).argmin(-1)
        codes = book[ids]
    x = c(c(codes.permute(0, 3, 1, 2), "post_quant_conv", padding=0), "decoder.conv_in")
    x = mid(x, "decoder")
    for level in reversed(range(LEVELS)):
        for i in range(3):
            x = r(x, f"{names.up(level)}.{names.block}.{i}")
            if level == LEVELS - 1:
                x = a(x, f"{names.up(level)}.attn.{i}")
        if level:
            x = c(x.repeat_interleave(2, 2).repeat_interleave(2, 3), f"{names.up(level)}.upsample.conv")
    x = n(x, "decoder.norm_out")
    return ids, c(x * torch.sigmoid(x), "decoder.conv_out")


def compare(tokenizer, images, ids, reconstruction):
    found = tokenizer.encode_ids(images)
    assert len(ids.unique()) > 5  # a comparison of something
    assert torch.equal(found, ids.flatten(1))
    torch.testing.assert_close(
        tokenizer.decode_ids(found, grid=ids.shape[1:]), reconstruction.clamp(-1, 1), atol=1e-4, rtol=1e-4
    )


IMAGES = torch.rand(2, 3, 32, 24, generator=torch.Generator().manual_seed(3)) * 2 - 1
YAML = """
model:
  base_learning_rate: 4.5e-6
  target: taming.models.vqgan.VQModel
  params:
    embed_dim: 8
    n_embed: {codes}
    ddconfig: {{double_z: false, z_channels: 16, resolution: 64, in_channels: 3, out_ch: 3, ch: 32,
                ch_mult: [1, 1, 2], num_res_blocks: 2, attn_resolutions: [16], dropout: 0.0}}
"""


class LightningCallback:
    """A class that must never be imported or called when its pickle is read."""

    def __reduce__(self):
        return (pytest.fail, ("foreign code ran",))


@pytest.mark.parametrize("gumbel", [False, True])
def test_taming_checkpoint_with_yaml_and_foreign_classes(tmp_path, gumbel, capsys):
    weights = make_weights("taming", gumbel)
    extra = {
        "loss.discriminator.main.0.weight": torch.zeros(3),
        "loss.perceptual_loss.lin0.model.1.weight": torch.zeros(1),
    }
    content = {"state_dict": weights | extra, "epoch": 7, "callbacks": {"x": LightningCallback()}}
    torch.save(content, tmp_path / "last.ckpt")
    (tmp_path / "model.yaml").write_text(YAML.format(codes=SIZE))
    main([str(tmp_path / "last.ckpt"), str(tmp_path / "out"), "--config", str(tmp_path / "model.yaml")])
    assert f"taming, f4, {SIZE} codes of width 8" in capsys.readouterr().out
    tokenizer = ImageTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.image_size == 64 and tokenizer.config.taming.attention_factors == (4,)
    assert tokenizer.config.quantizer == ("gumbel" if gumbel else "vq")
    compare(tokenizer, IMAGES, *independent(weights, "taming", IMAGES, gumbel))
    assert read_json(tmp_path / "out" / "config.json")["imported"]["kind"] == "taming"


def test_llamagen_prefers_its_moving_average(tmp_path):
    weights = make_weights("llamagen")
    stale = {n: torch.zeros_like(t) for n, t in weights.items()}
    content = {"model": stale, "ema": weights | {"quantize.codebook_used": torch.zeros(65536)}, "steps": 1}
    torch.save(content, tmp_path / "vq.pt")
    main([str(tmp_path / "vq.pt"), str(tmp_path / "out"), "--image-size", "32"])
    tokenizer = ImageTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.config.l2_normalize and tokenizer.image_size == 32
    compare(tokenizer, IMAGES, *independent(weights, "llamagen", IMAGES))


def discrete_vae(num_layers, blocks, hidden=12, dim=6):
    torch.manual_seed(0)
    w = {"codebook.weight": torch.randn(SIZE, dim)}
    number = 0
    for i in range(num_layers):
        conv(w, f"encoder.{number}.0", 3 if i == 0 else hidden, hidden, 4)
        number += 1
    for _ in range(blocks):
        for part, kernel in ((0, 3), (2, 3), (4, 1)):
            conv(w, f"encoder.{number}.net.{part}", hidden, hidden, kernel)
        number += 1
    conv(w, f"encoder.{number}", hidden, SIZE, 1)
    number = 0
    if blocks:
        conv(w, "decoder.0", dim, hidden, 1)
        number = 1
    for _ in range(blocks):
        for part, kernel in ((0, 3), (2, 3), (4, 1)):
            conv(w, f"decoder.{number}.net.{part}", hidden, hidden, kernel)
        number += 1
    before = hidden if blocks else dim
    for _ in range(num_layers):
        w[f"decoder.{number}.0.weight"] = torch.randn(before, hidden, 4, 4) / (before * 4) ** 0.5
        w[f"decoder.{number}.0.bias"] = 0.1 * torch.randn(hidden)
        number, before = number + 1, hidden
    conv(w, f"decoder.{number}", hidden, 3, 1)
    return w


def independent_dvae(w, images, num_layers, blocks):
    def c(x, name, stride=1, padding=0):
        return F.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], stride=stride, padding=padding)

    def block(x, name):
        h = F.relu(c(x, f"{name}.net.0", padding=1))
        return c(F.relu(c(h, f"{name}.net.2", padding=1)), f"{name}.net.4") + x

    x = ((images + 1) / 2 - 0.5) / 0.5
    for i in range(num_layers):
        x = F.relu(c(x, f"encoder.{i}.0", 2, 1))
    for i in range(blocks):
        x = block(x, f"encoder.{num_layers + i}")
    ids = c(x, f"encoder.{num_layers + blocks}").argmax(1)
    x = w["codebook.weight"][ids].permute(0, 3, 1, 2)
    start = 0
    if blocks:
        x, start = c(x, "decoder.0"), 1
    for i in range(blocks):
        x = block(x, f"decoder.{start + i}")
    start += blocks
    for i in range(num_layers):
        name = f"decoder.{start + i}.0"
        x = F.relu(F.conv_transpose2d(x, w[f"{name}.weight"], w[f"{name}.bias"], stride=2, padding=1))
    return ids, c(x, f"decoder.{start + num_layers}")


@pytest.mark.parametrize(("num_layers", "blocks"), [(2, 2), (3, 0), (1, 1)])
@pytest.mark.parametrize("inside_a_generator", [False, True])
def test_dalle_pytorch_discrete_vae(tmp_path, num_layers, blocks, inside_a_generator):
    weights = discrete_vae(num_layers, blocks)
    options = {"image_size": 64, "num_layers": num_layers, "num_tokens": SIZE}
    content = {"hparams": options, "weights": weights}
    if inside_a_generator:
        inner = {f"vae.{n}": t for n, t in weights.items()} | {"text_emb.weight": torch.zeros(2, 2)}
        content = {"hparams": {"depth": 2}, "vae_params": options, "weights": inner}
    torch.save(content, tmp_path / "vae.pt")
    main([str(tmp_path / "vae.pt"), str(tmp_path / "out")])
    tokenizer = ImageTokenizer.from_pretrained(tmp_path / "out")
    assert (tokenizer.image_size, tokenizer.downsample_factor) == (64, 2**num_layers)
    compare(tokenizer, IMAGES, *independent_dvae(weights, IMAGES, num_layers, blocks))


def test_a_dalle_pytorch_generator_with_a_vqgan_inside(tmp_path):
    weights = make_weights("taming")
    content = {"hparams": {"depth": 2}, "weights": {f"vae.model.{n}": t for n, t in weights.items()}}
    torch.save(content, tmp_path / "dalle.pt")
    main([str(tmp_path / "dalle.pt"), str(tmp_path / "out")])
    compare(ImageTokenizer.from_pretrained(tmp_path / "out"), IMAGES, *independent(weights, "taming", IMAGES))


@pytest.mark.parametrize(
    "prefix",
    [
        "module.",
        "_orig_mod.",
        "module._orig_mod.",
        "_orig_mod.module.",
        "first_stage_model.",
        "model.",
        "module.model._orig_mod.",
        "model.first_stage_model.",
    ],
)
@pytest.mark.parametrize("kind", ["taming", "dvae"])
def test_wrapped_names_give_the_same_tokenizer(tmp_path, prefix, kind):
    weights = make_weights("taming") if kind == "taming" else discrete_vae(2, 1)
    content = {f"{prefix}{name}": tensor for name, tensor in weights.items()}
    if kind == "taming":
        content["model_ema.decay"] = torch.zeros(())
    if "first_stage_model" in prefix:
        content["model.diffusion_model.out.weight"] = torch.zeros(2)
        content["cond_stage_model.x"] = torch.full((2,), float("nan"))
    torch.save({"state_dict": content}, tmp_path / "x.ckpt")
    torch.save(weights, tmp_path / "plain.ckpt")
    for name in ("x", "plain"):
        main([str(tmp_path / f"{name}.ckpt"), str(tmp_path / name)])
    found, plain = (ImageTokenizer.from_pretrained(tmp_path / name).state_dict() for name in ("x", "plain"))
    assert list(found) == list(plain) and all(torch.equal(found[n], plain[n]) for n in plain)


def test_a_part_that_was_compiled_and_nested_entries(tmp_path):
    weights = make_weights("taming")
    content = {n.replace("encoder.", "encoder._orig_mod.", 1): t for n, t in weights.items()}
    torch.save({"model": {"state_dict": content}, "step": 3}, tmp_path / "x.ckpt")
    main([str(tmp_path / "x.ckpt"), str(tmp_path / "x")])
    compare(ImageTokenizer.from_pretrained(tmp_path / "x"), IMAGES, *independent(weights, "taming", IMAGES))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(tmp_path, value, capsys):
    weights = make_weights("taming")
    weights["decoder.conv_out.bias"][1] = value
    torch.save(weights, tmp_path / "x.pt")
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path / "x.pt"), str(tmp_path / "out")])
    assert stop.value.code == 2
    assert "the weight decoder.conv_out.bias holds numbers that are not finite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model:\n", None),
        ("model:\n  params:\n", None),
        ("model:\n  params:\n    ddconfig:\n    n_embed:\n", None),
        ("model: big\n", "model must be a mapping, not 'big'"),
        ("model:\n  params: [1]\n", "model.params must be a mapping"),
        ("model:\n  params:\n    ddconfig:\n      resolution: large\n", "resolution must be a whole number"),
        ("model:\n  params:\n    n_embed: many\n", "n_embed must be a whole number above 0, not 'many'"),
        ("model:\n  params:\n    embed_dim: -8\n", "embed_dim must be a whole number above 0"),
        ("", "must hold a mapping"),
        ("<html>: [", "is not valid yaml"),
        ("\udcff", "is not valid yaml"),
    ],
)
def test_a_config_with_empty_sections_or_words(tmp_path, text, words, capsys):
    torch.save(make_weights("taming"), tmp_path / "x.pt")
    path = tmp_path / "model.yaml"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    arguments = [str(tmp_path / "x.pt"), str(tmp_path / "out"), "--config", str(path)]
    if words is None:
        main(arguments)
        assert ImageTokenizer.from_pretrained(tmp_path / "out").image_size == 256
        return
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and words in said and str(path) in said and said.count("\n") == 1


def test_foreign_objects_become_inert(tmp_path):
    torch.save({"a": torch.ones(2), "callbacks": LightningCallback()}, tmp_path / "x.pt")
    content = read_foreign(tmp_path / "x.pt")
    assert torch.equal(content["a"], torch.ones(2)) and isinstance(content["callbacks"], Inert)
    with (tmp_path / "evil.pt").open("wb") as file:
        pickle.dump(LightningCallback(), file)
    try:
        content = read_foreign(tmp_path / "evil.pt")
    except ValueError:
        return
    assert isinstance(content, Inert)


def _lacking(weights):
    del weights["decoder.mid.block_1.conv1.weight"]
    return weights


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: {"foo": torch.zeros(2)}, "no known image tokenizer"),
        (_lacking, "1 weights are missing (decoder.mid.block_1.conv1.weight)"),
        (lambda w: w | {"decoder.extra": torch.zeros(2)}, "have no place (decoder.extra)"),
        (lambda w: w | {"quantize.used": torch.zeros(2)}, "remap their codes"),
        (lambda w: w | {"encoder.conv_in.weight": torch.zeros(32, 1, 3, 3)}, "channels are not supported"),
        (lambda w: w | {"post_quant_conv.bias": torch.zeros(5)}, "has shape (5,), not (16,)"),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path, change, message, capsys):
    torch.save(change(make_weights("taming")), tmp_path / "x.pt")
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path / "x.pt"), str(tmp_path / "out")])
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_bad_files_are_named(tmp_path, capsys):
    (tmp_path / "x.pt").write_bytes(b"<html>404</html>")
    (tmp_path / "lfs.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    )
    (tmp_path / "empty.ckpt").write_bytes(b"")
    (tmp_path / "junk.pt").write_bytes(bytes(range(1, 200)))
    torch.save(make_weights("taming"), tmp_path / "whole.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:5000])
    (tmp_path / "old").mkdir()
    (tmp_path / "model.yaml").write_text(YAML.format(codes=99))
    torch.save(make_weights("taming"), tmp_path / "good.pt")
    for arguments, message in (
        (["x.pt", "out"], "is a web page (HTML or XML) that was saved in place of the file"),
        (["lfs.safetensors", "out"], "is a Git LFS pointer, not the file"),
        (["empty.ckpt", "out"], "is empty"),
        (["junk.pt", "out"], "is no torch file"),
        (["cut.pt", "out"], "cut.pt"),
        (["nothing.pt", "out"], "no weights file"),
        (["good.pt", "old"], "exists already"),
        (["old", "out"], "is a directory"),
        (
            ["good.pt", "out", "--config", str(tmp_path / "model.yaml")],
            "says n_embed 99, the weights have 40",
        ),
    ):
        with pytest.raises(SystemExit) as stop:
            main([str(tmp_path / arguments[0]), str(tmp_path / arguments[1]), *arguments[2:]])
        assert stop.value.code == 2 and message in capsys.readouterr().err
