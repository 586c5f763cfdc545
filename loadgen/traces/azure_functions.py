"""The functions of an Azure trace, and a choice of some: `top:N`, or names."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from superserve.errors import TraceError

_TOP = re.compile(r"top:([1-9][0-9]{0,8})")
_USAGE = "expected top:N, or names separated by commas"


@dataclass(frozen=True, slots=True, eq=False)
class Functions:
    """The functions of a trace, in the order in which its file first names them.

    Attributes:
        names: Each one's `app/function`, as the file writes them, shape (n_functions,).
        totals: Invocations of each in the whole file, shape (n_functions,).
    """

    names: tuple[str, ...]
    totals: npt.NDArray[np.int64]

    @property
    def n(self) -> int:
        """Return how many there are."""
        return len(self.names)

    def chosen(self, choice: str, *, source: str) -> npt.NDArray[np.bool_]:
        """Return which functions `choice` names, shape (n_functions,).

        Args:
            choice: `top:N`, the N with the most invocations (of equal ones those that come first in the
                file); or names, each a function's or `app/function`, or the beginning of either.
            source: The file's name, for errors.

        Raises:
            TraceError: There are fewer than N, or a name means no function, or several.
        """
        is_chosen = np.zeros(self.n, dtype=np.bool_)
        top = _TOP.fullmatch(choice)
        if top is not None:
            n = int(top[1])
            if n > self.n:
                raise TraceError(f"{source}: functions: top:{n}: expected at most the {self.n} that it has")
            is_chosen[np.argsort(-self.totals, kind="stable")[:n]] = True
            return is_chosen
        for name in choice.split(","):
            is_chosen[self._index(name.strip(), choice, source)] = True
        return is_chosen

    def _index(self, name: str, choice: str, source: str) -> int:
        """Return the index of the function that a name means; a full match wins over a beginning."""
        if not name or name.startswith("top:"):
            raise TraceError(f"{source}: functions: {_USAGE}, got {choice!r:.80}")
        forms = [(full, full.partition("/")[2]) for full in self.names]
        found = [i for i, form in enumerate(forms) if name in form]
        found = found or [i for i, form in enumerate(forms) if any(one.startswith(name) for one in form)]
        if len(found) == 1:
            return found[0]
        if not found:
            raise TraceError(f"{source}: functions: no function's name begins with {name!r:.80}; {_USAGE}")
        raise TraceError(
            f"{source}: functions: {len(found)} functions' names begin with {name!r:.80}, the first two being"
            f" {self.names[found[0]]} and {self.names[found[1]]}: expected a name of one"
        )
