"""Lengths: texts of different length in one batch.

On the wire every query has the longest length, filled up with padding. A batch is cut to the smallest bucket
that holds its longest text, so that short texts do not pay for long ones, and a device sees few shapes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from superserve.errors import ConfigError, InvalidQueryError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    Batch = npt.NDArray[Any] | Sequence[npt.NDArray[Any]]

_ROWS = ("token ids", "token types")
_LEAST = 16  # shorter batches gain little: what a layer costs beside its tokens is as much


@dataclass(frozen=True, slots=True)
class Lengths:
    """The lengths that batches of token ids are cut to.

    A query is (T,) token ids, or (2, T): token ids, and token types.

    Attributes:
        buckets: Ascending; the last is T.
        padding: The token id that fills up shorter queries at their end.
        limits: The number of token ids, and of token types if a query has them; () checks none.
    """

    buckets: tuple[int, ...]
    padding: int = 0
    limits: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        sizes = list(self.buckets)
        if not sizes or sizes[0] < 1 or sizes != sorted(set(sizes)):
            raise ConfigError(f"buckets: expected ascending lengths of at least 1, got {sizes}")

    @classmethod
    def up_to(cls, longest: int, padding: int = 0, limits: tuple[int, ...] = ()) -> Lengths:
        """Return the buckets 16, 32, 48, 64, 96, 128, ... up to `longest`.

        Beyond 32 at most a third of the longest text's bucket is padding.
        """
        powers = [_LEAST << n for n in range(longest.bit_length())]
        sizes = sorted({*powers, *(3 * power // 2 for power in powers[1:])})
        return cls((*(size for size in sizes if size < longest), longest), padding, limits)

    @property
    def longest(self) -> int:
        """Tokens of a query on the wire."""
        return self.buckets[-1]

    def cut(self, batch: Batch) -> npt.NDArray[Any]:
        """Return a batch (B, ..., T), or B queries that lie apart, cut to the bucket that holds all of them.

        A query without any token counts as the longest: no tokenizer makes one, and what stands for a query
        in a measurement must not cost less than any text.

        Raises:
            InvalidQueryError: An id is none of the model's. On a GPU the lookup would end the whole process.
        """
        texts = batch if isinstance(batch, np.ndarray) else np.stack(batch)
        rows = texts.reshape(len(texts), -1, texts.shape[-1])  # (B, 1 or 2, T)
        self._check(rows)
        is_token = rows[:, 0] != self.padding  # (B, T)
        n_behind = is_token[:, ::-1].argmax(1)  # padding behind the last token; 0 if there is none
        found: npt.NDArray[Any] = texts[..., : self._bucket(self.longest - int(n_behind.min()))]
        return found

    def _check(self, rows: npt.NDArray[Any]) -> None:
        for number, limit in enumerate(self.limits):
            ids = rows[:, number]
            least, most = int(ids.min()), int(ids.max())
            if least < 0 or most >= limit:
                got = least if least < 0 else most
                raise InvalidQueryError(f"{_ROWS[number]}: expected 0 to {limit - 1}, got {got}")

    def _bucket(self, length: int) -> int:
        return next(size for size in self.buckets if size >= length)
