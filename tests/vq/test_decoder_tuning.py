"""Frozen codes, the adversary's start, its collapse: what `train_vqgan.py --preset vqgan --init` promises."""

import json

import pytest
import torch

import train_vqgan
from common import checkpoint
from common.distributed import batch_plan, start_world
from common.loop import LoopConfig
from train_vqgan import TokenizerTask
from vq.losses.adversary import AdversaryConfig
from vq.losses.discriminator import DiscriminatorConfig
from vq.losses.reconstruction import LossConfig
from vq.model import ImageTokenizer
from vq.options import Options
from vq.train_perceptual import main as train_perceptual

LOOP = [
    "--loop.global-batch-size",
    "4",
    "--loop.log-every",
    "1",
    "--loop.eval-every",
    "2",
    "--loop.save-every",
    "2",
]
LOOP += ["--val-images", "8", "--num-workers", "0", "--device", "cpu", "--loop.tensorboard", "False"]


@pytest.fixture(scope="module")
def base(tmp_path_factory, shards, small_flags):
    """A tokenizer of four steps."""
    run = tmp_path_factory.mktemp("runs") / "base"
    flags = ["--data", str(shards), "--loop.run-dir", str(run), "--loop.num-steps", "4", "--kmeans-step", "2"]
    train_vqgan.main([*flags, *small_flags, *LOOP])
    return run


@pytest.fixture(scope="module")
def perceptual(tmp_path_factory, shards):
    run = tmp_path_factory.mktemp("runs") / "perceptual"
    flags = [
        "--data",
        str(shards),
        "--loop.run-dir",
        str(run),
        "--image-size",
        "16",
        "--channels",
        "16",
        "16",
    ]
    flags += [
        "--loop.num-steps",
        "2",
        "--loop.global-batch-size",
        "8",
        "--num-workers",
        "0",
        "--device",
        "cpu",
    ]
    train_perceptual(flags)
    return run


def test_frozen_codes_stay_bit_for_bit_while_the_decoder_moves(tmp_path, shards, base, perceptual, capsys):
    run = tmp_path / "decoder"
    flags = ["--data", str(shards), "--preset", "vqgan", "--init", str(base), "--freeze-codes", "True"]
    flags += [
        "--loss.perceptual",
        str(perceptual),
        "--adversary.warmup-steps",
        "1",
        "--adversary.ramp-steps",
        "1",
    ]
    flags += ["--adversary.feature-weight", "0.5", "--adversary.discriminator.channels", "32"]
    flags += ["--adversary.discriminator.layers", "1", "--revive-every", "1", "--optim.warmup-steps", "0"]
    train_vqgan.main([*flags, "--loop.run-dir", str(run), "--loop.num-steps", "4", *LOOP])
    said = capsys.readouterr().out
    assert "perceptual distance: own features (label-trained" in said
    assert "its loss counts from step 1" in said and "the adversary's loss counts from here" in said

    before, after = ImageTokenizer.from_pretrained(base), ImageTokenizer.from_pretrained(run)
    assert after.codes_sha256 == before.codes_sha256 and after.sha256 != before.sha256
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    assert torch.equal(before.encode_ids(images), after.encode_ids(images))
    ids = before.encode_ids(images)
    assert not torch.equal(before.decode_ids(ids), after.decode_ids(ids))

    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    train = [r for r in rows if r["kind"] == "train"]
    assert "gen_loss" not in train[0] and "disc_loss" in train[0]
    assert {"gen_loss", "adaptive_weight", "feature_loss", "perceptual_loss"} <= set(train[-1])


def test_codes_sha256_follows_encoder_and_codebook_only(small_model):
    def identity(model):
        model.__dict__.pop("codes_sha256", None)
        return model.codes_sha256

    first = identity(small_model)
    with torch.no_grad():
        small_model.decoder.conv_out.weight.add_(1)
    assert identity(small_model) == first
    with torch.no_grad():
        small_model.quantizer.codebook.weight[0, 0] += 1
    assert identity(small_model) != first


