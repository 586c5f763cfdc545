"""Linear and integer programs, column by column, and bounds on them that hold whatever the solver did.

HiGHS stops within tolerances, or at a time limit, and a published bound must not depend on that. For a
linear program the solver's duals are used, and the value that weak duality proves from them is computed
here: any duals prove a bound, good ones a tight one. For an integer program the solver's dual bound is
used, never the best solution that it found.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from superserve.errors import ConfigError, ProcessError

if TYPE_CHECKING:
    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]
    Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Bound:
    """What is proved about a maximisation.

    Attributes:
        upper: No solution is worth more.
        found: The worth of the best solution found; None if there is none.
        is_optimal: Whether the solver reports `found` as the optimum, within its tolerances.
    """

    upper: float
    found: float | None
    is_optimal: bool


class Program:
    """Maximise worth @ x over 0 <= x <= upper, with lower <= entries @ x <= upper for each row."""

    def __init__(self) -> None:
        self._worth: list[Floats] = []
        self._upper: list[Floats] = []
        self._integral: list[npt.NDArray[np.bool_]] = []
        self._row_lower: list[Floats] = []
        self._row_upper: list[Floats] = []
        self._entries: list[tuple[Ints, Ints, Floats]] = []
        self.n_columns = 0
        self.n_rows = 0

    def columns(self, n: int, *, worth: Any = 0.0, upper: Any, integral: bool = False) -> Ints:
        """Add n variables from 0 to a finite `upper`; return their numbers, shape (n,)."""
        self._worth.append(_spread(worth, n))
        self._upper.append(_spread(upper, n))
        self._integral.append(np.full(n, integral))
        self.n_columns += n
        return np.arange(self.n_columns - n, self.n_columns)

    def rows(self, n: int, *, lower: Any = -np.inf, upper: Any = np.inf) -> Ints:
        """Add n constraints; return their numbers, shape (n,)."""
        self._row_lower.append(_spread(lower, n))
        self._row_upper.append(_spread(upper, n))
        self.n_rows += n
        return np.arange(self.n_rows - n, self.n_rows)

    def add(self, rows: Ints, columns: Ints, values: Any) -> None:
        """Add an entry for each (row, column) pair; each pair at most once in a program."""
        self._entries.append((rows, columns, _spread(values, len(rows))))

    def maximise(self, *, time_limit_s: float) -> Bound:
        """Solve, and return what that proves.

        Raises:
            ConfigError: highspy is not installed.
            ProcessError: The solver ended without a bound.
        """
        highspy = _highspy()
        # The class below its wrapper: the wrapper prints a banner before it can be silenced.
        solver = highspy.Highs.__base__()
        solver.setOptionValue("output_flag", False)
        solver.setOptionValue("time_limit", time_limit_s)
        is_integer = any(part.any() for part in self._integral)
        if not is_integer:
            # Vertices are not needed, and finding one takes half the time.
            solver.setOptionValue("solver", "ipm")
            solver.setOptionValue("run_crossover", "off")
        solver.passModel(self._model(highspy))
        solver.run()
        is_optimal = solver.getModelStatus() == highspy.HighsModelStatus.kOptimal
        info = solver.getInfo()
        has_solution = info.primal_solution_status == highspy.SolutionStatus.kSolutionStatusFeasible
        found = -info.objective_function_value if has_solution else None
        if is_integer:
            return Bound(min(-info.mip_dual_bound, self._trivial()), found, is_optimal)
        duals = np.asarray(solver.getSolution().row_dual, dtype=np.float64)
        if len(duals) != self.n_rows:
            raise ProcessError(f"bound: the solver gave no duals within {time_limit_s:g} s: allow it longer")
        return Bound(self._proved(duals), found, is_optimal)

    def _trivial(self) -> float:
        """Return the worth of all variables at their upper limits, for a solver that proved nothing."""
        return float(np.maximum(np.concatenate(self._worth), 0) @ np.concatenate(self._upper))

    def _proved(self, duals: Floats) -> float:
        """Return the bound that weak duality proves from any prices of the rows.

        With prices p of the rows, worth @ x = p @ (A x) + (worth - p @ A) @ x. The first part is at
        most each price times the limit of its row on that side, the second at most each positive
        remainder times the limit of its variable.
        """
        lower, upper = np.concatenate(self._row_lower), np.concatenate(self._row_upper)
        prices = -duals  # HiGHS solved a minimisation
        limit = np.where(prices > 0, upper, lower)
        prices = np.where(np.isfinite(limit), prices, 0.0)
        limit = np.where(np.isfinite(limit), limit, 0.0)
        rows, columns, values = self._triples()
        paid = np.bincount(columns, weights=prices[rows] * values, minlength=self.n_columns)
        left = np.maximum(np.concatenate(self._worth) - paid, 0.0)
        return float(prices @ limit + left @ np.concatenate(self._upper))

    def _triples(self) -> tuple[Ints, Ints, Floats]:
        rows, columns, values = zip(*self._entries, strict=True)
        return np.concatenate(rows), np.concatenate(columns), np.concatenate(values)

    def _model(self, highspy: Any) -> Any:
        """Return the program in HiGHS's form: minimised, entries by column."""
        rows, columns, values = self._triples()
        order = np.lexsort((rows, columns))
        model = highspy.HighsLp()
        model.num_col_, model.num_row_ = self.n_columns, self.n_rows
        model.col_cost_ = -np.concatenate(self._worth)
        model.col_lower_ = np.zeros(self.n_columns)
        model.col_upper_ = np.concatenate(self._upper)
        model.row_lower_ = np.concatenate(self._row_lower)
        model.row_upper_ = np.concatenate(self._row_upper)
        starts = np.searchsorted(columns[order], np.arange(self.n_columns + 1))
        model.a_matrix_.format_ = highspy.MatrixFormat.kColwise
        model.a_matrix_.start_ = starts.astype(np.int32)
        model.a_matrix_.index_ = rows[order].astype(np.int32)
        model.a_matrix_.value_ = values[order]
        if any(part.any() for part in self._integral):
            kinds = (highspy.HighsVarType.kContinuous, highspy.HighsVarType.kInteger)
            model.integrality_ = [kinds[int(one)] for one in np.concatenate(self._integral)]
        return model


def _spread(value: Any, n: int) -> Floats:
    return np.broadcast_to(np.asarray(value, dtype=np.float64), (n,))


def _highspy() -> Any:
    try:
        import highspy  # noqa: PLC0415 - an extra: nothing else here needs it
    except ModuleNotFoundError as error:
        raise ConfigError(
            "bound: needs highspy: install superserve[bound], or pip install highspy"
        ) from error
    return highspy
