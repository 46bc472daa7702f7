"""Cached = uncached, padding has no influence, nothing looks ahead, checkpoints are strict, every option matters."""

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from tiny_generator import CODES, GRID, TEXT_LEN, VOCAB, tiny_config, tiny_ids, tiny_model

from common.checkpoint import write_model
from common.config import to_mapping
from dalle import sequence
from dalle.losses import LossConfig, dalle_loss
from dalle.model import KIND, SIZES, Dalle, ModelOptions

N = GRID**2
CACHED = {"rtol": 2e-4, "atol": 2e-4}


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_cached_logits_are_the_uncached_ones(num_kv_heads, as_tensor):
    model, (text, image) = tiny_model(num_kv_heads=num_kv_heads), tiny_ids()
    with torch.no_grad():
        whole = model(text, image).image
    cache = model.new_cache(text)
    steps = [model.prefill(text, cache)]
    for k in range(N - 1):
        steps.append(model.decode_step(image[:, k], torch.tensor(k) if as_tensor else k, cache))
    torch.testing.assert_close(torch.stack(steps, 1), whole, **CACHED)


@pytest.mark.parametrize("known", [1, 7, N - 1])
def test_prefill_of_half_a_image_goes_on_as_the_whole_pass(known):
    model, (text, image) = tiny_model(), tiny_ids()
    with torch.no_grad():
        whole = model(text, image).image
    cache = model.new_cache(text)
    torch.testing.assert_close(model.prefill(text, cache, image[:, :known]), whole[:, known], **CACHED)
    if known < N - 1:
        following = model.decode_step(image[:, known], known, cache)
        torch.testing.assert_close(following, whole[:, known + 1], **CACHED)


def test_batch_is_singles_and_a_trimmed_text_changes_nothing():
    model, (text, image) = tiny_model(), tiny_ids()
    with torch.no_grad():
        together = model(text, image).image
        for i in range(3):
            alone = model(sequence.trim(text[i : i + 1], 0), image[i : i + 1]).image
            torch.testing.assert_close(alone[0], together[i], rtol=1e-4, atol=1e-4)


def test_nothing_looks_ahead():
    model, (text, image) = tiny_model(), tiny_ids()
    changed = image.clone()
    changed[:, 9] = (changed[:, 9] + 1) % CODES
    with torch.no_grad():
        before, after = model(text, image).image, model(text, changed).image
    assert torch.equal(before[:, :10], after[:, :10])
    assert not torch.isclose(before[:, 10:], after[:, 10:]).all(-1).any()


def test_text_and_position_matter():
    model, (text, image) = tiny_model(), tiny_ids(1)
    other = text.clone()
    other[0, 2] = other[0, 2] % (VOCAB - 1) + 1
    with torch.no_grad():
        logits = model(text, image).image
        assert not torch.isclose(model(other, image).image, logits).all(-1).any()
        same_row = model(text, torch.full_like(image, 3)).image[0]
    assert not torch.isclose(same_row[1], same_row[2]).all()


def test_padding_embedding_is_the_null_caption_and_used_nowhere_else():
    model, (text, image) = tiny_model(), tiny_ids()
    for rows, used in (([0, 1], False), ([2], True)):
        model.zero_grad()
        output = model(text[rows], image[rows])
        output.image.square().sum().backward()
        assert bool(model.text_embed.weight.grad[0].abs().sum() > 0) == used


def test_text_logits_follow_the_targets():
    model, (text, image) = tiny_model(), tiny_ids()
    output = model(text, image)
    targets = sequence.text_targets(text, 0)
    assert output.text.shape == (len(targets), VOCAB) and len(targets) == 7 + 4
    changed = text.clone()
    changed[0, -1] = changed[0, -1] % (VOCAB - 1) + 1  # the last token is a target, never a cause
    assert torch.equal(model(changed, image).text, output.text)


def test_without_a_text_head():
    config = replace(tiny_config(), text_head=False)
    torch.manual_seed(0)
    model, (text, image) = Dalle(config), tiny_ids()
    assert model(text, image).text is None
    assert not any(n.startswith(("text_out", "text_head")) for n, _ in model.named_parameters())


