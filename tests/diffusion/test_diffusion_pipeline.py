import numpy as np
import pytest
import torch
from PIL import Image
from tiny_base import tiny_base

from common.outputs.out_directory import Request
from diffusion.base import save_base
from diffusion.objective import sample_generator
from diffusion.pipeline import DiffusionToImage, Identity, Prompting, Start
from diffusion.sampling import SamplingOptions


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    save_base(tiny_base(path / "vocabulary", prediction="v_prediction", zero_snr=True), path)
    return path


@pytest.fixture(scope="module")
def pipeline(folder):
    return DiffusionToImage.from_pretrained(folder, "cpu", precision="fp32")


def as_bytes(images) -> list[bytes]:
    return [image.tobytes() for image in images]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_image_i_of_a_seed_has_the_same_bytes_in_any_batch(precision, folder):
    pipeline = DiffusionToImage.from_pretrained(folder, "cpu", precision=precision)
    options = {"seed": 3, "num_steps": 3, "cfg_scale": 3.0}
    reference = as_bytes(pipeline("红色的鞋", 8, batch_size=8, **options))
    assert len(set(reference)) == 8
    for batch_size in (1, 3):
        assert as_bytes(pipeline("红色的鞋", 8, batch_size=batch_size, **options)) == reference
    mixed = [Request("红色的鞋", 5), Request("苹果", 5), Request("红色的鞋", 2)]
    found = list(pipeline.generate(mixed, 3, SamplingOptions(3, 3.0), batch_size=3))
    assert as_bytes([found[0].image, found[2].image]) == [reference[5], reference[2]]
    assert found[1].image.tobytes() not in reference


def test_images_are_those_of_plain_diffusers(pipeline, folder):
    from diffusers import StableDiffusionPipeline

    theirs = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    theirs.scheduler = __import__("diffusers").DPMSolverMultistepScheduler.from_config(
        theirs.scheduler.config
    )
    noise = torch.randn((4, 16, 16), generator=sample_generator("0/0"))[None]
    image = theirs(
        "红色的鞋", num_inference_steps=4, guidance_scale=4.0, latents=noise, output_type="np"
    ).images[0]
    (ours,) = pipeline("红色的鞋", 1, num_steps=4, cfg_scale=4.0)
    assert np.abs(np.asarray(ours) / 255 - image).max() < 2e-3


def test_seed_text_negative_and_style_matter(pipeline):
    plain = pipeline("红色的鞋", 1, num_steps=2)[0].tobytes()
    assert pipeline("红色的鞋", 1, num_steps=2)[0].tobytes() == plain
    for change in ({"seed": 1}, {"negative": "黑"}, {"style": "金"}, {"num_steps": 3}, {"cfg_scale": 2.0}):
        assert pipeline("红色的鞋", 1, **{"num_steps": 2, **change})[0].tobytes() != plain, change
    assert pipeline("苹果", 1, num_steps=2)[0].tobytes() != plain


def test_chinese_punctuation_becomes_ascii_unless_it_is_to_be_kept(pipeline):
    prompting = Prompting(style="卡通风格，暖色调", negative="模糊！")
    assert prompting.full_text("狮子。") == "狮子., 卡通风格,暖色调"
    assert prompting.full_negative == "模糊!"
    assert Prompting(style="暖色调，", punctuation="keep").full_text("狮子") == "狮子, 暖色调，"
    first = pipeline("红色，的鞋", 1, num_steps=2)[0]
    assert first.tobytes() == pipeline("红色,的鞋", 1, num_steps=2)[0].tobytes()


def test_an_image_as_a_start(pipeline):
    """Strength 1 starts from pure noise at zero terminal SNR, so the image is forgotten; less keeps some of it."""
    image = Image.new("RGB", (80, 64), (200, 40, 40))

    def sample(start: Start | None, batch_size: int = 2) -> np.ndarray:
        images = pipeline("红色的鞋", 2, start=start, num_steps=4, cfg_scale=2.0, batch_size=batch_size)
        return np.stack([np.asarray(x, dtype=int) for x in images])

    plain = sample(None)
    assert np.abs(sample(Start(image, 1.0)) - plain).max() <= 2
    half = sample(Start(image, 0.5))
    assert np.abs(half - plain).mean() > 5
    assert np.array_equal(half, sample(Start(image, 0.5), batch_size=1))
    with pytest.raises(ValueError, match=r"strength must lie in \(0, 1\]"):
        Start(image, 0.0)


def test_size_of_images(pipeline):
    assert pipeline("红色的鞋", 1, size=32, num_steps=1)[0].size == (32, 32)
    with pytest.raises(ValueError, match="size must be a multiple of 8 pixels for this base, not 30"):
        pipeline("红色的鞋", 1, size=30)


def test_bad_input_ends_in_a_sentence(pipeline):
    for bad, sentence in (
        ({"num_images": 0}, "num_images must be at least 1"),
        ({"seed": -1}, "seed must be 0 or more"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"topk": 3}, "unknown sampling option topk"),
        ({"negative": "黑", "cfg_scale": 1.0}, "works through guidance"),
        ({"scheduler": "pndm"}, "pndm cannot sample"),
    ):
        with pytest.raises(ValueError, match=sentence):
            pipeline("红色的鞋", **bad)


def test_what_the_base_cannot_read_is_said(pipeline):
    assert pipeline.note("红色的鞋") == ""
    assert "has 20 pieces, the base reads 10" in pipeline.note("红" * 20)
    with pytest.raises(ValueError, match="knows nothing of the text '猫猫'"):
        pipeline.note("猫猫")


def test_weights_that_are_not_finite_are_named(tmp_path):
    base = tiny_base(tmp_path)
    with torch.no_grad():
        base.unet.conv_out.bias.fill_(float("nan"))
    broken = DiffusionToImage(base, Identity("x"), "cpu", "fp32")
    with pytest.raises(ValueError, match="not finite"):
        broken("红色的鞋", 1, num_steps=1)
