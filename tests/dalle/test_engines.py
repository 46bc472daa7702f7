import pytest
import torch
from small_checkpoint import enlarge_

from dalle.engines import FastOptions, packed, prepare
from dalle.engines.cpu_kernel import CpuKernelDecoder
from dalle.engines.cuda_graph import CudaGraphDecoder
from dalle.engines.eager import TorchDecoder
from dalle.engines.packed import Int8Linear, PackedDecoder
from dalle.model import Block, Dalle, ModelOptions, SwiGLU
from dalle.sampling import SamplingOptions, noise_generator, sample_ids
from kernels import decode
from kernels.compiler import level

CONFIG = dict(dim=64, num_layers=3, num_heads=4)
HEADS = [{}, {"num_kv_heads": 2}, {"num_kv_heads": 1, "tie_image_head": True}]
needs_native = pytest.mark.skipif(
    bool(decode.unavailable_reason()), reason=f"no cpu_kernel engine: {decode.unavailable_reason()}"
)
needs_packed_bf16 = pytest.mark.skipif(
    not packed.is_available(torch.bfloat16), reason="oneDNN packs no 16 bits on this CPU"
)
FEW_BITS = [
    pytest.param(PackedDecoder, torch.bfloat16, 0.02, marks=needs_packed_bf16),
    pytest.param(PackedDecoder, torch.int8, 0.05, marks=needs_packed_bf16),
    pytest.param(CpuKernelDecoder, torch.bfloat16, 0.02, marks=needs_native),
    pytest.param(CpuKernelDecoder, torch.int8, 0.05, marks=needs_native),
]


def make(**changes) -> Dalle:
    torch.manual_seed(0)
    model = Dalle(ModelOptions(**(CONFIG | changes)).config(40, 0, 9, 31, 11)).eval()
    enlarge_(model)
    return model


