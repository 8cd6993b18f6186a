"""Means over seeds and their intervals."""

import math
import random

import pytest

from protoseg.engine.statistics import estimate, less


def test_three_numbers_by_hand():
    found = estimate([0.01, 0.02, 0.03])
    # mean 0.02, deviation 0.01, t(0.975; 2) = 4.302653: reach 4.302653 * 0.01 / sqrt(3) = 0.0248414
    assert found.mean == pytest.approx(0.02)
    assert found.deviation == pytest.approx(0.01)
    assert found.low == pytest.approx(-0.0048414, abs=1e-7)
    assert found.high == pytest.approx(0.0448414, abs=1e-7)
    assert found.n == 3


@pytest.mark.parametrize(("n", "quantile"), [(2, 12.7062), (5, 2.77645), (10, 2.26216), (31, 2.04227)])
def test_the_quantiles_are_students(n, quantile):
    """Of any published table, two-sided 5 %, n - 1 degrees of freedom."""
    found = estimate([0.0, 1.0] * (n // 2) + [0.5] * (n % 2))
    assert (found.high - found.mean) * math.sqrt(n) / found.deviation == pytest.approx(quantile, rel=1e-5)


def test_one_number_has_no_interval_and_none_has_no_mean():
    one, none = estimate([0.5]), estimate([])
    assert (one.mean, one.deviation, one.low, one.high, one.n) == (0.5, None, None, None, 1)
    assert math.isnan(none.mean)
    assert none.n == 0


def test_nineteen_of_twenty_intervals_hold_the_mean():
    draw = random.Random(0)
    held = 0
    for _ in range(2000):
        found = estimate([draw.gauss(3, 2) for _ in range(4)])
        held += found.low <= 3 <= found.high
    assert 0.935 < held / 2000 < 0.965  # three standard errors


def test_what_a_seed_does_to_both_cancels():
    gains = [0.010, 0.012, 0.011]
    seeds = [0.40, 0.62, 0.51]  # far apart
    pairs = [less({"miou": seed + gain}, {"miou": seed}) for seed, gain in zip(seeds, gains)]
    paired = estimate([pair["miou"] for pair in pairs])
    assert paired.low > 0
    assert paired.high - paired.low == pytest.approx(2 * 4.302653 * 0.001 / math.sqrt(3), rel=1e-5)


def test_only_what_both_have_is_compared():
    assert less({"a": 1.0, "b": 2.0}, {"b": 0.5, "c": 1.0}) == {"b": 1.5}


def test_an_undefined_number_makes_the_mean_undefined():
    assert math.isnan(estimate([0.5, math.nan]).mean)


def test_a_share_that_is_none_is_refused():
    with pytest.raises(ValueError, match="between 0 and 1, given 95"):
        estimate([1.0, 2.0], confidence=95)
