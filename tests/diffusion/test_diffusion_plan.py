"""The planned memory against what PyTorch's allocator really hands out, and the real sizes of SD 1.5."""

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from tiny_tuning import write_base
from torch.profiler import ProfilerActivity, profile

from diffusion import plan
from diffusion.lora.adapters import LoraOptions, add_adapter
from diffusion.plan import SD15_UNET
from diffusion.tuning.memory import GIB, LiveBytes, Networks, StepMemory, plan_step, shortage
from diffusion.tuning.options import TuneOptions
from diffusion.tuning.step import computed_in

UNET = {
    "sample_size": 16,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 32,
    "attention_head_dim": 2,
    "norm_num_groups": 8,
}
VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (16, 32),
    "norm_num_groups": 8,
}


def full(unet):
    unet.requires_grad_(True)


def lora(unet):
    add_adapter(unet, LoraOptions(dropout=0.0), "unet")


def allocated(work) -> float:
    """The most bytes that the CPU allocator held at once during `work`, over what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    now = peak = 0
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return float(peak)


@pytest.mark.parametrize(
    ("prepare", "checkpointing", "accumulates"),
    [(full, False, False), (full, False, True), (lora, True, False)],
)
def test_the_plan_is_what_the_allocator_hands_out(prepare, checkpointing, accumulates):
    networks = Networks(UNET, VAE, 8, prepare)
    planned = plan_step(networks, 4, 64, "fp32", checkpointing, accumulates=accumulates)
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(UNET).train()
    prepare(unet)
    if checkpointing:
        unet.enable_gradient_checkpointing()
    noisy, hidden, timesteps = (
        torch.randn(4, 4, 32, 32),
        torch.randn(4, 8, 32),
        torch.zeros(4, dtype=torch.long),
    )

    def step():
        for _ in range(1 + accumulates):
            prediction = unet(noisy, timesteps, hidden).sample
            (prediction.float() - noisy).square().mean().backward()
            del prediction

    measured = allocated(step)
    trained = sum(p.numel() for p in unet.parameters() if p.requires_grad)
    assert planned.gradients == 4 * trained and planned.optimizer == 8 * trained
    assert planned.gradients + planned.activations == pytest.approx(measured, rel=0.12)


def test_the_encoding_is_what_the_allocator_hands_out():
    planned = plan_step(Networks(UNET, VAE, 8, full), 4, 64, "fp32", False)
    vae, images = AutoencoderKL.from_config(VAE).eval(), torch.randn(4, 3, 64, 64)

    @torch.no_grad()
    def encode():
        vae.encode(images)

    assert planned.encoding == pytest.approx(allocated(encode), rel=0.12)


def test_live_bytes_of_a_sum_by_hand():
    x = torch.ones(1000, requires_grad=True)
    with LiveBytes() as live:
        y = x * 2.0  # 4,000 bytes; what is saved for the backward pass is a number
        z = y.exp()  # 4,000 more
        assert live.now == 8000
        del y
        assert live.now == 4000 and live.peak == 8000
        del z
        assert live.now == 0


def test_views_of_what_was_there_before_are_not_counted():
    weight = torch.ones(100, 50, requires_grad=True)
    with LiveBytes() as live:
        # 2,000 bytes that are saved for the backward pass and 4,000; the transposed weight is no storage of its own
        y = torch.ones(10, 50) @ weight.t()
        assert live.now == live.peak == 6000
        del y


def test_a_plan_in_bf16_needs_less_on_every_machine(monkeypatch):
    networks = Networks(UNET, VAE, 8, full)
    single = plan_step(networks, 4, 64, "fp32", False)
    for native in (True, False):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda native=native: {"avx512_bf16": native})
        half = plan_step(networks, 4, 64, "bf16", False)
        assert half.activations < 0.7 * single.activations and half.encoding < 0.7 * single.encoding
        assert computed_in("bf16", torch.device("cpu")) == ("bf16" if native else "fp32")
        assert computed_in("bf16", torch.device("cuda")) == "bf16"
        assert computed_in("fp16", torch.device("cpu")) == "fp16"


def test_checkpointing_and_lora_need_less():
    networks = {name: Networks(UNET, VAE, 8, prepare) for name, prepare in (("full", full), ("lora", lora))}
    plain = plan_step(networks["full"], 4, 64, "fp32", False)
    checkpointed = plan_step(networks["full"], 4, 64, "fp32", True, True, processes=4, zero_stage=2)
    adapters = plan_step(networks["lora"], 4, 64, "fp32", True)
    assert checkpointed.activations < 0.7 * plain.activations
    assert adapters.optimizer < 0.1 * plain.optimizer and adapters.total < checkpointed.total
    assert checkpointed.optimizer == plain.optimizer / 4 and checkpointed.gradients == plain.gradients / 4
    assert checkpointed.average == plain.gradients and plain.average == 0


def test_the_command_on_a_base(tmp_path, capsys):
    base = write_base(tmp_path / "base")
    made = plan.main(["--base", str(base), "--resolution", "64", "--text-len", "12", "--gpu-memory", "24"])
    assert made.trained == sum(
        p.numel() for p in UNet2DConditionModel.from_pretrained(base / "unet").parameters()
    )
    assert "it fits into 24 GiB" in capsys.readouterr().out
    for flags, sentence in (
        (["--base-bits", "8"], "base_bits is for LoRA"),
        (["--resolution", "0"], "resolution must be at least 1"),
    ):
        with pytest.raises(SystemExit):
            plan.main(flags)
        assert sentence in capsys.readouterr().err


def test_the_sentence_about_too_little_memory():
    memory = StepMemory(4.0 * GIB, 8.0 * GIB, 0.0, 2.0 * GIB, 1.0 * GIB)
    assert memory.total == 14 * GIB
    options = TuneOptions()
    said = shortage(memory, 8.0 * GIB, options, type("P", (), {"micro_batch_size": 4}))
    assert "14.00 GiB" in said and "--loop.micro-batch-size 2" in said and "--gradient-checkpointing" in said


@pytest.mark.slow
def test_stable_diffusion_15():
    """859,520,964 parameters: 3.2 GiB of gradients, 6.4 of moments; a LoRA of rank 8 trains 1,594,368."""
    options = plan.Options()
    made = plan.make_plan(options)
    assert made.trained == 859_520_964 == plan.count_parameters(SD15_UNET, "UNet2DConditionModel")
    assert made.plain.optimizer == 8 * 859_520_964
    assert made.checkpointed.activations < 0.5 * made.plain.activations < 0.15 * GIB
    assert 13.5 < made.total(True) / GIB < 14
    lora_plan = plan.make_plan(plan.Options(method="lora"))
    assert lora_plan.trained == 1_594_368 and lora_plan.total(True) < 0.45 * made.total(True)
