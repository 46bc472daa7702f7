import math

import pytest
import torch
import torch.nn.functional as F

from vq.quantizer import (
    CodeUsage,
    EmaQuantizer,
    FiniteScalarQuantizer,
    GumbelConfig,
    GumbelQuantizer,
    VectorQuantizer,
    kmeans,
)


def all_quantizers():
    torch.manual_seed(0)
    return {
        "vq": VectorQuantizer(16, 4),
        "vq_free": VectorQuantizer(16, 4, l2_normalize=False),
        "vq_depth": VectorQuantizer(16, 4, depth=3),
        "ema": EmaQuantizer(16, 4, 0.25, True, 0.9),
        "gumbel": GumbelQuantizer(4, 16, 6, GumbelConfig()),
        "fsq": FiniteScalarQuantizer((2, 2, 2, 2)),
    }


@pytest.mark.parametrize("l2", [True, False])
def test_nearest_entry_against_brute_force(l2):
    torch.manual_seed(0)
    quantizer = VectorQuantizer(50, 6, l2_normalize=l2)
    latents = torch.randn(2, 6, 5, 7)
    points = latents.permute(0, 2, 3, 1)
    entries = quantizer.codebook.weight
    if l2:
        points, entries = F.normalize(points, dim=-1), F.normalize(entries, dim=-1)
    expected = [
        min(range(50), key=lambda k: float((entries[k] - point).detach().square().sum()))
        for point in points.reshape(-1, 6)
    ]
    quantized = quantizer(latents)
    assert quantized.ids.shape == (2, 5, 7) and quantized.ids.flatten().tolist() == expected
    torch.testing.assert_close(quantized.latents, entries[quantized.ids].permute(0, 3, 1, 2))
    chosen = entries[quantized.ids]
    assert quantized.loss.item() == pytest.approx(1.25 * 6 * F.mse_loss(chosen, points).item(), rel=1e-5)


def test_each_level_is_nearest_to_what_those_before_leave_over():
    torch.manual_seed(0)
    quantizer = VectorQuantizer(10, 5, depth=3)
    latents = torch.randn(2, 5, 3, 4)
    points = F.normalize(latents.permute(0, 2, 3, 1), dim=-1).reshape(-1, 5)
    books = quantizer.codebook.weight.detach().split(10)
    books = [F.normalize(books[0], dim=-1), *books[1:]]
    loss, total = 0.0, torch.zeros_like(points)
    expected = torch.zeros(len(points), dtype=torch.long)
    for book in books:
        rest = points - total
        digits = [min(range(10), key=lambda k: float((book[k] - r).square().sum())) for r in rest]
        expected = expected * 10 + torch.tensor(digits)
        total = total + book[digits]
        loss += 1.25 * 5 * F.mse_loss(total, points).item() / 3
    quantized = quantizer(latents)
    assert quantized.ids.flatten().tolist() == expected.tolist()
    torch.testing.assert_close(quantized.latents.permute(0, 2, 3, 1).reshape(-1, 5), total)
    assert quantized.loss.item() == pytest.approx(loss, rel=1e-5)
    assert quantizer.digits(torch.tensor([407])).flatten().tolist() == [4, 0, 7]


