import pytest
import torch
from small_checkpoint import enlarge_

from dalle.fast import CompiledDecoder, FastOptions, GraphDecoder, PlainDecoder, prepare
from dalle.model import Dalle, ModelOptions
from dalle.packed import Int8Linear, PackedDecoder
from dalle.sampling import SamplingOptions, picture_generator, sample_ids

CONFIG = dict(dim=64, num_layers=3, num_heads=4)


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
    """Logits of positions `known` .. 120 of given pictures: (R, 121 - known, V)"""
    text, image = (t[rows] for t in inputs())
    cache = decoder.new_cache(text)
    steps = [decoder.prefill(text, cache, image[:, :known] if known else None).clone()]
    steps += [decoder.decode_step(image[:, n], n, cache).clone() for n in range(known, 120)]
    return torch.stack(steps, 1).float()


@torch.inference_mode()
def full_logits(model: Dalle) -> torch.Tensor:
    return model(*inputs()).image


@pytest.mark.parametrize("changes", [{}, {"num_kv_heads": 2}, {"num_kv_heads": 1, "tie_image_head": True}])
@pytest.mark.parametrize("known", [0, 54, 107])
def test_packed_steps_equal_a_full_pass(changes, known):
    model = make(**changes)
    expected = full_logits(model)[:, known:]
    torch.testing.assert_close(
        step_logits(PackedDecoder(model, torch.float32), known), expected, rtol=1e-4, atol=2e-4
    )


@pytest.mark.parametrize(("weights", "share"), [(torch.bfloat16, 0.02), (torch.int8, 0.05)])
def test_fewer_bits_stay_close(weights, share):
    model = make()
    expected = full_logits(model)
    error = step_logits(PackedDecoder(model, weights), 0) - expected
    assert 0 < error.std() < share * expected.std()


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16, torch.int8])
def test_packed_rows_do_not_depend_on_their_company(weights):
    decoder = PackedDecoder(make(), weights)
    together = step_logits(decoder, 80)
    for rows in (slice(0, 1), slice(1, 2), slice(2, 5)):
        assert torch.equal(step_logits(decoder, 80, rows), together[rows])


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
        for engine in ("plain", "packed"):
            step_logits(prepare(model, FastOptions(engine, weights)), 115)
    assert all(
        torch.equal(t, before[n]) and t.dtype == before[n].dtype for n, t in model.state_dict().items()
    )


def test_auto_packs_on_a_cpu_and_plain_is_the_model():
    model = make()
    assert isinstance(prepare(model, FastOptions()), PackedDecoder)
    plain = prepare(model, FastOptions("plain", "float32"))
    assert isinstance(plain, PlainDecoder) and plain.model is model


def test_impossible_options_say_so():
    with pytest.raises(ValueError, match="packed engine"):
        FastOptions("plain", "int8")
    with pytest.raises(ValueError, match="GPU"):
        prepare(make(), FastOptions("graph"))
    with pytest.raises(ValueError, match="imported"):
        prepare(torch.nn.Linear(2, 2), FastOptions("plain"))


@pytest.mark.slow
def test_compiled_steps_equal_a_full_pass():
    model = make()
    expected = full_logits(model)
    torch.testing.assert_close(step_logits(CompiledDecoder(model), 0), expected, rtol=1e-4, atol=2e-4)


@pytest.mark.gpu
def test_graphs_equal_a_full_pass_and_can_be_used_again():
    model = make().cuda()
    decoder = GraphDecoder(model)
    generators = [picture_generator(0, i) for i in range(5)]
    text = inputs()[0].cuda()
    drawn = [
        sample_ids(decoder, text, torch.zeros_like(text), generators, SamplingOptions(cfg_scale=2.0)).ids
        for generators in ([picture_generator(0, i) for i in range(5)] for _ in range(2))
    ]
    assert torch.equal(*drawn)
    plain = sample_ids(
        PlainDecoder(model), text, torch.zeros_like(text), generators, SamplingOptions(cfg_scale=2.0)
    )
    assert (plain.ids == drawn[0]).float().mean() > 0.9
