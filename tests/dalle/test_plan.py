"""Costs by hand, warnings, and the two commands around training: plan and train_tokenizer."""

import pytest
import torch
from tiny_data import write_image_shards
from tiny_generator import tiny_config
from torch.utils.flop_counter import FlopCounterMode

from common.engines.deepspeed import DeepSpeedConfig
from common.loop import LoopConfig
from dalle import plan, train_tokenizer
from dalle.model import Dalle, ModelOptions
from dalle.plan import (
    PlanOptions,
    activation_bytes,
    exchange_bytes,
    fitting_size,
    make_plan,
    state_bytes,
    train_flops,
)
from dalle.text_tokenizer import TextTokenizer

GIVEN = (
    "--num-samples",
    "8896",
    "--codebook-size",
    "1024",
    "--grid-size",
    "16",
    "--text-vocab-size",
    "21128",
)


@pytest.mark.parametrize(
    "options", [{}, {"num_kv_heads": 2}, {"text_embed_dim": 32}, {"tie_text_head": False}]
)
def test_operations_are_those_that_pytorch_counts(options):
    """Its counter sees whole squares of attention where causality needs a half, and text rows without targets."""
    config = tiny_config(**options)
    model = Dalle(config)
    text, image = torch.ones(1, 8, dtype=torch.long), torch.zeros(1, 16, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model.eval()
        with torch.no_grad():
            model(text, image)
    length = 24
    attention = 2 * config.num_layers * length * 2 * config.dim * (length - (length + 1) / 2)
    counted = counter.get_total_flops() - attention
    if config.text_embed_dim != config.dim:
        counted += 2 * config.text_embed_dim * config.dim  # text_out leaves the last text row out
    assert train_flops(config, 8) / 3 == pytest.approx(counted, rel=1e-6)


def test_memory_of_the_weights_by_hand():
    plain = PlanOptions(ema_decay=0.0)
    assert state_bytes(1000, plain, 1) == 1000 * (16 + 2 + 4)
    assert state_bytes(1000, PlanOptions(), 1) - state_bytes(1000, plain, 1) == 4000
    per_stage = [
        state_bytes(
            1000, PlanOptions(ema_decay=0.0, engine="deepspeed", deepspeed=DeepSpeedConfig(zero_stage=s)), 8
        )
        for s in (0, 1, 2, 3)
    ]
    assert per_stage == [22000, 22000 - 8000 + 1000, 22000 - 12000 + 1500, 22000 - 16000 + 2000]


def test_checkpointing_saves_memory():
    sizes = {"text_vocab_size": 100, "pad_id": 0, "max_text_len": 32, "codebook_size": 1024, "grid_size": 16}
    kept = activation_bytes(ModelOptions(size="110m").config(**sizes), 32)
    recomputed = activation_bytes(ModelOptions(size="110m", gradient_checkpointing=True).config(**sizes), 32)
    assert recomputed < 0.3 * kept


def test_measured_activations_are_near_the_estimate():
    """The bytes that autograd keeps for one sample, counted through its hooks."""
    config = ModelOptions(dim=64, num_layers=4, num_heads=4).config(100, 0, 16, 64, 8)
    model, kept = Dalle(config).train(), {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    text, image = torch.ones(1, 16, dtype=torch.long), torch.zeros(1, 64, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        output = model(text, image)
        torch.nn.functional.cross_entropy(output.image.flatten(0, 1), image.flatten())
    measured = sum(size for pointer, size in kept.items() if pointer not in weights)
    assert 0.5 < activation_bytes(config, 16, precision_bytes=4) / measured < 1.5


@pytest.mark.parametrize(
    "tokens, epochs, size",
    [(1e6, 1, None), (2.3e6, 36, None), (60e6, 1, "3m"), (10e6, 16, "8m"), (1e12, 1, "3b")],
)
def test_the_size_that_data_feed(tokens, epochs, size):
    assert fitting_size(tokens, epochs) == size


def test_a_plan_for_gpus(capsys):
    made = plan.main([*GIVEN, "--gpus", "8", "--model.size", "110m", "--loop.num-steps", "1000"])
    assert made.samples == 8896 and made.epochs == pytest.approx(32 * 1000 / 8896)
    assert made.hours * 3600 == pytest.approx(made.flops / (8 * 312e12 * 0.4))
    printed = capsys.readouterr().out
    assert "124.0M parameters" in printed
    assert "warning" in printed and "feed no size" in printed


def test_what_gpus_send_by_hand():
    """A ring sends 7/8 of a tensor among 8 for a reduce-scatter, and as much for an all-gather; numbers of 4 bytes."""

    def sent(stage: int, accumulation: int, **model: bool) -> float:
        sizes, sharded = ModelOptions(**model), DeepSpeedConfig(zero_stage=stage)
        options = PlanOptions(engine="deepspeed", deepspeed=sharded, model=sizes)
        return exchange_bytes(1000, options, 8, accumulation) / (7 / 8 * 4000)

    assert exchange_bytes(1000, PlanOptions(), 8, 3) == 7 / 8 * 4000 * 2
    assert [sent(stage, 3) for stage in (1, 2, 3)] == [2, 3 + 1, 3 + 3 * 2]
    assert sent(3, 1, gradient_checkpointing=True) == 1 + 3


def test_cost_and_what_limits(capsys):
    flags = [*GIVEN, "--gpus", "8", "--model.size", "110m", "--loop.num-steps", "1000"]
    made = plan.main([*flags, "--gpu-price", "1000"])
    fast = capsys.readouterr().out
    assert f"{made.hours * 8000:,.0f} for the GPU hours" in fast and "limit       compute" in fast
    plan.main([*flags, "--link-gbytes", "1"])
    slow = capsys.readouterr().out
    assert "limit       the network" in slow and "GPU hours" not in slow
    assert f"{made.parameters * 8 * 7 / 8 / 1e6:.0f} ms of gradients over 1 GB/s" in slow


def test_a_model_too_large_for_the_memory_is_named():
    options = PlanOptions(
        num_samples=10**9,
        codebook_size=1024,
        grid_size=16,
        gpus=8,
        gpu_memory=24,
        model=ModelOptions(size="3b"),
    )
    assert "do not fit into 24" in " ".join(make_plan(options).warnings)


def test_a_plan_for_this_machine_measures_it():
    small = ModelOptions(dim=16, num_layers=1, num_heads=2)
    made = make_plan(
        PlanOptions(num_samples=100, codebook_size=16, grid_size=4, model=small, dry_run_steps=2)
    )
    assert made.hours > 0 and "measured here" in made.lines[3]


@pytest.mark.parametrize(
    "change, said",
    [
        (("--gpus", "-1"), "gpus and dry_run_steps"),
        (("--expected-mfu", "0"), "expected_mfu"),
        (("--gpu-price", "-1"), "gpu_price and link_gbytes must not be negative"),
        (("--gpus", "3"), "does not divide over 3 processes"),
        (("--image-tokenizer", "nowhere", "--num-samples", "9"), "nowhere"),
        (("--num-samples", "0"), "num_samples must be at least 1, not 0"),
        (("--codebook-size", "-5"), "codebook_size must be at least 1, not -5"),
        (("--num-samples", "None", "--data", "FOLDER"), "holds no shards yet"),
    ],
)
def test_bad_plans_are_one_sentence(change, said, tmp_path, capsys):
    given = () if change[0] == "--image-tokenizer" else GIVEN
    with pytest.raises(SystemExit) as ended:
        plan.main([*given, *(str(tmp_path) if a == "FOLDER" else a for a in change)])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and said in error and error.count("\n") == 1


def test_a_model_too_large_for_this_machine_is_not_tried(monkeypatch):
    monkeypatch.setattr(plan, "free_memory", lambda device: 2.0**30)
    made = make_plan(
        PlanOptions(num_samples=100, codebook_size=16, grid_size=4, model=ModelOptions(size="340m"))
    )
    assert made.hours is None and "it does not fit" in made.lines[3]
    assert "GiB here do not fit into 1.0" in " ".join(made.warnings)


@pytest.mark.parametrize(
    ("loop", "count"),
    [
        (LoopConfig(num_steps=5000, save_every=500, keep_last=0), 10),
        (LoopConfig(num_steps=5000, save_every=500, keep_last=2), 4),
        (LoopConfig(num_steps=400, save_every=500, keep_last=2), 1),
        (LoopConfig(num_steps=5000, save_every=0), 1),
    ],
)
def test_checkpoints_on_the_disk_at_once(loop, count):
    assert plan.num_checkpoints(loop) == count


def test_train_tokenizer_from_a_text_file(tmp_path, capsys):
    (tmp_path / "captions.txt").write_text("一件红色的T恤\n一条蓝色牛仔裤\n" * 4, "utf-8")
    train_tokenizer.main([str(tmp_path / "captions.txt"), str(tmp_path / "out"), "--model-type", "char"])
    tokenizer = TextTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.encode(["一件红色的T恤"], 16).num_unknown == 0
    assert "0.000% of them unknown" in capsys.readouterr().out


def test_train_tokenizer_from_shards(tmp_path):
    write_image_shards(tmp_path / "shards", num_train=8, num_val=2)
    assert list(train_tokenizer.read_captions(tmp_path / "shards"))[:2] == [
        "一个红色的圆盘",
        "一个蓝色的圆盘",
    ]


def test_train_tokenizer_from_jsonl(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '{"sentences": ["红色的鞋", "鞋"]}\n{"caption": "蓝色的裤子"}\n', "utf-8"
    )
    assert list(train_tokenizer.read_captions(tmp_path / "a.jsonl")) == ["红色的鞋", "鞋", "蓝色的裤子"]


@pytest.mark.parametrize(
    "line, said", [('{"sentences": ', "a.jsonl:2 is not valid JSON"), ("{}", "a.jsonl:2 has none")]
)
def test_a_bad_line_is_named(line, said, tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text(f'{{"text": "鞋"}}\n{line}\n', "utf-8")
    with pytest.raises(SystemExit) as ended:
        train_tokenizer.main([str(tmp_path / "a.jsonl"), str(tmp_path / "out")])
    assert ended.value.code == 2 and said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
