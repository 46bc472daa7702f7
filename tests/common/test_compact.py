"""Weights in fewer bits and back."""

import pytest
import torch

from common.compact import SCALE, compact, widen


def weights():
    torch.manual_seed(0)
    return {
        "embedding.weight": torch.randn(300, 64) * torch.logspace(-4, 2, 300)[:, None],
        "conv.weight": torch.randn(64, 32, 3, 3),
        "norm.weight": torch.rand(64),
        "codebook": torch.randn(1024, 8),
        "steps": torch.tensor(3),
    }


def test_rows_survive_8_bits_within_half_a_step():
    before = weights()
    short = compact(before, "int8")
    after = widen(short)
    assert set(after) == set(before)
    for name in ("embedding.weight", "conv.weight"):
        assert short[name].dtype == torch.int8
        step = before[name].abs().flatten(1).amax(1) / 127
        worst = (after[name] - before[name]).abs().flatten(1).amax(1)
        assert bool((worst <= 0.501 * step).all()) and float(worst.max()) > 0
    assert short["norm.weight"].dtype == short["codebook"].dtype == torch.float16
    assert after["steps"].dtype == torch.int64


def test_a_row_of_zeros_stays_zero():
    zero = torch.zeros(256, 64)
    assert torch.equal(widen(compact({"w": zero}, "int8"))["w"], zero)


@pytest.mark.parametrize("precision", ["float16", "bfloat16", "float32"])
def test_plain_precisions(precision):
    short = compact(weights(), precision)
    assert {t.dtype for t in short.values()} == {getattr(torch, precision), torch.int64}
    assert {t.dtype for t in widen(short).values()} == {torch.float32, torch.int64}


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"w does not fit into torch\.float16: use --precision bfloat16"):
        compact({"w": torch.tensor([1e9])}, "float16")
    with pytest.raises(ValueError, match="unknown precision 'int4'"):
        compact({}, "int4")


def test_a_lost_part_is_named():
    short = compact(weights(), "int8")
    with pytest.raises(ValueError, match="scales a weight that is not there"):
        widen({n: t for n, t in short.items() if n != "conv.weight"})
    with pytest.raises(ValueError, match=r"conv\.weight and its scale do not belong together"):
        widen({**short, "conv.weight" + SCALE: torch.ones(3)})


@pytest.mark.parametrize("precision", ["int8", "float16", "bfloat16", "float32"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused_in_every_precision(precision, value):
    matrix = torch.ones(256, 128)
    matrix[3, 5] = value
    with pytest.raises(ValueError, match="m holds numbers that are not finite"):
        compact({"m": matrix}, precision)
