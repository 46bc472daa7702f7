"""The whole command on a tiny data set: it learns, resumes bit for bit, fine-tunes, and refuses what does not fit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_goods import draw

from common.checkpoint import read_weights
from data_tools.shard import ShardConfig, shard
from rankers import load_ranker
from rankers.train import Options, RankerTask, main

ROOT = Path(__file__).parents[2]
SMALL = [
    "--model.image-size", "32", "--model.embed-dim", "32", "--train-sizes", "32", "--loop.global-batch-size", "16",
    "--model.text.width", "32", "--model.text.layers", "1", "--model.text.heads", "2", "--num-workers", "0",
    "--model.text.max-text-len", "16", "--loop.tensorboard", "False", "--loop.log-every", "1",
    "--optim.warmup-steps", "2",
]  # fmt: skip


def arguments(shards: Path, run_dir: Path, steps: int, *more: str) -> list[str]:
    return [
        "--data",
        str(shards),
        "--loop.run-dir",
        str(run_dir),
        "--loop.num-steps",
        str(steps),
        *SMALL,
        *more,
    ]


def losses(run_dir: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if row["kind"] == "train"}


def test_it_learns_colours_and_kinds(shards, tmp_path):
    metrics = main(arguments(shards, tmp_path / "run", 60, "--ema-decay", "0.9", "--optim.lr", "3e-3"))
    trace = losses(tmp_path / "run")
    assert trace[60] < 0.6 * trace[1]
    assert metrics["kind_accuracy"] >= 0.8 and metrics["recall@10"] > 0.6
    ranker = load_ranker(tmp_path / "run")
    images = [draw(kind, "红色", 99 + i) for i, kind in enumerate(("鞋子", "杯子", "帽子"))]
    assert int(ranker.score("杯子", images).argmax()) == 1
    assert ranker.calibration.num_images == 24
    assert {"config.json", "model.safetensors", "calibration.json", "towers"} <= {
        p.name for p in (tmp_path / "run/latest").iterdir()
    }
    assert (tmp_path / "run/samples/best_matches_00000060.png").is_file()


def test_a_run_cut_short_goes_on_bit_for_bit(shards, tmp_path):
    more = ("--loop.micro-batch-size", "8", "--train-sizes", "32", "48")
    main(arguments(shards, tmp_path / "whole", 6, *more))
    code = (
        "import sys, os\nfrom rankers import train\nstep = train.RankerTask.train_step\n"
        "def killed(self, batch, number):\n"
        "    if number == 5: os.kill(os.getpid(), 9)\n"
        "    return step(self, batch, number)\n"
        "train.RankerTask.train_step = killed\ntrain.main(sys.argv[1:])\n"
    )
    cut = arguments(shards, tmp_path / "cut", 6, *more, "--loop.save-every", "3")
    done = subprocess.run([sys.executable, "-c", code, *cut], cwd=ROOT, capture_output=True)
    assert done.returncode == -9, done.stderr.decode()[-2000:]
    main(cut)
    whole, again = (read_weights((tmp_path / name / "latest").resolve()) for name in ("whole", "cut"))
    assert all(torch.equal(whole[n], again[n]) for n in whole)
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")


def test_training_sizes_grow(shards, tmp_path):
    task = RankerTask.__new__(RankerTask)
    task.options = Options(train_sizes=(64, 80, 96, 112))
    steps = task.options.loop.num_steps
    assert [task.train_size(s) for s in (0, steps // 4, steps // 2, steps - 1)] == [64, 80, 96, 112]


def test_a_run_with_other_options_is_not_gone_on_with(shards, tmp_path, capsys):
    main(arguments(shards, tmp_path / "run", 1))
    for more, words in (
        (["--model.embed-dim", "16"], "embed_dim 32, not 16"),
        (["--model.text.width", "48"], "towers"),
        (["--ema-decay", "0"], "--ema-decay"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(arguments(shards, tmp_path / "run", 3, *more))
        assert caught.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--data", "none"], "no data folder none"),
        (["--vocab", "none.txt"], "no BERT vocabulary none.txt"),
        (["--model.image-tower", "vgg"], "unknown image tower 'vgg'"),
        (["--model.image-tower", "vit-ti-16", "--train-sizes", "32", "48"], "takes any size"),
        (["--init", "none"], "brings"),
        (["--train-sizes", "8"], "at least 32"),
        (["--loop.global-batch-size", "15", "--loop.micro-batch-size", "4"], "micro_batch_size"),
        (["--attributes.label-feild", "x"], "Unrecognized"),
    ],
)
def test_bad_input_ends_with_code_2(shards, tmp_path, more, words, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments(shards, tmp_path / "run", 2, *more))
    assert caught.value.code == 2 and words in capsys.readouterr().err


LAUNCHERS = {
    "torchrun": ["torchrun", "--nproc_per_node", "2", "--master_port", "29617", "-m"],
    "deepspeed": ["deepspeed", "--num_gpus", "2", "--master_port", "29618", "--module"],
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("deepspeed", marks=pytest.mark.slow)])
def test_two_processes_follow_the_curve_of_one(shards, tmp_path, launcher):
    """Two processes of two micro-batches against four micro-batches: batch statistics are of 4 images in both."""
    more = ("--loop.micro-batch-size", "4", "--model.text.dropout", "0", "--precision", "fp32")
    main(arguments(shards, tmp_path / "one", 3, *more))
    program, *rest = LAUNCHERS[launcher]
    command = [str(Path(sys.executable).parent / program), *rest, "rankers.train"]
    done = subprocess.run(
        [*command, *arguments(shards, tmp_path / "two", 3, *more)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert one.keys() == two.keys()
    assert two[1] == pytest.approx(one[1], rel=1e-5)
    for step, loss in one.items():  # rounding, through statistics of 4 images and Adam's first steps
        assert two[step] == pytest.approx(loss, rel=0.01)
    assert load_ranker(tmp_path / "two").score("杯子", [draw("杯子", "红色", 1)]).isfinite().all()


def test_a_ranker_of_ours_is_fine_tuned(shards, ranker_dir, tmp_path):
    """From its weights, with its vocabulary and sizes."""
    run = tmp_path / "run"
    sizes = [
        "--train-sizes",
        "32",
        "--loop.num-steps",
        "2",
        "--loop.global-batch-size",
        "8",
        "--optim.lr",
        "1e-6",
    ]
    more = ["--num-workers", "0", "--loop.tensorboard", "False", "--ema-decay", "0"]
    main(["--data", str(shards), "--init", str(ranker_dir), "--loop.run-dir", str(run), *sizes, *more])
    images = [draw("杯子", "红色", i) for i in range(3)]
    before, after = read_weights(ranker_dir), read_weights((run / "latest").resolve())
    assert before.keys() == after.keys()
    assert all((before[n] - after[n]).abs().max() < 1e-4 for n in before if n.endswith("weight"))
    assert any(not torch.equal(before[n], after[n]) for n in before if n.endswith("weight"))
    assert load_ranker(run).score("红色的杯子", images).isfinite().all()
    assert (ranker_dir / "towers/vocab.txt").read_text() == (run / "latest/towers/vocab.txt").read_text()


def test_a_chinese_clip_is_fine_tuned(shards, tmp_path, chinese_clip):
    run = tmp_path / "run"
    arguments = [
        "--data",
        str(shards),
        "--init",
        str(chinese_clip),
        "--train-sizes",
        "32",
        "--num-workers",
        "0",
    ]
    arguments += ["--loop.run-dir", str(run), "--loop.num-steps", "3", "--loop.global-batch-size", "8"]
    main([*arguments, "--loop.tensorboard", "False", "--optim.lr", "1e-4", "--ema-decay", "0"])
    images = [draw("杯子", "红色", i) for i in range(3)]
    before, after = (load_ranker(name).score("红色的杯子", images) for name in (chinese_clip, run))
    assert 1e-6 < (before - after).abs().max() < 0.5


def test_one_caption_for_all_is_refused_before_the_first_step(tmp_path, capsys):
    """The calibration at the first save would fail, and with it the run."""
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(30):
        draw("杯子", "红色", i).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("一个杯子", "utf-8")
    shard(ShardConfig(folder, str(tmp_path / "sh"), val_share=0.2, workers=0))
    with pytest.raises(SystemExit) as stopped:
        main(arguments(tmp_path / "sh", tmp_path / "run", 2))
    said = capsys.readouterr()
    assert stopped.value.code == 2 and "no two different captions: nothing to calibrate on" in said.err
    assert not (tmp_path / "run").exists()
