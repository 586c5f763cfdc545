"""How many examples a property is tried with: a quarter under `make test` and `make check`, else all."""

from __future__ import annotations

from hypothesis import settings


def examples(n: int) -> int:
    """Return how many of `n` examples to try, where others try their 100 in full, or a part of them."""
    return max(1, n * settings().max_examples // 100)
