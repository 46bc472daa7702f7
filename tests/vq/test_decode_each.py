"""The same pixels in any batch and on any number of threads, with the weights that ship."""

from pathlib import Path

import pytest
import torch

from vq.decode_each import CHUNK, _padded, decode_each
from vq.model import ImageTokenizer

SHIPPED = Path(__file__).parents[2] / "pretrained/goods-128/generator/image_tokenizer"


@pytest.fixture(scope="module")
def tokenizer() -> ImageTokenizer:
    return ImageTokenizer.from_pretrained(SHIPPED)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_pixels_depend_on_neither_batch_nor_threads(tokenizer, threads):
    ids = torch.randint(
        tokenizer.codebook_size, (8, tokenizer.grid_size**2), generator=torch.Generator().manual_seed(0)
    )
    threads(1)
    expected = decode_each(tokenizer, ids)
    assert expected.shape == (8, 3, tokenizer.image_size, tokenizer.image_size)
    for number in (1, 2, 3):
        threads(number)
        for batch in (8, 3, 1, 5):
            found = torch.cat([decode_each(tokenizer, part) for part in ids.split(batch)])
            assert torch.equal(found, expected), (number, batch)
            assert torch.get_num_threads() == number
    assert not torch.equal(expected[0], expected[1])


def test_an_accelerator_always_gets_as_many(tokenizer):
    seen = []

    class Counting:
        def decode_ids(self, ids: torch.Tensor) -> torch.Tensor:
            seen.append(len(ids))
            return ids.float()

    ids = torch.arange(11)[:, None]
    found = torch.cat([_padded(Counting(), part) for part in ids.split(CHUNK)])
    assert seen == [CHUNK, CHUNK] and torch.equal(found, ids.float())