def inputs(rows: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(1, 40, (rows, 9), generator=generator)
    text[1, 4:] = 0
    text[2] = 0
    return text, torch.randint(0, 31, (rows, 121), generator=generator)


@torch.inference_mode()
def step_logits(decoder, known: int, rows: slice = slice(None)) -> torch.Tensor:
    """Logits of positions `known` .. 120 of given images: (R, 121 - known, V)"""
    text, image = (t[rows] for t in inputs())
    cache = decoder.new_cache(text)
    steps = [decoder.prefill(text, cache, image[:, :known] if known else None).clone()]
    steps += [decoder.decode_step(image[:, n], n, cache).clone() for n in range(known, 120)]
    return torch.stack(steps, 1).float()


@torch.inference_mode()
def full_logits(model: Dalle) -> torch.Tensor:
    return model(*inputs()).image


@pytest.mark.parametrize("changes", HEADS)
@pytest.mark.parametrize("known", [0, 54, 107])
def test_packed_steps_equal_a_full_pass(changes, known):
    model = make(**changes)
    expected = full_logits(model)[:, known:]
    torch.testing.assert_close(
        step_logits(PackedDecoder(model, torch.float32), known), expected, rtol=1e-4, atol=2e-4
    )


@pytest.mark.parametrize(("decoder", "weights", "share"), FEW_BITS)
@pytest.mark.parametrize("changes", [*HEADS, {"dim": 192, "num_heads": 2}, {"dim": 160, "num_heads": 2}])
@pytest.mark.parametrize("known", [0, 54])
def test_fewer_bits_stay_close(decoder, weights, share, changes, known):
    model = make(**changes)
    expected = full_logits(model)[:, known:]
    error = step_logits(decoder(model, weights), known) - expected
    assert 0 < error.std() < share * expected.std()


@pytest.mark.parametrize(("decoder", "weights", "share"), [(PackedDecoder, torch.float32, 0), *FEW_BITS])
def test_rows_do_not_depend_on_their_company(decoder, weights, share):
    decoder = decoder(make(), weights)
    together = step_logits(decoder, 80)
    for rows in (slice(0, 1), slice(1, 2), slice(2, 5)):
        assert torch.equal(step_logits(decoder, 80, rows), together[rows])


@needs_native
@pytest.mark.parametrize("weights", [torch.bfloat16, torch.int8])
def test_native_rows_do_not_depend_on_tiles_and_threads(weights):
    decoder = CpuKernelDecoder(make(), weights)
    text, image = (t.repeat(6, 1) for t in inputs())  # 30 rows: three tiles

    def logits(rows: slice) -> torch.Tensor:
        cache = decoder.new_cache(text[rows])
        decoder.prefill(text[rows], cache)
        return torch.stack([decoder.decode_step(image[rows, n], n, cache) for n in range(30)])

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        together = logits(slice(0, 30))
        torch.set_num_threads(1)
        for rows in (slice(0, 13), slice(13, 30), slice(3, 4)):
            assert torch.equal(logits(rows), together[:, rows])
    finally:
        torch.set_num_threads(threads)


@needs_native
def test_native_refuses_what_it_cannot_do():
    decoder = CpuKernelDecoder(make(), torch.bfloat16)
    text, image = inputs()
    cache = decoder.new_cache(text)
    decoder.prefill(text, cache)
    with pytest.raises(IndexError, match="below 31"):
        decoder.decode_step(torch.tensor([0, 1, 31, 2, 3]), 0, cache)
    with pytest.raises(ValueError, match="5 ids"):
        decoder.decode_step(image[:2, 0], 0, cache)
    with pytest.raises(ValueError, match="take packed"):
        prepare(make(), FastOptions("cpu_kernel", "float32"))
    with pytest.raises(ValueError, match="multiple of 32"):
        prepare(make(dim=48), FastOptions("cpu_kernel", "bfloat16"))


@pytest.mark.skipif(not level(), reason="a CPU without the cpu_kernel engine")
def test_without_a_compiler_packed_takes_over(no_compiler, capsys):
    assert type(prepare(make(), FastOptions())) is PackedDecoder
    assert "without the compiled step: compiling decode.cpp failed: exit code 1" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"cpu_kernel engine cannot run here: compiling decode\.cpp failed"):
        prepare(make(), FastOptions("cpu_kernel", "bfloat16"))


def test_int8_rounds_to_the_nearest_step():
    weight = torch.zeros(32, 32)
    weight[0, :3] = torch.tensor([1.27, -0.5, 0.004])
    layer = Int8Linear(weight)
    assert layer.weight[0, :4].tolist() == [127, -50, 0, 0] and not layer.weight[1:].any()
    assert layer(torch.ones(1, 32, dtype=torch.bfloat16))[0, 0].item() == pytest.approx(0.77, rel=0.01)
    with pytest.raises(ValueError, match="multiples of 32"):
        Int8Linear(torch.zeros(32, 3))


def test_the_model_is_left_as_it_is():
    model = make()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    for weights in ("float32", "bfloat16"):
        for engine in ("torch", "packed", "auto"):
            if engine != "packed" or packed.is_available(getattr(torch, weights)):
                step_logits(prepare(model, FastOptions(engine, weights)), 115)
    assert all(
        torch.equal(t, before[n]) and t.dtype == before[n].dtype for n, t in model.state_dict().items()
    )


def test_auto_is_the_fastest_on_a_cpu_and_torch_is_the_model():
    model = make()
    unfit = PackedDecoder if packed.is_available(torch.bfloat16) else TorchDecoder
    assert type(prepare(make(dim=48), FastOptions(weights="bfloat16"))) is unfit
    best = PackedDecoder if decode.unavailable_reason() else CpuKernelDecoder
    assert type(prepare(model, FastOptions(weights="bfloat16"))) is best
    assert type(prepare(model, FastOptions())) is best
    plain = prepare(model, FastOptions("torch", "float32"))
    assert isinstance(plain, TorchDecoder) and plain.model is model


