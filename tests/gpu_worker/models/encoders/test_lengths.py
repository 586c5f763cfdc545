"""Batches of texts are cut to the smallest bucket that holds the longest of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_worker.models.encoders.lengths import Lengths
from superserve.errors import ConfigError


@pytest.mark.parametrize(
    ("longest", "buckets"),
    [
        (1, (1,)),
        (16, (16,)),
        (17, (16, 17)),
        (64, (16, 32, 48, 64)),
        (128, (16, 32, 48, 64, 96, 128)),
        (200, (16, 32, 48, 64, 96, 128, 192, 200)),
    ],
)
def test_buckets_go_up_to_the_longest(longest: int, buckets: tuple[int, ...]) -> None:
    """Powers of two from 16, and what lies halfway, below the longest; and the longest."""
    assert Lengths.up_to(longest).buckets == buckets


@given(st.integers(1, 600), st.data())
def test_a_bucket_holds_the_longest_text_and_no_smaller_one_does(longest: int, data: st.DataObject) -> None:
    """Nothing but padding is cut off, of one array and of queries that lie apart."""
    lengths = Lengths.up_to(longest, padding=3)
    used = data.draw(st.lists(st.integers(1, longest), min_size=1, max_size=4))
    batch = np.full((len(used), longest), 3, np.int32)
    for row, n in zip(batch, used, strict=True):
        row[:n] = 7
    for cut in (lengths.cut(batch), lengths.cut(list(batch))):
        n = np.shape(cut)[-1]

        assert n in lengths.buckets
        assert n >= max(used)
        assert all(size < max(used) for size in lengths.buckets if size < n)
        assert n <= max(16, max(used) * (1.5 if max(used) > 32 else 2))
        np.testing.assert_array_equal(cut, batch[:, :n])


def test_a_pair_is_as_long_as_its_token_ids() -> None:
    """Token types are cut with them, and a padding id within a text is not its end."""
    batch = np.zeros((1, 2, 64), np.int32)
    batch[0, 0, :20] = 5
    batch[0, 0, 7] = 0
    batch[0, 1, :60] = 1

    assert np.shape(Lengths.up_to(64).cut(batch)) == (1, 2, 32)


def test_a_text_without_tokens_costs_as_much_as_any() -> None:
    """What stands for a query in a measurement, zeros, is not faster than a real one."""
    assert np.shape(Lengths.up_to(64).cut(np.zeros((2, 64), np.int32))) == (2, 64)


@pytest.mark.parametrize("buckets", [(), (0, 4), (8, 4), (4, 4)])
def test_buckets_that_are_none_are_refused(buckets: tuple[int, ...]) -> None:
    """They ascend from 1."""
    with pytest.raises(ConfigError, match="buckets: expected ascending lengths of at least 1"):
        Lengths(buckets)
