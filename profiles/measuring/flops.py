"""What a subnet costs: multiply-adds, counted in passes that compute nothing, and a latency fitted to them.

A pass on torch's meta device has shapes and no numbers. `CostCounter` makes one for each subnet, and
skips every part in it that it has met before with the same input and the same sizes: so the
thousandth subnet costs a few operations, for any model.

Latency is fitted to a few measured subnets, separately for each batch size: a constant, plus a term for
each multiply-add and one for each kernel, none of them below 0. So a subnet that costs no more in either
is never modelled as slower.
"""

from __future__ import annotations

import itertools
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from gpu_worker.engines.torch_executor import TorchExecutor, example_input
from gpu_worker.supernet.operators import Operator, Switched, operators_in
from superserve.errors import ConfigError
from superserve.subnet import Subnet

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy.typing as npt
    from torch import nn

    from gpu_worker.engines.torch_executor import Placement
    from gpu_worker.models.kinds import SupernetKind
    from gpu_worker.supernet.control import Control
    from gpu_worker.supernet.operators import Cursor
    from gpu_worker.supernet.supernet import Supernet
    from profiles.measuring.measure import TimedExecutor
    from superserve.clock import Clock

    Floats = npt.NDArray[np.float64]


_LOG = logging.getLogger(__name__)


class Cost(NamedTuple):
    """What one query costs on a subnet, on any device.

    Attributes:
        multiply_adds: Of convolutions, linear layers and attention's products.
        kernels: Number of these operations that run.
    """

    multiply_adds: int
    kernels: int

    @property
    def gflops(self) -> float:
        """Billions of multiply-adds, as profiles give them."""
        return self.multiply_adds / 1e9

    def plus(self, other: Cost) -> Cost:
        """Return the sum."""
        return Cost(*(mine + its for mine, its in zip(self, other, strict=True)))

    def less(self, other: Cost) -> Cost:
        """Return the difference."""
        return Cost(*(mine - its for mine, its in zip(self, other, strict=True)))


