import numpy as np
import pytest
from drawn_images import write_out_dir

from evaluation.compare.choice import chosen_set, curve, scorer_of, values_by_prompt
from evaluation.sets import LIKELIHOOD, SampleSet


@pytest.fixture
def samples(tmp_path):
    """Three texts with five images each."""
    return SampleSet.from_out_dir(write_out_dir(tmp_path / "out", ["a", "b", "c"], 5))


def test_values_by_hand(samples):
    """Scores choose; values say what the choice was worth."""
    scores = [1, 3, 2, 5, 4, 5, 4, 3, 2, 1, 1, 1, 1, 1, 1]
    values = [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 9, 0, np.nan, 0, 0]
    scored = samples.with_scores("s", scores)
    assert values_by_prompt(scored, values, "s", 1)[:2].tolist() == [2.0, 2.0]
    assert np.isnan(values_by_prompt(scored, values, "s", 1)[2])
    assert values_by_prompt(scored, values, "s", 2).tolist() == [2.0, 1.0, pytest.approx(np.nan, nan_ok=True)]
    assert values_by_prompt(scored, values, "s", 5).tolist() == [3.0, 0.0, 9.0], "of equals the earlier"


def test_a_perfect_scorer_gains_what_theory_says(tmp_path):
    """The best of n uniform values has the mean n / (n + 1)."""
    found = SampleSet.from_out_dir(write_out_dir(tmp_path / "o", [f"text {i}" for i in range(60)], 16))
    values = np.random.default_rng(0).random(len(found))
    perfect = curve(found.with_scores("s", values), "v", values, "s", (1, 4, 16))
    assert [p.width for p in perfect.points] == [1, 4, 16]
    for point in perfect.points:
        assert abs(point.value.value - point.width / (point.width + 1)) < 0.03
        assert point.value.low < point.value.value < point.value.high
    assert perfect.points[2].gain.low > 0.35 and perfect.points[0].gain.value == 0
    blind = np.random.default_rng(1).random(len(found))
    nothing = curve(found.with_scores("s", blind), "v", values, "s", (1, 4, 16))
    assert all(p.gain.low <= 0 <= p.gain.high for p in nothing.points)


def test_widths_and_prompts_that_do_not_count(samples):
    values = [1, 1, 1, 1, 1] + [np.nan] * 5 + [0, 0, 0, 0, 0]
    found = curve(samples, "v", values, LIKELIHOOD, (2, 99))
    assert [p.width for p in found.points] == [1, 2] and found.points[0].prompts == 2
    assert found.points[1].value.value == 0.5
    assert curve(samples, "v", [np.nan] * 15, LIKELIHOOD, (2,)) is None
    never = curve(samples, "v", [0.0] * 15, LIKELIHOOD, (2,)).points[1].value
    assert (never.value, never.low) == (0, 0) and never.high > 0.5, "three prompts prove little"
    with pytest.raises(ValueError, match="has no score 'other': nothing to choose by"):
        curve(samples, "v", values, "other", (1, 2))


def test_who_chooses_is_recorded(samples):
    class Ranker:
        name, identity = "r", "abc"

    assert scorer_of(samples, Ranker()) == "r" and scorer_of(samples, None) == LIKELIHOOD
    unknown = SampleSet("u", tuple(type(s)(s.text, s.path) for s in samples.samples))
    assert scorer_of(unknown, None) == ""
    best = chosen_set(samples.with_scores("r", range(15)), Ranker(), 5)
    assert [s.index for s in best.samples] == [4, 4, 4]
    assert best.settings["encoders"] == ["abc"] and best.settings["rerank_width"] == 5
    assert "encoders" not in chosen_set(samples, None, 3).settings and "encoders" not in samples.settings
