"""The interval of the measured ratios: it covers the median as often as it says."""

from __future__ import annotations

import numpy as np
import pytest

from tests.cluster.web.readers_cost import interval_of


@pytest.mark.parametrize(
    ("n", "low", "high"), [(2, 0, 1), (5, 0, 4), (8, 0, 7), (9, 1, 7), (12, 2, 9), (15, 3, 11)]
)
def test_it_is_the_narrowest_by_the_binomial_table(n: int, low: int, high: int) -> None:
    """Which order statistics: those of the table of the sign test at 5 %."""
    assert interval_of([float(i) for i in range(n)][::-1]) == (low, high)


def test_it_covers_the_median_in_95_of_100_cases() -> None:
    """Drawn 2,000 times from a skewed distribution whose median is known."""
    draw = np.random.default_rng(5)
    covered = 0
    for _ in range(2_000):
        low, high = interval_of(draw.exponential(1.0, 12).tolist())
        covered += low <= np.log(2) <= high
    assert covered >= 0.95 * 2_000
