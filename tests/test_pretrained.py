"""The models that ship: small, described, and drawing from a fresh clone."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import generate
import rerank
from common.checkpoint import read_config
from dalle.pipeline import TextToImage
from rankers import default_ranker

ROOT = Path(__file__).parent.parent
SHIPPED = ROOT / "pretrained" / "goods-128"
LARGE = ROOT / "pretrained" / "goods-256"


@pytest.mark.parametrize(("folder", "most"), [(SHIPPED, 32), (SHIPPED.parent, 64)])
def test_all_of_it_is_small(folder, most):
    assert sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) <= most * 2**20


@pytest.mark.parametrize(
    ("folder", "kind"),
    [
        (SHIPPED / "generator", "generator"),
        (SHIPPED / "generator/image_tokenizer", "image_tokenizer"),
        (SHIPPED / "ranker", "ranker"),
        (LARGE / "generator", "generator"),
        (LARGE / "generator/image_tokenizer", "image_tokenizer"),
    ],
)
def test_checkpoints_are_what_they_say(folder, kind):
    assert read_config(folder, kind)["step"] > 0
    assert not (folder / "training_state").exists()


@pytest.mark.parametrize("shipped", [SHIPPED, LARGE])
def test_the_card_names_data_licences_recipe_and_figures(shipped):
    card = (shipped / "generator" / "README.md").read_text("utf-8")
    for word in ("CC0", "MIT", "train_dalle.py --config configs/goods_128/", "image_bits", "samples.png"):
        assert word in card, word
    assert Image.open(shipped / "generator" / "samples.png").width > 500


def test_the_large_decoder_shows_the_same_images_at_twice_the_side():
    small, large = (TextToImage.from_pretrained(p / "generator", "cpu") for p in (SHIPPED, LARGE))
    (first,), (second,) = (list(p.generate(["一条蓝色牛仔裤"], seed=3)) for p in (small, large))
    assert torch.equal(first.ids, second.ids)
    assert first.image.size == (128, 128) and second.image.size == (256, 256)
    reduced = np.asarray(second.image.reduce(2), np.float32)
    assert np.abs(reduced - np.asarray(first.image, np.float32)).mean() < 12  # of 255 levels


def test_a_fresh_clone_draws_and_ranks_goods(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # nothing was trained here
    (tmp_path / "pretrained").symlink_to(SHIPPED.parent)
    generate.main(["一条蓝色牛仔裤", "2", "out", "--device", "cpu"])
    ranking = rerank.main(["out", "--device", "cpu"])
    assert ranking
    rows = Image.open(tmp_path / "out" / "rank00.png").convert("RGB").resize((1, 1)).getpixel((0, 0))
    assert Image.open(tmp_path / "out" / "rank00.png").size == (128, 128)
    assert rows[2] > rows[0], "blue"


def test_its_images_are_ranked_by_the_ranker_beside_it(tmp_path, monkeypatch):
    """Also where another was trained here, of other goods."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("common.run_dir.newest_run", lambda kind, runs=None: Path(f"runs/a_newer_{kind}"))
    for shipped in (SHIPPED, LARGE):
        made = read_config(shipped / "generator", "generator")["sha256"]
        assert default_ranker(made) == SHIPPED / "ranker"
    assert default_ranker() == default_ranker("of another") == Path("runs/a_newer_ranker")


STARTING = """
import sys
import generate
generate.main([sys.argv[1], "2", "out", "--device", "cpu", "--rank"])
slow = {"transformers", "open_clip", "timm", "torchvision", "diffusers", "scipy", "sympy", "onnxruntime", "matplotlib"}
print("IMPORTED", *sorted(slow & set(sys.modules)))
"""


def test_nothing_slow_is_imported_to_generate_and_rank(tmp_path):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", STARTING, "一条蓝色牛仔裤"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].split() == ["IMPORTED"]
    assert (tmp_path / "out" / "ranked.png").is_file()