def test_impossible_options_say_so():
    with pytest.raises(ValueError, match="cpu_kernel or packed engine"):
        FastOptions("torch", "int8")
    with pytest.raises(ValueError, match="GPU"):
        prepare(make(), FastOptions("cuda_graph"))
    with pytest.raises(ValueError, match="imported"):
        prepare(torch.nn.Linear(2, 2), FastOptions("packed"))


@pytest.mark.skipif(packed.is_available(torch.bfloat16), reason="oneDNN packs 16 bits on this CPU")
def test_packing_refuses_16_bits_that_the_cpu_cannot_pack():
    with pytest.raises(ValueError, match="32 bits alone"):
        prepare(make(), FastOptions("packed", "bfloat16"))


def test_earlier_names_of_engines():
    names = [FastOptions(engine).engine for engine in ("plain", "native", "graph")]
    assert names == ["torch", "cpu_kernel", "cuda_graph"]


def test_kernels_off_leaves_pytorch_alone():
    model = make()
    off = prepare(model, FastOptions("torch", "float32", "off"))
    assert not any("forward" in vars(m) for m in model.modules()) and "off" in off.report.record()
    assert not isinstance(prepare(model, FastOptions(kernels="off")), CpuKernelDecoder)
    with pytest.raises(ValueError, match="leaves out the cpu_kernel engine"):
        FastOptions("cpu_kernel", kernels="off")
    on = prepare(model, FastOptions("torch", "float32"))
    assert on.report.record()["attentions"] == "3 of 3 attentions by hand-written passes"
    torch.testing.assert_close(step_logits(off, 100), step_logits(on, 100), rtol=1e-4, atol=1e-4)


def gelu_for_silu(monkeypatch, model):
    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.out(torch.nn.functional.gelu(gate) * up)

    monkeypatch.setattr(SwiGLU, "forward", forward)


def parallel_residual(monkeypatch, model):
    def forward(self, x, table, mask):
        return x + self.attention(self.attention_norm(x), table, mask) + self.ffn(self.ffn_norm(x))

    monkeypatch.setattr(Block, "forward", forward)


def layer_norm(monkeypatch, model):
    model.blocks[1].ffn_norm = torch.nn.LayerNorm(64, bias=False)


def bias_in_qkv(monkeypatch, model):
    model.blocks[2].attention.qkv.bias = torch.nn.Parameter(torch.zeros(192))


def hook(monkeypatch, model):
    model.blocks[0].attention.register_forward_hook(lambda *_: None)


def subclass(monkeypatch, model):
    model.__class__ = type("MyDalle", (Dalle,), {})


CHANGES = [gelu_for_silu, parallel_residual, layer_norm, bias_in_qkv, hook, subclass]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(
    "engine",
    [pytest.param("cpu_kernel", marks=needs_native), pytest.param("packed", marks=needs_packed_bf16)],
)
def test_a_changed_model_is_left_to_torch(change, engine, monkeypatch, capsys):
    model = make()
    change(monkeypatch, model)
    with pytest.raises(ValueError, match="cannot compute the model"):
        prepare(model, FastOptions(engine, "bfloat16"))
    assert type(prepare(model, FastOptions())) is TorchDecoder
    assert ("warning" in capsys.readouterr().out) == (change in (gelu_for_silu, parallel_residual))


@pytest.mark.gpu
def test_graphs_equal_a_full_pass_and_can_be_used_again():
    model = make().cuda()
    decoder = CudaGraphDecoder(model)
    generators = [noise_generator(0, i) for i in range(5)]
    text = inputs()[0].cuda()
    drawn = [
        sample_ids(decoder, text, torch.zeros_like(text), generators, SamplingOptions(cfg_scale=2.0)).ids
        for generators in ([noise_generator(0, i) for i in range(5)] for _ in range(2))
    ]
    assert torch.equal(*drawn)
    plain = sample_ids(
        TorchDecoder(model), text, torch.zeros_like(text), generators, SamplingOptions(cfg_scale=2.0)
    )
    assert (plain.ids == drawn[0]).float().mean() > 0.9
