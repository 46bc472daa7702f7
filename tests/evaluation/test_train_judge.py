"""The judge of goods: it learns kinds and colours, resumes bit for bit, is its own kind of checkpoint."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_goods import COLORS, KINDS, draw

from common.checkpoint import read_config, read_weights
from common.config import from_mapping, read_mapping
from data_tools.index import ShardIndex
from evaluation.goods_judge import GoodsJudge, JudgeSizes
from evaluation.train_judge import DecodeFacts, Options, main, mean_cross_entropy, scan_words
from rankers import load_ranker
from rankers.pairs import AttributeConfig

ROOT = Path(__file__).parents[2]
SMALL = [
    "--model.channels", "8", "12", "16", "24", "--model.image-size", "32", "--model.feature-dim", "24",
    "--train-sizes", "32", "--loop.global-batch-size", "16", "--num-workers", "0", "--loop.tensorboard", "False",
    "--loop.log-every", "1", "--optim.warmup-steps", "2",
]  # fmt: skip


def arguments(shards: Path, run_dir: Path, steps: int, *more: str) -> list[str]:
    run = ["--data", str(shards), "--loop.run-dir", str(run_dir), "--loop.num-steps", str(steps)]
    return [*run, *SMALL, *more]


def losses(run_dir: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if row["kind"] == "train"}


def test_it_names_kinds_and_colours(judge_dir):
    judge = GoodsJudge.from_pretrained(judge_dir)
    pictures = [draw(kind, color, 77) for kind in KINDS for color in COLORS]
    features = judge.features(pictures)
    assert features.shape == (12, 24) and features.dtype == np.float32
    kinds, colors = judge.probabilities(features), judge.color_probabilities(features)
    np.testing.assert_allclose(kinds.sum(1), 1)
    named = [judge.words.kinds[i] for i in kinds.argmax(1)]
    assert np.mean([a == b for a, b in zip(named, [k for k in KINDS for _ in COLORS], strict=True)]) > 0.8
    named = [judge.words.colors[i] for i in colors.argmax(1)]
    assert np.mean([a == b for a, b in zip(named, list(COLORS) * 3, strict=True)]) > 0.8


def test_singles_equal_batches_and_any_mode_or_size_is_judged(judge_dir):
    judge = GoodsJudge.from_pretrained(judge_dir)
    pictures = [
        draw("杯子", "红色", 5),
        draw("鞋子", "蓝色", 6, 64),
        Image.new("L", (30, 90)),
        Image.new("RGBA", (9, 9)),
    ]
    singles = np.concatenate([judge.features([picture]) for picture in pictures])
    np.testing.assert_allclose(judge.features(pictures), singles, rtol=1e-4, atol=1e-5)


def test_the_checkpoint_tells_what_it_is_and_how_right(judge_dir, shards):
    config = read_config(judge_dir, "judge")
    assert config["vocabulary"]["names"]["马克杯"] == ["杯子"] and config["vocabulary"]["kinds"] == sorted(
        KINDS
    )
    figures = config["validation"]
    assert (
        figures["kind_low"] < figures["kind_accuracy"] < figures["kind_high"] or figures["kind_accuracy"] == 1
    )
    assert figures["kind_count"] == 24 and figures["color_accuracy"] > 0.8
    assert GoodsJudge.from_pretrained(judge_dir).identity == config["sha256"]
    with pytest.raises(ValueError, match="kind 'judge', not 'ranker'"):
        load_ranker(judge_dir)


def test_titles_are_read_by_the_longest_word(judge_dir):
    words = GoodsJudge.from_pretrained(judge_dir).words
    assert words.kinds_meant("一个红色的马克杯") == ("马克杯", "一个红色的\0", ["杯子"])
    assert words.kinds_meant("一张桌子") == ("", "一张桌子", [])


def test_a_run_cut_short_goes_on_bit_for_bit(shards, tmp_path):
    more = ("--loop.micro-batch-size", "8", "--train-sizes", "32", "40")
    main(arguments(shards, tmp_path / "whole", 6, *more))
    code = (
        "import sys, os, torch\ntorch.set_num_threads(int(sys.argv.pop(1)))\n"
        "from evaluation import train_judge as t\nstep = t.JudgeTask.train_step\n"
        "def killed(self, batch, number):\n"
        "    if number == 5: os.kill(os.getpid(), 9)\n"
        "    return step(self, batch, number)\n"
        "t.JudgeTask.train_step = killed\nt.main(sys.argv[1:])\n"
    )
    cut = arguments(shards, tmp_path / "cut", 6, *more, "--loop.save-every", "3")
    threads = str(torch.get_num_threads())  # sums are rounded by how they are shared out
    done = subprocess.run([sys.executable, "-c", code, threads, *cut], cwd=ROOT, capture_output=True)
    assert done.returncode == -9, done.stderr.decode()[-2000:]
    main(cut)
    whole, again = (read_weights((tmp_path / name / "latest").resolve()) for name in ("whole", "cut"))
    assert all(torch.equal(whole[n], again[n]) for n in whole)
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut") and len(losses(tmp_path / "cut")) == 6


def test_a_run_with_another_network_is_not_gone_on_with(shards, tmp_path, capsys):
    main(arguments(shards, tmp_path / "run", 1))
    with pytest.raises(SystemExit) as caught:
        main(arguments(shards, tmp_path / "run", 3, "--model.feature-dim", "16"))
    assert caught.value.code == 2 and "another feature_dim" in capsys.readouterr().err


def test_unknown_colours_and_kinds_teach_nothing():
    logits = torch.randn(4, 3, requires_grad=True)
    target = torch.tensor([-1, 2, -1, 0])
    loss = mean_cross_entropy(logits, target, 0.0)
    rows = torch.tensor([1, 3])
    assert torch.equal(loss, torch.nn.functional.cross_entropy(logits[rows], target[rows]))
    nothing = mean_cross_entropy(logits, torch.full((4,), -1), 0.1)
    nothing.backward()
    assert nothing.item() == 0 and not logits.grad.any()


def test_facts_are_read_as_numbers_of_the_vocabulary(shards):
    index = ShardIndex.open(shards, "val")
    words = scan_words(index, AttributeConfig(), "item_zh")
    row = DecodeFacts(32, words, AttributeConfig())(index, 0, np.random.default_rng(0))
    meta = json.loads(index.read(0, ("json",))["json"])
    assert (
        words.kinds[int(row["kind"])] == meta["label_zh"]
        and words.colors[int(row["color"])] == meta["color_zh"]
    )
    assert row["image"].shape == (3, 32, 32) and -1 <= row["image"].min() < row["image"].max() <= 1
    blind = scan_words(index, AttributeConfig(color_field=""), "")
    assert blind.colors == () and "马克杯" not in blind.names


def test_training_sizes_grow():
    options = from_mapping(Options, read_mapping(ROOT / "configs/goods_128/judge.yaml"))
    assert options.model == JudgeSizes((40, 80, 160, 320), (1, 1, 1, 1), 256, 112)
    assert options.train_sizes[0] < options.train_sizes[-1] < options.model.image_size


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--data", "none"], "no data folder none"),
        (["--attributes.label-field", ""], "label-field"),
        (["--attributes.label-field", "shop"], "has 0 values"),
        (["--train-sizes", "8"], "at least 32"),
        (["--model.channels", "8", "8"], "four numbers"),
        (["--degrade", "1.5"], "degrade must lie in [0, 1]"),
        (["--ema-decay", "1"], "ema_decay"),
        (["--modle.image-size", "32"], "Unrecognized"),
    ],
)
def test_bad_input_ends_with_code_2(shards, tmp_path, more, words, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments(shards, tmp_path / "run", 2, *more))
    assert caught.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_follow_one(shards, tmp_path):
    """Batch statistics are of 8 pictures in both; dropout draws differ between processes."""
    more = ("--loop.micro-batch-size", "8", "--precision", "fp32", "--loop.eval-every", "0")
    main(arguments(shards, tmp_path / "one", 2, *more))
    program = str(Path(sys.executable).parent / "torchrun")
    launch = [program, "--nproc_per_node", "2", "--master_port", "29731", "-m", "evaluation.train_judge"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, *arguments(shards, tmp_path / "two", 2, *more)],
        cwd=ROOT,
        capture_output=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    assert losses(tmp_path / "two")[1] == pytest.approx(losses(tmp_path / "one")[1], rel=0.05)