def meta_supernet(kind: SupernetKind) -> Supernet:
    """Return the supernet without any numbers: only sizes and shapes."""
    with torch.device("meta"):
        return kind.build().eval()


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Sums the costs of the operations for which torch has a formula; splits others up."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # as above
        self.total = Cost(0, 0)

    def __torch_dispatch__(
        self, func: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        flops = flop_registry.get(func._overloadpacket)
        if flops is None:
            with self:
                parts = func.decompose(*args, **kwargs)
            return func(*args, **kwargs) if parts is NotImplemented else parts
        out = func(*args, **kwargs)
        # The formulas count a multiply-add as two.
        n_flops = flops(*args, **kwargs, out_val=out)
        self.total = self.total.plus(Cost(n_flops // 2, 1))
        return out


class _Known(NamedTuple):
    """The output and the cost of a part."""

    shape: torch.Size
    dtype: torch.dtype
    cost: Cost


class CostCounter:
    """Counts what subnets of one supernet cost, by torch's own formulas, including attention's products.

    A model that reads numbers in its forward pass cannot run without any: it is counted on the CPU, in whole
    passes.
    """

    def __init__(self, kind: SupernetKind) -> None:
        self._counter = _Counter()
        try:
            self.supernet = meta_supernet(kind)
            self._input = example_input(self.supernet, kind, torch.float32)
            with torch.inference_mode():
                self.supernet(self._input)
        except Exception as error:  # noqa: BLE001  the model's, of any kind
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            _LOG.info("counting on the CPU: the model does not run on torch's meta device: %s", reason)
            self.supernet = kind.build().eval()
            self._input = example_input(self.supernet, kind, torch.float32)
            return
        for part in _parts(self.supernet.model):
            part.forward = _remembering(
                part, self.supernet.cursor, self._counter
            )  # only on this instance, which is private

    def __call__(self, control: Control) -> Cost:
        """Return the cost of one query on the subnet with this control tuple.

        Raises:
            ConfigError: The tuple does not fit, or the model cannot run.
        """
        settings = self.supernet.settings_of(Subnet("counted", control))
        try:
            # A CPU's own kernel for attention has no formula; its plain products have.
            with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH):
                if not self._input.is_meta:  # at first the whole network may run too, to follow channels
                    self.supernet.run_with(settings, self._input)
                before = self._counter.total
                with self._counter:
                    self.supernet.run_with(settings, self._input)
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            raise ConfigError(
                f"multiply-adds: the model cannot run the subnet {control}: {reason}"
            ) from error
        return self._counter.total.less(before)


def _parts(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the blocks that subnets may leave out, and the operators outside them."""
    for child in model.children():
        if isinstance(child, Switched | Operator):
            yield child
        else:
            yield from _parts(child)


def _remembering(part: nn.Module, cursor: Cursor, counter: _Counter) -> Callable[..., Any]:
    """Return the part's forward, which adds the known cost instead of running again.

    A part's output and cost depend on the shapes of its input and on its settings.
    """
    forward = part.forward
    inside = _places_in(part)
    known: dict[Any, _Known] = {}

    def remembering(*args: Any, **kwargs: Any) -> Any:
        settings = cursor.settings
        key = (
            tuple(map(_outline, args)),
            tuple((name, _outline(value)) for name, value in kwargs.items()),
            tuple(settings[place] for place in inside),
        )
        if key in known:
            shape, dtype, cost = known[key]
            counter.total = counter.total.plus(cost)
            return torch.empty(shape, dtype=dtype, device="meta")
        before = counter.total
        out = forward(*args, **kwargs)
        if isinstance(out, torch.Tensor):  # a part with several outputs runs every time
            known[key] = _Known(out.shape, out.dtype, counter.total.less(before))
        return out

    return remembering


def _outline(value: object) -> object:
    return (value.shape, value.dtype) if isinstance(value, torch.Tensor) else value


def _places_in(module: nn.Module) -> tuple[int, ...]:
    """Return the entries of the settings that a module depends on: operators' and switches'."""
    operators = [operator.place for operator in operators_in(module)]
    return (*operators, *(part.switch_place for part in module.modules() if isinstance(part, Switched)))


Around = list[tuple[int, ...]]
"""The switches around a layer: one row for each block that contains it."""


def surroundings(model: nn.Module) -> list[Around]:
    """Return the surroundings of each operator and each switch, in the order of the settings."""
    found: dict[int, Around] = {}

    def walk(module: nn.Module, around: tuple[int, ...]) -> None:
        if isinstance(module, Switched):
            found.setdefault(module.switch_place, []).append(around)
            around = (*around, module.switch_place)
        if isinstance(module, Operator):
            found.setdefault(module.place, []).append(around)
        for child in module.children():
            walk(child, around)

    walk(model, ())
    return [found[place] for place in sorted(found)]


def runs(around: Around, settings: Sequence[Any]) -> bool:
    """Return whether something with these surroundings runs under these settings."""
    return any(all(settings[switch] for switch in switches) for switches in around)


# --- latency --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LatencyModel:
    """Milliseconds of a batch, from the cost of one of its queries.

    Attributes:
        batch_sizes: Ascending.
        coefficients: For each batch size: milliseconds constant, per billion multiply-adds, per kernel.
    """

    batch_sizes: tuple[int, ...]
    coefficients: tuple[tuple[float, ...], ...]

    def latency_ms(self, costs: Sequence[Cost]) -> Floats:
        """Return (subnets, batch sizes), in milliseconds; it grows with the batch size."""
        table = _features(costs) @ np.array(self.coefficients).T
        return np.asarray(np.maximum.accumulate(table, axis=1))

    def extended(self, batch_sizes: Sequence[int]) -> LatencyModel:
        """Return the model with these batch sizes; new ones are on lines through the known ones.

        Raises:
            ConfigError: There are new ones, and fewer than two known sizes for a line.
        """
        known = dict(zip(self.batch_sizes, self.coefficients, strict=True))
        further = [size for size in batch_sizes if size not in known]
        if further and len(known) < 2:
            raise ConfigError(f"batch_sizes: expected two that were measured, got {list(known)}")
        lines = np.polyfit(self.batch_sizes, np.array(self.coefficients), 1) if further else None
        for size in further:
            assert lines is not None, "it is there whenever a size is not known"
            slope, start = lines
            known[size] = tuple(np.maximum(start + slope * size, 0).tolist())
        return LatencyModel(tuple(batch_sizes), tuple(known[size] for size in batch_sizes))


def fit_latency(costs: Sequence[Cost], batch_sizes: Sequence[int], latency_ms: Floats) -> LatencyModel:
    """Fit a model to measured subnets: least squares of relative errors, without negative coefficients.

    Args:
        costs: Of each measured subnet.
        batch_sizes: Ascending.
        latency_ms: Medians, (subnets, batch sizes).
    """
    features = _features(costs)
    # Relative errors, so that small subnets, which serve bursts, are fitted as well as large ones.
    fitted = [non_negative(features / column[:, np.newaxis], np.ones(len(column))) for column in latency_ms.T]
    return LatencyModel(tuple(batch_sizes), tuple(tuple(row.tolist()) for row in fitted))


def _features(costs: Sequence[Cost]) -> Floats:
    """Return (subnets, 3): one, billions of multiply-adds, kernels."""
    return np.array([(1.0, cost.gflops, cost.kernels) for cost in costs])


_NOTHING = 1e-100


def non_negative(a: Floats, b: Floats) -> Floats:
    """Return the x >= 0 that minimises |a x - b|, for few columns: tries every subset of them."""
    # Scale each column: beside a column of ones, lstsq treats one of 1e-55 as zero, and products of
    # subnormal numbers overflow. A column below `_NOTHING` has no effect that a float could hold.
    unit = a.max(axis=0)
    columns = np.flatnonzero(unit > _NOTHING)
    scaled = a[:, columns] / unit[columns]
    best, least = np.zeros(a.shape[1]), float(b @ b)
    for n in range(1, len(columns) + 1):
        for chosen in map(list, itertools.combinations(range(len(columns)), n)):
            x, *_ = np.linalg.lstsq(scaled[:, chosen], b)
            if (x < 0).any():
                continue
            error = float(np.sum((scaled[:, chosen] @ x - b) ** 2))
            if error < least:
                best, least = np.zeros(a.shape[1]), error
                best[columns[chosen]] = x / unit[columns[chosen]]
    return best


def relative_errors(model: LatencyModel, costs: Sequence[Cost], latency_ms: Floats) -> Floats:
    """Return |modelled / measured - 1| of each subnet and batch size of the model."""
    return np.asarray(np.abs(model.latency_ms(costs) / latency_ms - 1))


# --- on a device ----------------------------------------------------------------------------

_N_MEASURED = 12  # subnets; most of them to fit the model to, the others to check it
_ROUNDS = (3, 30)  # least and most, after the first, in which every shape is new to the device
_BUDGET_NS = 45_000_000_000  # for the least rounds; larger batch sizes that exceed it are not measured
_MORE_NS = 4_000_000_000  # for further rounds
_MEAN_SHARE = 0.55  # cost of the mean of subnets spread over a space, as a share of the largest's


class FittedLatency(NamedTuple):
    """A latency model of one device.

    Attributes:
        model: Of the least latency of each subnet and batch size, which other load disturbs least.
        median_ratio: Of a median to a least latency, over all measurements.
        p99_ratio: Of a 99th percentile to a least latency.
        words: How it was made, and how far off it is.
        raw: The measurements.
    """

    model: LatencyModel
    median_ratio: float
    p99_ratio: float
    words: str
    raw: dict[str, Any]

    def median_ms(self, costs: Sequence[Cost]) -> Floats:
        """Return medians, (subnets, batch sizes)."""
        return self.model.latency_ms(costs) * self.median_ratio


def spread(values: Sequence[float], n: int) -> list[int]:
    """Return up to `n` indices, ascending, of values that are evenly apart, including the ends.

    Each further one is the farthest from all chosen ones.
    """
    at = np.asarray(values, dtype=np.float64)
    if len(at) <= n:
        return list(range(len(at)))
    chosen = [int(at.argmin())]
    distance = np.abs(at - at[chosen[0]])
    distance[at.argmax()] = np.inf  # the second choice, though rounding may put another as far
    while len(chosen) < n:
        distance[chosen] = -1  # with equal values too, each index is chosen once
        chosen.append(int(distance.argmax()))
        distance = np.minimum(distance, np.abs(at - at[chosen[-1]]))
    return sorted(chosen)


def fit_on_device(
    supernet: str,
    pool: Sequence[tuple[Cost, Control]],
    *,
    weights: str | None,
    placement: Placement,
    clock: Clock,
    on_round: Callable[[int, int], None] = lambda _done, _total: None,
) -> FittedLatency:
    """Measure a dozen subnets of a pool, spread over its costs, and fit a latency model to them.

    Args:
        supernet: Its name.
        pool: Different subnets.
        weights: As `gpu_worker.engines.torch_executor.TorchExecutor.load` takes them.
        placement: The device, and the batch sizes of the model.
        clock: Times the runs.
        on_round: Receives how many rounds are done, and of how many.
    """
    priced = sorted(pool, key=lambda priced: priced[0])
    few = [priced[i] for i in spread([np.log(cost.multiply_adds) for cost, _ in priced], _N_MEASURED)]
    subnets = [Subnet(f"measured-{number}", control) for number, (_, control) in enumerate(few)]
    executor = TorchExecutor.load(supernet, subnets, weights=weights, placement=placement)
    if executor.device.type == "cuda":
        executor.warm_up()  # captures graphs; on a CPU the first round warms up
    costs = [cost for cost, _ in few]
    return measure_and_fit(executor, costs, placement.batch_sizes, clock, on_round)


def measure_and_fit(
    executor: TimedExecutor,
    costs: Sequence[Cost],
    batch_sizes: Sequence[int],
    clock: Clock,
    on_round: Callable[[int, int], None] = lambda _done, _total: None,
) -> FittedLatency:
    """Measure a few subnets on a device and fit a latency model to most of them.

    Every third one is held out and shows how far the model is off. If large batches would take
    too long, only the small ones are measured, and the others are on lines through them.

    Args:
        executor: Hosts the subnets, by ascending multiply-adds, from the smallest to the largest.
        costs: Of these subnets.
        batch_sizes: Of the model, ascending.
        clock: Times the runs.
        on_round: Receives how many rounds are done, and of how many.
    """
    assert len(executor.subnets) == len(costs), "one cost for each subnet"
    query_ns = _query_ns(executor, batch_sizes[0], clock)
    sizes = _affordable(query_ns, batch_sizes)
    n_rounds = int(np.clip(_MORE_NS / (query_ns * sum(sizes)), *_ROUNDS))
    samples = _sample_few(executor, sizes, n_rounds, clock, on_round)
    least_ms = samples.min(axis=0) / 1e6
    is_held_out = np.array([row % 3 == 2 and row < len(costs) - 1 for row in range(len(costs))])
    fitted = [cost for cost, is_out in zip(costs, is_held_out, strict=True) if not is_out]
    others = [cost for cost, is_out in zip(costs, is_held_out, strict=True) if is_out]
    model = fit_latency(fitted, sizes, least_ms[~is_held_out])
    ratios = samples / samples.min(axis=0)
    words = _words(len(fitted), sizes, batch_sizes, relative_errors(model, others, least_ms[is_held_out]))
    return FittedLatency(
        model.extended(batch_sizes),
        float(np.median(ratios)),
        float(np.quantile(ratios, 0.99)),
        words,
        _raw(executor, costs, sizes, least_ms, is_held_out),
    )


def _query_ns(executor: TimedExecutor, size: int, clock: Clock) -> float:
    """Return about how long one query takes, summed over all hosted subnets, in batches of `size`."""
    largest = len(executor.subnets) - 1
    took = [_time_one(executor, largest, size, clock) for _ in range(3)]
    return min(took) / size * _MEAN_SHARE * len(executor.subnets)


def _affordable(query_ns: float, batch_sizes: Sequence[int]) -> tuple[int, ...]:
    """Return the sizes, from the smallest on, that can be measured within the budget; at least two."""
    round_ns = [query_ns * n_queries for n_queries in itertools.accumulate(batch_sizes)]
    n_affordable = sum(one * (1 + _ROUNDS[0]) <= _BUDGET_NS for one in round_ns)
    return tuple(batch_sizes[: max(2, n_affordable)])


def _sample_few(
    executor: TimedExecutor,
    batch_sizes: Sequence[int],
    n_rounds: int,
    clock: Clock,
    on_round: Callable[[int, int], None],
) -> npt.NDArray[np.int64]:
    """Return nanoseconds, (rounds, subnets, batch sizes), without the first round.

    `profiles.measuring.measure` warms up for longer and fits tails; here every pass counts.
    """
    rounds = []
    for done in range(1 + n_rounds):
        # Interleaved, so that a busy moment of the machine affects neighbours alike.
        rounds.append(
            [
                [_time_one(executor, row, size, clock) for size in batch_sizes]
                for row in range(len(executor.subnets))
            ]
        )
        on_round(done + 1, 1 + n_rounds)
    return np.array(rounds[1:], dtype=np.int64)


def _time_one(executor: TimedExecutor, row: int, size: int, clock: Clock) -> int:
    spec = executor.input_spec
    batch = np.ones((size, *spec.shape), dtype=spec.dtype)  # dense layers take equally long for any input
    before_ns = clock.now_ns()
    executor.execute(row, batch)
    return max(1, clock.now_ns() - before_ns)


def _words(n_fitted: int, sizes: Sequence[int], batch_sizes: Sequence[int], errors: Floats) -> str:
    further = [size for size in batch_sizes if size not in sizes]
    lines = f" Batch sizes {_listed(further)} lie on lines through these." if further else ""
    return (
        "Latencies are modelled, not measured one by one: least squares in multiply-adds and kernels, "
        f"fitted to {n_fitted} subnets measured at batch sizes {_listed(sizes)}.{lines} "
        f"On {len(errors)} further measured subnets the model was {100 * errors.mean():.0f} % off in the "
        f"mean and {100 * errors.max():.0f} % at most."
    )


def _listed(sizes: Sequence[int]) -> str:
    return ", ".join(map(str, sizes))


def _raw(
    executor: TimedExecutor, costs: Sequence[Cost], sizes: Sequence[int], least_ms: Floats, is_held_out: Any
) -> dict[str, Any]:
    return {
        "batch_sizes": list(sizes),
        "subnets": [
            {
                "control": subnet.control,
                "gflops": cost.gflops,
                "kernels": cost.kernels,
                "least_ms": row.round(6).tolist(),
                "fitted_to": not is_out,
            }
            for subnet, cost, row, is_out in zip(
                executor.subnets, costs, least_ms, is_held_out.tolist(), strict=True
            )
        ],
    }
