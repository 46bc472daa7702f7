import numpy as np
import pytest
import torch
from PIL import Image
from small_checkpoint import CAPTIONS

from common.image import to_tensor
from dalle import inpaint
from dalle.sampling import SamplingOptions, noise_generator

OPTIONS = SamplingOptions(cfg_scale=2.0)


@pytest.fixture(scope="module")
def image() -> Image.Image:
    """50 x 40 pixels of noise."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))


def draw(pipeline, source, num_images=3, batch_size=8) -> torch.Tensor:
    images = pipeline.generate([CAPTIONS[0]], num_images, 2, OPTIONS, batch_size=batch_size, source=source)
    return torch.stack([p.ids for p in images]).view(num_images, 10, 10)


def test_priming_keeps_the_upper_rows(pipeline, image):
    source = inpaint.prime(pipeline.image_tokenizer, image, 4)
    ids, original = draw(pipeline, source), source.ids.view(10, 10)
    assert torch.equal(ids[:, :4], original[:4].expand(3, -1, -1))
    assert len({tuple(row) for row in ids[:, 4:].flatten(1).tolist()}) == 3
    cropped = image.crop((5, 0, 45, 40))
    assert torch.equal(source.ids, pipeline.image_tokenizer.encode_ids(to_tensor(cropped)[None])[0])
    assert int(inpaint.prime(pipeline.image_tokenizer, image).keep.sum()) == 50


def test_inpainting_redraws_what_the_mask_touches(pipeline, image):
    mask = np.zeros((40, 50), dtype=np.uint8)
    mask[9:14, 5 + 17 : 5 + 20] = 255  # after the crop: token rows 2 and 3, column 4
    source = inpaint.inpaint(pipeline.image_tokenizer, image, Image.fromarray(mask))
    assert (~source.keep).nonzero().flatten().tolist() == [24, 34]
    ids = draw(pipeline, source).flatten(1)
    assert torch.equal(ids[:, source.keep], source.ids[source.keep].expand(3, -1))


@pytest.mark.parametrize("strength", [0.01, 0.3, 1.0])
def test_variations_redraw_their_share_in_patches(pipeline, image, strength):
    source = inpaint.vary(pipeline.image_tokenizer, image, strength)
    canvas = source.canvas([noise_generator(2, i) for i in range(3)], torch.device("cpu"))
    assert (~canvas.keep).sum(1).tolist() == [round(100 * strength)] * 3
    ids = draw(pipeline, source).flatten(1)
    assert torch.equal(ids[canvas.keep], source.ids.expand(3, -1)[canvas.keep])
    if strength == 0.3:
        redrawn = (~canvas.keep).view(3, 10, 10)
        neighbours = (redrawn[:, :, 1:] & redrawn[:, :, :-1]).sum() / redrawn[:, :, 1:].sum()
        assert neighbours > 0.6  # scattered cells would have 0.3
        assert not torch.equal(redrawn[0], redrawn[1])


def test_sources_do_not_depend_on_the_batch(pipeline, image):
    for source in (
        inpaint.vary(pipeline.image_tokenizer, image, 0.5),
        inpaint.prime(pipeline.image_tokenizer, image, 3),
    ):
        assert torch.equal(draw(pipeline, source), draw(pipeline, source, batch_size=1))


def test_a_source_that_keeps_everything_still_ends(pipeline, image):
    ids = inpaint.encode_image(pipeline.image_tokenizer, image)
    source = inpaint.Source(ids, torch.ones(100, dtype=torch.bool))
    assert torch.equal(draw(pipeline, source, 1).flatten(), ids)


def test_bad_sources_are_named(pipeline, image):
    tokenizer = pipeline.image_tokenizer
    for rows in (0, 10, -1):
        with pytest.raises(ValueError, match=f"between 1 and 9 .* not {rows}"):
            inpaint.prime(tokenizer, image, rows)
    for strength in (0, 1.5):
        with pytest.raises(ValueError, match="strength"):
            inpaint.vary(tokenizer, image, strength)
    with pytest.raises(ValueError, match="all black"):
        inpaint.inpaint(tokenizer, image, Image.new("L", (50, 40)))
