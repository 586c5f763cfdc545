"""How many examples a property is tried with: all of them, or a quarter while others wait for the result."""

from __future__ import annotations

from hypothesis import settings

QUICK = 25
"""Percent, under `make test` and `make check`; `make test-full` tries all."""


def examples(n: int) -> int:
    """Return how many of `n` examples to try, where others try their 100 in full, or a part of them."""
    return max(1, n * settings().max_examples // 100)