@pytest.mark.parametrize(
    "options",
    [{"tie_text_head": False}, {"tie_image_head": True}, {"text_embed_dim": 32}, {"num_kv_heads": 2}],
)
def test_every_parameter_gets_a_gradient(options):
    model, (text, image) = tiny_model(**options).train(), tiny_ids()
    losses = dalle_loss(model(text, image), image, sequence.text_targets(text, 0), 11, LossConfig())
    losses.total.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_gradient_checkpointing_gives_the_same_gradients():
    grads = []
    for checkpointing in (False, True):
        model, (text, image) = tiny_model(gradient_checkpointing=checkpointing).train(), tiny_ids()
        model(text, image).image.square().mean().backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["dropout", "attention_dropout", "token_dropout", "stochastic_depth"])
def test_regularisers_act_in_training_alone(name):
    model, (text, image) = tiny_model(**{name: 0.6}), tiny_ids()
    with torch.no_grad():
        assert torch.equal(model(text, image).image, model(text, image).image)
        torch.testing.assert_close(model(text, image).image, tiny_model()(text, image).image)
        model.train()
        assert not torch.equal(model(text, image).image, model(text, image).image)


def test_reference_loss_at_the_start_is_that_of_chance():
    torch.manual_seed(0)
    model, (text, image) = Dalle(tiny_config()), tiny_ids()
    losses = dalle_loss(model(text, image), image, sequence.text_targets(text, 0), 11, LossConfig())
    assert losses.metrics()["image_loss"] == pytest.approx(math.log(CODES), abs=0.1)


def save(model: Dalle, directory):
    directory.mkdir(exist_ok=True)
    write_model(directory, KIND, to_mapping(model.config), model.state_dict(), 7)
    return directory


def test_checkpoint_round_trip(tmp_path):
    model, (text, image) = tiny_model(), tiny_ids()
    loaded = Dalle.from_pretrained(save(model, tmp_path / "a"))
    assert loaded.config == model.config and not loaded.training
    with torch.no_grad():
        assert torch.equal(loaded(text, image).image, model(text, image).image)


def test_a_missing_or_an_extra_weight_is_named(tmp_path):
    model = tiny_model()
    directory = save(model, tmp_path / "a")
    weights = model.state_dict()
    removed = {n: t for n, t in weights.items() if n != "blocks.1.ffn.out.weight"}
    for changed, said in (
        (removed, "blocks.1.ffn.out.weight"),
        (weights | {"stray": torch.ones(1)}, "stray"),
    ):
        write_model(directory, KIND, to_mapping(model.config), changed, 7)
        with pytest.raises(ValueError, match=said):
            Dalle.from_pretrained(directory)


def test_a_damaged_config_and_another_kind_are_refused(tmp_path):
    directory = save(tiny_model(), tmp_path / "a")
    config = json.loads((directory / "config.json").read_text())
    for change, said in (({"kind": "ranker"}, "kind"), ({"model": {"dim": 32}}, "damaged")):
        (directory / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=said):
            Dalle.from_pretrained(directory)
    shutil.rmtree(directory)
    with pytest.raises(FileNotFoundError):
        Dalle.from_pretrained(directory)


@pytest.mark.parametrize("size", SIZES)
def test_sizes_are_what_their_names_say(size):
    config = ModelOptions(size=size).config(21128, 0, 32, 1024, 16)
    with torch.device("meta"):
        model = Dalle(config)
    million = sum(p.numel() for p in model.blocks.parameters()) / 1e6
    named = float(size[:-1]) * (1000 if size.endswith("b") else 1)
    assert million == pytest.approx(named, rel=0.16)


def test_explicit_sizes_win_over_the_row():
    config = ModelOptions(size="8m", num_layers=2, num_kv_heads=2).config(100, 0, 32, 64, 8)
    assert (config.dim, config.num_layers, config.num_heads, config.num_kv_heads) == (256, 2, 4, 2)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"dim": 30}, "30 does not divide over 4"),
        ({"dim": 8}, "multiple of 4"),
        ({"num_kv_heads": 3}, "num_kv_heads 3"),
        ({"dropout": 1.0}, "dropout must lie"),
        ({"num_layers": 0}, "num_layers must be at least 1"),
    ],
)
def test_bad_sizes_are_named(options, said):
    with pytest.raises(ValueError, match=said):
        tiny_config(**options)


def test_wrong_lengths_are_named():
    model, (text, image) = tiny_model(), tiny_ids()
    with pytest.raises(ValueError, match="16 image tokens, got 15"):
        model(text, image[:, :-1])
    with pytest.raises(ValueError, match=f"reads {TEXT_LEN} text tokens, got 9"):
        model(torch.ones(1, 9, dtype=torch.long), image[:1])
