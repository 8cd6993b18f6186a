"""Means over seeds, and paired differences with their interval."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """The mean of n numbers.

    Attributes:
        mean: of the numbers; NaN if there is none.
        deviation: their standard deviation (n - 1 in the denominator), None below two numbers.
        low, high: the interval of the mean, None below two numbers.
        n: how many numbers.
    """

    mean: float
    deviation: float | None
    low: float | None
    high: float | None
    n: int


def estimate(values: Sequence[float], confidence: float = 0.95) -> Estimate:
    """The mean of independent numbers with Student's interval, mean ± t(n - 1) · s / sqrt(n).

    Of paired differences this is the paired t interval (Student 1908): what a seed does to both partners, such as an
    easy start or a lucky order of the data, cancels in each difference before anything is averaged.

    Args:
        values: one number a seed; NaN (a class that occurs nowhere) makes everything NaN.
        confidence: the share of such intervals that hold the true mean, where the numbers are normally distributed.

    Raises:
        ValueError: a confidence outside (0, 1).
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, given {confidence}")
    n = len(values)
    mean = math.fsum(values) / n if n else math.nan
    if n < 2:
        return Estimate(mean, None, None, None, n)
    from scipy.stats import t

    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    reach = float(t.ppf((1 + confidence) / 2, n - 1)) * deviation / math.sqrt(n)
    return Estimate(mean, deviation, mean - reach, mean + reach, n)


def less(ours: Mapping[str, float], theirs: Mapping[str, float]) -> dict[str, float]:
    """`ours` less `theirs` for every name that both have."""
    return {name: ours[name] - theirs[name] for name in ours if name in theirs}
