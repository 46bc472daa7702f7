"""Reconstructions among the training images: which, of what, and that a training sees them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_ranker_train import arguments, losses
from tiny_goods import draw

from common.checkpoint import read_weights
from common.image import to_tensor
from rankers import train
from rankers.train import main
from rankers.training.reconstructions import ReconstructionConfig, Reconstructions
from vq.autoencoder import FastConfig
from vq.model import ImageTokenizer, TokenizerConfig

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def write_tokenizer(folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    config = TokenizerConfig(image_size=32, codebook_size=16, fast=FastConfig(channels=(32, 32)))
    ImageTokenizer(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "t", 0)


def made_by(folder: Path, share: float = 0.5) -> Reconstructions:
    return Reconstructions(ReconstructionConfig(str(folder), share), CPU, "fp32")


def test_a_share_of_the_images_is_replaced_by_what_the_tokenizer_makes_of_them(tokenizer):
    images = torch.rand(400, 3, 32, 32) * 2 - 1
    found = made_by(tokenizer, 0.25).some_of(images, 5)
    reference = ImageTokenizer.from_pretrained(tokenizer)
    expected = reference.decode_ids(reference.encode_ids(images))
    replaced = (found != images).flatten(1).any(1)
    torch.testing.assert_close(found[replaced], expected[replaced], atol=1e-5, rtol=0)
    assert torch.equal(found[~replaced], images[~replaced])
    assert 65 < replaced.sum() < 135  # four deviations about 100
    again, other = (made_by(tokenizer, 0.25).some_of(images, seed) for seed in (5, 6))
    assert torch.equal(found, again) and not torch.equal(found, other)


def test_images_of_another_size_pass_through_that_of_the_tokenizer(tokenizer):
    made, resize = made_by(tokenizer, 1.0), torch.nn.functional.interpolate
    large = torch.rand(2, 3, 64, 64) * 2 - 1
    found = made.of(large)
    reference = ImageTokenizer.from_pretrained(tokenizer)
    small = resize(large, size=(32, 32), mode="bilinear", antialias=True)
    decoded = reference.decode_ids(reference.encode_ids(small))
    expected = resize(decoded, size=(64, 64), mode="bilinear", antialias=True)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    image = draw("杯子", "红色", 1, 32)
    (decoded,) = made.of_images([image])
    torch.testing.assert_close(to_tensor(decoded), made.of(to_tensor(image)[None])[0], atol=1 / 127, rtol=0)


@pytest.mark.slow
def test_a_training_sees_them_and_goes_on_bit_for_bit(shards, tokenizer, tmp_path, monkeypatch):
    seen = []
    forward = train.RankerTask.forward
    with monkeypatch.context() as watched:
        watched.setattr(
            train.RankerTask,
            "forward",
            lambda self, model, micro, labels: (
                seen.append(micro["image"].clone()),
                forward(self, model, micro, labels),
            )[1],
        )
        main(arguments(shards, tmp_path / "plain", 1, "--precision", "fp32"))
        plain = seen[-1]
        more = ("--reconstructions.tokenizer", str(tokenizer), "--precision", "fp32")
        metrics = main(arguments(shards, tmp_path / "whole", 4, *more))
    replaced = (seen[1] != plain).flatten(1).any(1)
    assert 0 < replaced.sum() < len(plain)
    made = made_by(tokenizer)
    torch.testing.assert_close(seen[1][replaced], made.of(plain[replaced]), atol=1e-4, rtol=0)
    assert 0 <= metrics["reconstructed/kind_accuracy"] <= 1

    code = (
        "import sys, os\nfrom rankers import train\nstep = train.RankerTask.train_step\n"
        "def killed(self, batch, number):\n"
        "    if number == 3: os.kill(os.getpid(), 9)\n"
        "    return step(self, batch, number)\n"
        "train.RankerTask.train_step = killed\ntrain.main(sys.argv[1:])\n"
    )
    cut = arguments(shards, tmp_path / "cut", 4, *more, "--loop.save-every", "2")
    done = subprocess.run(
        [sys.executable, "-c", code, *cut], cwd=ROOT, capture_output=True, env=os.environ.copy()
    )
    assert done.returncode == -9, done.stderr.decode()[-2000:]
    main(cut)
    whole, again = (read_weights((tmp_path / name / "latest").resolve()) for name in ("whole", "cut"))
    assert all(torch.equal(whole[n], again[n]) for n in whole)
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")


def test_a_run_does_not_go_on_with_other_reconstructions(shards, tokenizer, tmp_path, capsys):
    other = write_tokenizer(tmp_path / "other", 1)
    main(arguments(shards, tmp_path / "run", 1, "--reconstructions.tokenizer", str(tokenizer)))
    for more in (["--reconstructions.tokenizer", str(other)], []):
        with pytest.raises(SystemExit) as stopped:
            main(arguments(shards, tmp_path / "run", 2, *more))
        assert stopped.value.code == 2 and "holds a ranker with reconstructions" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--reconstructions.tokenizer", "none"], "none"),
        (["--reconstructions.share", "0.2"], "has no effect without"),
        (["--reconstructions.share", "0"], "must lie in (0, 1]"),
    ],
)
def test_bad_options_end_with_code_2(shards, tmp_path, more, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments(shards, tmp_path / "run", 1, *more))
    assert stopped.value.code == 2 and words in capsys.readouterr().err