def _task(shards, run, loss=None, adversary=None, **options):
    from data_tools.shards.index import ShardIndex
    from data_tools.shards.loader import DecodeImage, eval_batches

    world = start_world("cpu")
    loop = LoopConfig(run_dir=run, num_steps=10, global_batch_size=4, eval_every=2, save_every=2)
    options = Options(
        preset="vqgan",
        loss=loss or LossConfig(),
        adversary=adversary or AdversaryConfig(),
        loop=loop,
        **options,
    )
    index = ShardIndex.open(shards, "val")
    size = options.model_config.image_size

    def val(limit):
        return eval_batches(index, DecodeImage(size, first_caption=True), 4, limit)

    return TokenizerTask(options, world, batch_plan(4, 1), val), val


def test_a_collapse_goes_back_to_the_best_checkpoint_and_says_so(tmp_path, shards, base, capsys):
    judge = DiscriminatorConfig(channels=32, layers=1)
    config = AdversaryConfig(judge, warmup_steps=0, ramp_steps=0, rollback_share=0.2)
    task, val = _task(shards, tmp_path, adversary=config, init=str(base), val_images=8)
    batch = next(val(4))
    task.train_step(batch, 0)
    best = task.evaluate(2)["rec_loss"]
    with checkpoint.new_step_directory(tmp_path, 2) as directory:
        task.save(directory, 2, task.state())
        checkpoint.write_training_state(directory, {"task": task.state()})
    good = {n: t.clone() for n, t in task.model.state_dict().items()}

    for expected_scale in (0.5, 0.25):
        with torch.no_grad():
            task.model.decoder.conv_out.weight.mul_(30)
            task.ema.shadow["decoder.conv_out.weight"].mul_(30)
        task.evaluate(4)
        said = capsys.readouterr().out
        assert (
            "collapse" in said and f"back to the weights of step 2, adversary at {expected_scale:g}" in said
        )
        assert all(torch.equal(good[n], t) for n, t in task.model.state_dict().items())
    assert task.evaluate(6)["rec_loss"] == pytest.approx(best)


def test_a_dip_is_announced_and_left_alone(tmp_path, shards, base, capsys):
    config = AdversaryConfig(warmup_steps=0, ramp_steps=0, rollback_share=0.5)
    task, _ = _task(shards, tmp_path, adversary=config, init=str(base), val_images=8)
    value = task.evaluate(2)["rec_loss"]
    task._watch(value * 1.1, 4)
    assert "a dip of 10.0% since the adversary counts" in capsys.readouterr().out
    assert task.rollbacks == 0


def test_adversary_schedule():
    config = AdversaryConfig(start_step=10, warmup_steps=5, ramp_steps=4)
    assert [config.factor(s) for s in (0, 14)] == [0, 0]
    assert [config.factor(s) for s in range(15, 21)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1])
    assert config.factor(10**6) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--freeze-codes", "True"], "freeze_codes needs --init"),
        (["--adversary.weight", "0.7"], "no effect with preset vqvae"),
        (["--preset", "vqgan", "--loop.eval-every", "3", "--loop.save-every", "2"], "multiple of save_every"),
        (["--preset", "vqgan", "--model.image-size", "16"], "needs images of at least 24 pixels, not 16"),
        (["--init", "/nowhere/at/all"], "no checkpoint directory /nowhere/at/all"),
        (["--loss.perceptual-weight", "0"], "use perceptual none"),
        (["--loss.foreground-weight", "0.5"], "foreground_weight must be at least 1"),
    ],
)
def test_bad_options_end_in_one_sentence(flags, message, shards, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train_vqgan.main(["--data", str(shards), "--loop.run-dir", str(tmp_path / "run"), *flags])
    error = " ".join(capsys.readouterr().err.split())
    assert stop.value.code == 2 and message in error and "Traceback" not in error


def test_init_with_other_sizes_is_refused(base, shards, tmp_path, capsys):
    flags = ["--data", str(shards), "--loop.run-dir", str(tmp_path / "run"), "--init", str(base)]
    with pytest.raises(SystemExit):
        train_vqgan.main([*flags, "--model.codebook-size", "32"])
    assert "has codebook_size 16, not 32" in capsys.readouterr().err
