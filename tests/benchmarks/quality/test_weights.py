"""Agreement of weights: float32 agrees with itself, and what differs is told."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "dalle"))
from small_checkpoint import CAPTIONS, write_generator

from benchmarks.quality import weights as weights_quality
from benchmarks.quality.weights import main, psnr, tokens_after
from dalle.engines import FastOptions
from dalle.pipeline import TextToImage
from dalle.sampling import SamplingOptions


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_generator(tmp_path_factory.mktemp("weights") / "small")


def test_an_engine_that_reads_its_own_tokens_chooses_them(small):
    pipeline = TextToImage.from_pretrained(small, "cpu", FastOptions("torch", "float32"))
    for options in (SamplingOptions(), SamplingOptions(cfg_scale=1.0)):
        images = list(pipeline.generate(CAPTIONS[:2], 2, 3, options))
        found = tokens_after(pipeline.generator, pipeline, images, options)
        assert found.tolist() == [p.ids.tolist() for p in images]


def test_the_table(small, monkeypatch):
    monkeypatch.setattr(weights_quality, "PROMPTS", tuple(CAPTIONS))
    flags = ["--checkpoint", str(small), "--ranker", "none", "--prompts", "2", "--num-images", "2"]
    found = main([*flags, "--contenders", "torch_bfloat16"])
    row = found["torch_bfloat16"]
    assert 0.5 < row["agreement"] <= 1 and 0 < row["psnr"] <= 60 and 0 <= row["same_images"] <= 1


def test_psnr_by_hand():
    grey, lighter = (Image.fromarray(np.full((4, 4, 3), level, np.uint8)) for level in (100, 110))
    assert psnr(grey, lighter) == pytest.approx(20 * np.log10(25.5)) and psnr(grey, grey) == 60
