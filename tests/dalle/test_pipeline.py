import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_checkpoint import CAPTIONS, replace_weights

from common.files import read_json
from dalle import default_checkpoint
from dalle.engines import FastOptions
from dalle.pipeline import Request, TextToImage
from dalle.sampling import SamplingOptions, log_likelihood
from dalle.text_tokenizer import TextTokenizer

OPTIONS = SamplingOptions(cfg_scale=2.0, top_p=0.95)


def bytes_of(images) -> list[bytes]:
    return [image.image.tobytes() for image in images]


def test_images_have_the_tokenizers_size_and_differ(pipeline):
    images = pipeline(CAPTIONS[0], 3, seed=1, cfg_scale=2.0)
    assert [p.size for p in images] == [(40, 40)] * 3 and len({p.tobytes() for p in images}) == 3


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_image_does_not_depend_on_its_batch(pipeline, batch_size):
    together = list(pipeline.generate(CAPTIONS[:2], 3, 4, OPTIONS, batch_size=6))
    other = list(pipeline.generate(CAPTIONS[:2], 3, 4, OPTIONS, batch_size=batch_size))
    assert bytes_of(together) == bytes_of(other)
    assert [p.log_likelihood for p in together] == [p.log_likelihood for p in other]
    assert [(p.text, p.index) for p in together] == [(t, i) for t in CAPTIONS[:2] for i in range(3)]


def test_seed_text_and_options_change_images(pipeline):
    def draw(text=CAPTIONS[0], seed=0, options=OPTIONS, negative=""):
        return bytes_of(pipeline.generate([text], 1, seed, options, negative))[0]

    variants = [
        draw(),
        draw(text=CAPTIONS[1]),
        draw(seed=1),
        draw(options=SamplingOptions(cfg_scale=4.0)),
        draw(negative=CAPTIONS[2]),
    ]
    assert len(set(variants)) == len(variants) and draw() == variants[0]


def test_requests_pick_single_images_of_a_seed(pipeline):
    whole = bytes_of(pipeline.generate([CAPTIONS[0]], 4, 9, OPTIONS))
    picked = bytes_of(
        pipeline.generate_requests([Request(CAPTIONS[0], 3), Request(CAPTIONS[0], 1)], 9, OPTIONS)
    )
    assert picked == [whole[3], whole[1]]


def test_likelihoods_are_recorded(pipeline, generator_dir):
    from dalle.model import Dalle

    image = next(pipeline.generate([CAPTIONS[0]], 1, 0, OPTIONS))
    text_ids, _ = pipeline.encode_text(CAPTIONS[0])
    expected = log_likelihood(Dalle.from_pretrained(generator_dir), text_ids, image.ids[None])
    assert image.log_likelihood == pytest.approx(
        float(expected), rel=0.02
    )  # the weights were bfloat16 at drawing
    assert image.null_log_likelihood < 0 and image.seconds > 0
    assert next(pipeline.generate([CAPTIONS[0]], 1, 0, OPTIONS, CAPTIONS[1])).null_log_likelihood is None
    assert (
        next(pipeline.generate([CAPTIONS[0]], 1, 0, SamplingOptions(cfg_scale=1.0))).null_log_likelihood
        is None
    )