def test_some_training_images_are_decoded_from_their_first_level_alone():
    torch.manual_seed(0)
    quantizer = VectorQuantizer(10, 5, depth=2, level_dropout=0.5)
    latents = torch.randn(64, 5, 2, 2)
    whole = quantizer.lookup(quantizer(latents).ids)
    first = F.embedding(quantizer(latents).ids // 10, quantizer.entries()).permute(0, 3, 1, 2)
    decoded = quantizer(latents).latents
    of_whole, of_first = ((decoded - x).abs().amax((1, 2, 3)) < 1e-6 for x in (whole, first))
    assert torch.all(of_whole ^ of_first) and 16 < of_first.sum() < 48
    torch.testing.assert_close(quantizer.eval()(latents).latents, whole)


def test_the_first_of_equal_entries_wins():
    quantizer = VectorQuantizer(8, 3, l2_normalize=False)
    with torch.no_grad():
        quantizer.codebook.weight.copy_(torch.ones(8, 3))
    assert quantizer(torch.randn(1, 3, 2, 2)).ids.unique().tolist() == [0]


def test_gradients_pass_straight_through_and_pull_codes_and_latents_together():
    torch.manual_seed(0)
    quantizer = VectorQuantizer(16, 4, commit_weight=0.25, l2_normalize=False)
    latents = torch.randn(1, 4, 3, 3, requires_grad=True)
    quantized = quantizer(latents)
    upstream = torch.randn_like(latents)
    (passed,) = torch.autograd.grad(quantized.latents, latents, upstream, retain_graph=True)
    torch.testing.assert_close(passed, upstream)
    commit, codes = torch.autograd.grad(quantized.loss, [latents, quantizer.codebook.weight])
    difference = latents - quantizer.lookup(quantized.ids)
    torch.testing.assert_close(commit, 0.25 * 2 * difference / 9)
    assert codes.norm().item() > 0


@pytest.mark.parametrize("name", ["vq", "vq_free", "vq_depth", "ema", "gumbel", "fsq"])
def test_lookup_of_the_ids_is_what_was_decoded(name):
    quantizer = all_quantizers()[name].eval()
    quantized = quantizer(torch.randn(2, 4, 5, 3))
    torch.testing.assert_close(quantizer.lookup(quantized.ids), quantized.latents, atol=1e-6, rtol=1e-5)
    assert quantized.ids.dtype == torch.long and int(quantized.ids.max()) < 16 ** getattr(
        quantizer, "depth", 1
    )


@pytest.mark.parametrize("name", ["vq", "ema", "gumbel", "fsq"])
def test_bf16_latents_give_finite_gradients(name):
    quantizer = all_quantizers()[name].train()
    latents = torch.randn(1, 4, 4, 4, dtype=torch.bfloat16, requires_grad=True)
    quantized = quantizer(latents)
    (quantized.latents.float().square().sum() + quantized.loss).backward()
    assert quantized.loss.dtype == torch.float32
    assert latents.grad.isfinite().all() and latents.grad.abs().sum() > 0


def test_ema_moves_to_the_running_mean_by_hand():
    quantizer = EmaQuantizer(2, 2, 0.25, l2_normalize=False, decay=0.5).train()
    start = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    with torch.no_grad():
        quantizer.codebook.weight.copy_(start)
        quantizer.cluster_sum.copy_(start)
    points = torch.tensor([[2.0, 1.0], [4.0, 1.0], [-3.0, 0.0]])
    quantizer(points.t().reshape(1, 2, 1, 3))
    quantizer(points.t().reshape(1, 2, 1, 3))  # two micro-batches of one step
    assert torch.equal(quantizer.codebook.weight, start)
    quantizer.update_()
    size = torch.tensor([0.5 + 0.5 * 4, 0.5 + 0.5 * 2])
    total = torch.stack([0.5 * start[0] + 0.5 * 2 * (points[0] + points[1]), 0.5 * start[1] + points[2]])
    torch.testing.assert_close(quantizer.cluster_size, size)
    torch.testing.assert_close(quantizer.codebook.weight.data, total / size[:, None])
    assert not quantizer.codebook.weight.requires_grad
    before = quantizer.codebook.weight.clone()
    quantizer.eval()(points.t().reshape(1, 2, 1, 3))
    quantizer.update_()
    assert torch.equal(before, quantizer.codebook.weight)  # nothing is noted in eval mode


def test_gumbel_draws_in_training_and_is_certain_in_eval():
    torch.manual_seed(0)
    quantizer = GumbelQuantizer(4, 16, 6, GumbelConfig(straight_through=True, kl_weight=1.0))
    latents = torch.randn(4, 4, 8, 8)
    first, second = quantizer.train()(latents), quantizer(latents)
    assert not torch.equal(first.latents, second.latents)
    rows = first.latents.permute(0, 2, 3, 1).reshape(-1, 6)
    assert torch.cdist(rows, quantizer.codebook.weight).amin(1).max() < 5e-3  # one code a place, no mixture
    quantizer.config = GumbelConfig(straight_through=False)
    mixed = quantizer(latents).latents.permute(0, 2, 3, 1).reshape(-1, 6)
    assert torch.cdist(mixed, quantizer.codebook.weight).amin(1).mean() > 1e-2
    quantizer.eval()
    assert torch.equal(quantizer(latents).latents, quantizer(latents).latents)
    assert torch.equal(quantizer(latents).ids, quantizer.proj(latents).argmax(1))


def test_gumbel_divergence_is_zero_for_uniform_and_log_n_for_certain_codes():
    quantizer = GumbelQuantizer(4, 16, 6, GumbelConfig(kl_weight=1.0)).train()
    with torch.no_grad():
        quantizer.proj.weight.zero_()
        quantizer.proj.bias.zero_()
    assert quantizer(torch.randn(1, 4, 2, 2)).loss.item() == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        quantizer.proj.bias[3] = 1e4
    assert quantizer(torch.randn(1, 4, 2, 2)).loss.item() == pytest.approx(math.log(16), rel=1e-4)


def test_gumbel_temperature_falls_geometrically_then_stays():
    config = GumbelConfig(start_temperature=1.0, end_temperature=0.25, anneal_share=0.5)
    assert [config.temperature(p) for p in (0, 0.25, 0.5, 1.0)] == pytest.approx([1, 0.5, 0.25, 0.25])
    with pytest.raises(ValueError, match="temperatures must fall"):
        GumbelConfig(end_temperature=2.0)


@pytest.mark.parametrize("levels", [(8, 8, 4, 4), (5, 3), (2, 2, 2)])
def test_fsq_codes_are_a_bijection_with_the_level_grid(levels):
    quantizer = FiniteScalarQuantizer(levels)
    ids = torch.arange(math.prod(levels)).view(1, 1, -1)
    entries = quantizer.lookup(ids)  # (1, D, 1, V)
    assert len(entries.squeeze(2)[0].t().unique(dim=0)) == math.prod(levels)
    assert entries.min() >= -1 and entries.max() <= 1
    size = torch.tensor(levels).view(1, -1, 1, 1)
    half = (size - 1) * (1 + 1e-3) / 2
    offset = torch.where(size % 2 == 0, 0.5, 0.0)
    latents = ((entries * (size // 2) + offset) / half).atanh()
    quantized = quantizer(latents)
    assert torch.equal(quantized.ids, ids)
    torch.testing.assert_close(quantized.latents, entries)
    extreme = quantizer(torch.full((1, len(levels), 1, 2), 50.0) * torch.tensor([1.0, -1.0]))
    assert extreme.ids.flatten().tolist() == [math.prod(levels) - 1, 0]


def test_kmeans_finds_well_separated_centres():
    generator = torch.Generator().manual_seed(0)
    centres = torch.eye(4) * 10
    points = centres.repeat_interleave(50, 0) + 0.1 * torch.randn(200, 4, generator=generator)
    found = min(
        (kmeans(points, 4, 10, torch.Generator().manual_seed(seed)) for seed in range(5)),
        key=lambda c: float(torch.cdist(points, c).amin(1).mean()),
    )
    assert torch.cdist(centres, found).amin(1).max() < 0.1
    assert torch.equal(
        kmeans(points, 4, 3, torch.Generator().manual_seed(1)),
        kmeans(points, 4, 3, torch.Generator().manual_seed(1)),
    )


def test_usage_perplexity_and_dead_codes_by_hand():
    usage = CodeUsage(4)
    usage.add(torch.tensor([[0, 1], [0, 1]]))
    metrics = usage.metrics()
    assert metrics == {"usage": 0.5, "perplexity": pytest.approx(2.0), "dead_codes": 2.0}
    usage.add(torch.tensor([2, 3]))
    assert usage.metrics()["dead_codes"] == 0
    usage.clear()
    assert usage.metrics()["usage"] == 0


def test_usage_counts_the_codes_of_each_level():
    usage = CodeUsage(4, depth=2)
    usage.add(torch.tensor([[0 * 4 + 1, 3 * 4 + 1]]))
    assert usage.counts.tolist() == [1, 0, 0, 1, 0, 2, 0, 0]
    metrics = usage.metrics()
    assert metrics["usage"] == 3 / 8 and metrics["dead_codes"] == 5
    assert metrics["perplexity"] == pytest.approx(2**0.5)  # 2 and 1


def test_gumbel_starts_with_draws_that_say_something():
    torch.manual_seed(0)
    quantizer = GumbelQuantizer(8, 512, 8, GumbelConfig())
    latents = 0.35 * torch.randn(4, 8, 6, 6)  # as an encoder begins
    assert 1 < quantizer.proj(latents).std(1).mean() < 3
