"""Lengths: texts of different length in one batch.

On the wire every query has the longest length, filled up with padding. A batch is cut to the smallest bucket
that holds its longest text, so that short texts do not pay for long ones, and a device sees few shapes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from superserve.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    Batch = npt.NDArray[Any] | Sequence[npt.NDArray[Any]]

_LEAST = 16  # shorter batches gain little: what a layer costs beside its tokens is as much


@dataclass(frozen=True, slots=True)
class Lengths:
    """The lengths that batches of token ids are cut to.

    A query is (T,) token ids, or (2, T): token ids, and token types.

    Attributes:
        buckets: Ascending; the last is T.
        padding: The token id that fills up shorter queries at their end.
    """

    buckets: tuple[int, ...]
    padding: int = 0

    def __post_init__(self) -> None:
        sizes = list(self.buckets)
        if not sizes or sizes[0] < 1 or sizes != sorted(set(sizes)):
            raise ConfigError(f"buckets: expected ascending lengths of at least 1, got {sizes}")

    @classmethod
    def up_to(cls, longest: int, padding: int = 0) -> Lengths:
        """Return the buckets 16, 32, 48, 64, 96, 128, ... up to `longest`.

        Beyond 32 at most a third of the longest text's bucket is padding.
        """
        powers = [_LEAST << n for n in range(longest.bit_length())]
        sizes = sorted({*powers, *(3 * power // 2 for power in powers[1:])})
        return cls((*(size for size in sizes if size < longest), longest), padding)

    @property
    def longest(self) -> int:
        """Tokens of a query on the wire."""
        return self.buckets[-1]

    def cut(self, batch: Batch) -> Batch:
        """Return a batch (B, ..., T), or B queries that lie apart, as views of the bucket that holds them.

        A query without any token counts as the longest: no tokenizer makes one, and what stands for a query
        in a measurement must not cost less than any text.
        """
        n = self._bucket(max(map(self._length, batch)))
        return batch[..., :n] if isinstance(batch, np.ndarray) else [query[..., :n] for query in batch]

    def _length(self, query: npt.NDArray[Any]) -> int:
        ids = query if query.ndim == 1 else query[0]
        tokens = np.flatnonzero(ids != self.padding)
        return int(tokens[-1]) + 1 if len(tokens) else self.longest

    def _bucket(self, length: int) -> int:
        return next(size for size in self.buckets if size >= length)