def test_texts_may_be_endless(pipeline):
    def forever():
        while True:
            yield CAPTIONS[0]

    stream = pipeline.generate(forever(), 1, 0, OPTIONS, batch_size=2)
    assert len([next(stream) for _ in range(3)]) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_images": 0}, "num_images must be at least 1, not 0"),
        ({"num_images": -1}, "num_images must be at least 1, not -1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"seed": -1}, "seed must be 0 or more"),
        ({"text": ""}, "is empty"),
        ({"text": "  \n "}, "is empty"),
        ({"text": "qwz"}, "only characters"),
        ({"negative": CAPTIONS[1], "cfg_scale": 1.0}, "negative prompt"),
        ({"top_q": 3}, "unknown sampling option top_q"),
        ({"top_p": 3.0}, "top_p must lie in"),
    ],
)
def test_bad_arguments_are_named(pipeline, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipeline(**({"text": CAPTIONS[0]} | arguments))


def test_a_text_of_ten_thousand_characters_is_cut_with_a_note(pipeline):
    ids, note = pipeline.encode_text("红色的鞋" * 2500)
    assert ids.shape == (1, 12) and "longer than 12 tokens" in note and len(note) < 120
    assert pipeline.encode_text(CAPTIONS[0])[1] == ""


@pytest.fixture
def damaged(generator_dir, tmp_path):
    """A copy to break."""
    return shutil.copytree(generator_dir, tmp_path / "copy")


def test_a_checkpoint_of_the_wrong_kind_is_named(generator_dir):
    with pytest.raises(ValueError, match="'image_tokenizer', not 'generator'"):
        TextToImage.from_pretrained(generator_dir / "image_tokenizer")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("image_head.weight"), "lacks image_head.weight"),
        (lambda w: w.update(surprise=torch.zeros(1)), "unknown surprise"),
        (lambda w: w.update({"norm.weight": torch.zeros(3)}), "norm.weight has shape"),
    ],
)
def test_a_missing_or_an_extra_weight_is_named(damaged, change, message):
    weights = load_file(damaged / "model.safetensors")
    change(weights)
    save_file(weights, damaged / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        TextToImage.from_pretrained(damaged)


def test_tokenizers_that_do_not_belong_are_refused(damaged):
    config = json.loads((damaged / "config.json").read_text())
    config["model"]["codebook_size"] = 48
    (damaged / "config.json").write_text(json.dumps(config))

    def double(weights: dict[str, torch.Tensor]) -> None:
        for name in ("image_embed.weight", "image_head.weight"):
            weights[name] = weights[name].repeat(2, 1)

    replace_weights(damaged, double)
    with pytest.raises(ValueError, match=r"48 image codes.* 24"):
        TextToImage.from_pretrained(damaged)


def test_parts_of_another_checkpoint_are_refused(damaged):
    """They would draw, and nobody would know why so badly."""
    replace_weights(damaged / "image_tokenizer", lambda w: next(iter(w.values())).add_(0.1))
    identity = read_json(damaged / "image_tokenizer" / "config.json")["sha256"][:12]
    with pytest.raises(ValueError, match=f"image_tokenizer is {identity}: they do not belong together"):
        TextToImage.from_pretrained(damaged)


def test_a_vocabulary_of_another_size_is_refused(damaged):
    TextTokenizer.train(["x y z"] * 9, vocab_size=16, model_type="char").save(damaged)
    with pytest.raises(ValueError, match="text tokens, its text tokenizer has"):
        TextToImage.from_pretrained(damaged)


def test_weights_that_were_changed_on_the_way_are_refused(damaged):
    data = bytearray((damaged / "model.safetensors").read_bytes())
    data[-5] ^= 64
    (damaged / "model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=r"model\.safetensors is not the file that was saved"):
        TextToImage.from_pretrained(damaged)


def test_numbers_that_are_not_finite_do_not_become_images(damaged):
    replace_weights(damaged, lambda w: w["blocks.0.ffn.out.weight"].fill_(float("nan")))
    broken = TextToImage.from_pretrained(damaged, "cpu", FastOptions("torch", "float32"))
    with pytest.raises(ValueError, match="not finite"):
        broken(CAPTIONS[0])


def test_default_checkpoint_is_the_newest_run_then_what_ships(generator_dir, tmp_path):
    runs, ships = tmp_path / "runs", tmp_path / "ships"
    with pytest.raises(FileNotFoundError, match=r"python train_dalle\.py"):
        default_checkpoint(runs, ships)
    shutil.copytree(generator_dir, ships)
    assert default_checkpoint(runs, ships) == ships
    shutil.copytree(generator_dir, runs / "mine" / "step_00000007")
    (runs / "mine" / "latest").symlink_to("step_00000007")
    assert default_checkpoint(runs, ships) == runs / "mine" / "step_00000007"
