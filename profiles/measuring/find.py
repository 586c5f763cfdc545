"""Make a profile of the best subnets that a search finds, for one device."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson

from gpu_worker.models.kinds import RANDOM, SupernetKind, fitted, supernet_kind
from gpu_worker.supernet.calibration import save_statistics
from profiles.measuring.accuracy import Judge, MeasuredAccuracy, judge_of
from profiles.measuring.flops import CostCounter, FittedLatency, fit_on_device, spread
from profiles.measuring.measure import Measurement, fit, torch_place
from profiles.measuring.search import Candidate, Space, search
from profiles.table import Profile, SubnetProfile, statistics_path
from superserve.errors import ConfigError
from superserve.files import write_whole
from superserve.subnet import Subnet

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import numpy.typing as npt

    from gpu_worker.engines.torch_executor import Placement
    from gpu_worker.supernet.control import Control
    from gpu_worker.supernet.supernet import Supernet
    from profiles.measuring.search import Front, SearchEffort
    from superserve.clock import Clock

    Floats = npt.NDArray[np.float64]

Progress = Callable[[str, int, int], None]
"""Receives what is being done, how much of it is done, and of how much."""

_POOL = 200  # random subnets; the ones to measure are spread over their costs
_RUNNERS_UP = 4  # evaluated again with the front, on more examples; two of them are the space's ends


@dataclass(frozen=True, slots=True)
class Request:
    """What to find.

    Attributes:
        supernet: Its name: see `gpu_worker.models.kinds`.
        placement: Where it will serve, with the profile's batch sizes.
        effort: How far to search.
        n_subnets: Most rows.
        weights: A checkpoint's path, "random", or None for the shipped one.
        predictor: OFA-ResNet50's published accuracy predictor; None measures accuracy.
        examples: What to measure it on: see `gpu_worker.models.examples`; None for the supernet's own.
    """

    supernet: str
    placement: Placement
    effort: SearchEffort
    n_subnets: int = 32
    weights: str | None = None
    predictor: Path | None = None
    examples: Path | None = None

    def __post_init__(self) -> None:
        if self.n_subnets < 2:
            raise ConfigError(f"subnets: expected at least 2, got {self.n_subnets}")
        if len(self.placement.batch_sizes) < 2:
            raise ConfigError(f"batch_sizes: expected at least two, got {list(self.placement.batch_sizes)}")


@dataclass(frozen=True, slots=True)
class Found:
    """A searched profile, and what is written with it.

    Attributes:
        profile: Of the pareto subnets.
        raw: What latencies were fitted to, or the measured ones.
        n_judged: Networks whose accuracy was evaluated.
        supernet: Holds the statistics of the profile's subnets; None if accuracy was predicted.
        dropped: Subnets that the measurement left out.
    """

    profile: Profile
    raw: Mapping[str, Any]
    n_judged: int
    supernet: Supernet | None = None
    dropped: tuple[str, ...] = ()

    def write(self, path: Path) -> Path | None:
        """Write the profile, and SubnetNorm's statistics beside it; return the path of the latter, if any."""
        path.parent.mkdir(parents=True, exist_ok=True)
        document = {**self.profile.to_dict(), "raw": self.raw}
        write_whole(path, orjson.dumps(document, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
        if self.supernet is None or not self.supernet.norms:
            return None
        beside = statistics_path(path)
        subnets = [Subnet(row.name, row.control) for row in self.profile.subnets]
        save_statistics(beside, self.supernet, self.profile.supernet, subnets)
        return beside


def find_profile(
    request: Request,
    *,
    name: str,
    clock: Clock,
    remeasure: Callable[[Profile], Measurement] | None = None,
    on_progress: Progress = lambda _what, _done, _total: None,
) -> Found:
    """Search a supernet and make a profile of its pareto subnets.

    Args:
        request: What to find.
        name: Of the profile.
        clock: Times the runs that latencies are fitted to.
        remeasure: Measures every subnet of a profile, to replace the fitted latencies.
        on_progress: Receives the progress.

    Raises:
        ConfigError: The supernet, its weights, the device or an accuracy is not available; names it.
    """
    kind = fitted(supernet_kind(request.supernet), request.weights)
    judge = judge_of(kind, request.weights, request.predictor, request.examples, request.placement)
    counter = CostCounter(kind)
    space = Space(counter.supernet)
    latency = fit_on_device(
        request.supernet,
        [(counter(control), control) for control in _pool(space, request.effort.seed)],
        weights=request.weights,
        placement=request.placement,
        clock=clock,
        on_round=lambda done, total: on_progress("measuring a few subnets", done, total),
    )
    front = search(
        space, judge, counter, request.effort, lambda done, total: on_progress("searching", done, total)
    )
    on_progress("judging", 0, 1)
    note, supernet = "", None
    if isinstance(judge, MeasuredAccuracy):
        supernet = judge.supernet
        chosen, note = _finals(front, judge, latency, kind, request.n_subnets)
    else:
        chosen = _chosen(front.candidates, latency, request.n_subnets)
    on_progress("judging", 1, 1)
    place = torch_place(request.placement.device, request.placement.threads or 1)
    profile = Profile(
        name=name,
        supernet=kind.name,
        device=place.device,
        source="modelled",
        provenance=_provenance(
            request, judge, front.n_judged, note, latency.words if remeasure is None else ""
        ),
        versions=place.versions,
        date=datetime.now(UTC).date().isoformat(),
        batch_sizes=request.placement.batch_sizes,
        subnets=_profile_rows(chosen, latency, kind),
    )
    if remeasure is None:
        return Found(profile, {"latency_fit": latency.raw}, front.n_judged, supernet)
    measured = remeasure(profile)
    return Found(measured.profile, measured.raw, front.n_judged, supernet, measured.dropped)


def _pool(space: Space, seed: int) -> list[Control]:
    """Return different subnets from all over the space, including its ends."""
    rng = np.random.default_rng((seed, _POOL))
    drawn = [*space.ends, *(space.levelled(rng) for _ in range(_POOL))]
    found = {space.signature(genome): space.control(space.canonical(genome)) for genome in drawn}
    return list(found.values())


def servable(accuracies: Sequence[float], latency_ms: Floats) -> list[int]:
    """Return the rows that a profile can hold, by ascending accuracy: each slower one is more accurate.

    Args:
        accuracies: Percents; values that are equal to two decimals count as equal.
        latency_ms: (subnets, batch sizes), compared by their geometric means.
    """
    mean_log = np.log(latency_ms).mean(axis=1)
    rounded = [round(accuracy, 2) for accuracy in accuracies]
    kept: list[int] = []
    for row in sorted(range(len(rounded)), key=lambda row: (-rounded[row], mean_log[row])):
        if not kept or (rounded[row] < rounded[kept[-1]] and mean_log[row] < mean_log[kept[-1]]):
            kept.append(row)
    return kept[::-1]


def _servable(candidates: Sequence[Candidate], latency: FittedLatency) -> list[int]:
    latency_ms = latency.median_ms([candidate.cost for candidate in candidates])
    return servable([candidate.accuracy for candidate in candidates], latency_ms)


def _chosen(candidates: Sequence[Candidate], latency: FittedLatency, n: int) -> list[Candidate]:
    """Return up to `n` candidates that a profile can hold, evenly spread over their accuracies."""
    rows = _servable(candidates, latency)
    return [candidates[rows[i]] for i in spread([candidates[row].accuracy for row in rows], n)]


def _finals(
    front: Front, judge: MeasuredAccuracy, latency: FittedLatency, kind: SupernetKind, n: int
) -> tuple[list[Candidate], str]:
    """Choose by more selection examples, then report the chosen ones' accuracy on the held-out examples.

    The search has few examples, which may misrank the next best. The supernet then holds the statistics.
    """
    finalists = [*front.candidates, *front.others[:_RUNNERS_UP]]
    subnets = [Subnet(f"{number}", candidate.control) for number, candidate in enumerate(finalists)]
    statistics = judge.calibrated(subnets)
    selected = _chosen(_rejudged(finalists, judge.selection(subnets, statistics)), latency, n)
    numbers = [[one.control for one in finalists].index(one.control) for one in selected]
    again = _rejudged(selected, judge.held_out([subnets[number] for number in numbers], statistics))
    rows = _servable(again, latency)
    kept = [again[row] for row in rows]
    note = (
        f"There the kept subnets average {np.mean([selected[row].accuracy for row in rows]):.2f} %, on the "
        f"held-out ones {np.mean([candidate.accuracy for candidate in kept]):.2f} %; "
        f"{len(selected) - len(rows)} that the held-out ones rank out of order were left out."
    )
    if statistics:
        judge.supernet.set_statistics(
            {_name(kind, again[row]): statistics[f"{numbers[row]}"] for row in rows}
        )
    return kept, note


def _rejudged(candidates: Sequence[Candidate], accuracies: Sequence[float]) -> list[Candidate]:
    return [one._replace(accuracy=accuracy) for one, accuracy in zip(candidates, accuracies, strict=True)]


def _profile_rows(
    chosen: Sequence[Candidate], latency: FittedLatency, kind: SupernetKind
) -> tuple[SubnetProfile, ...]:
    # Monotone at every batch size, not only in the mean; rows that this makes equal become one.
    median = np.rint(1e6 * fit(latency.median_ms([candidate.cost for candidate in chosen])))  # ns
    p99 = np.rint(median * (latency.p99_ratio / latency.median_ratio))
    return tuple(
        SubnetProfile(
            name=_name(kind, candidate),
            control=candidate.control,
            accuracy=round(candidate.accuracy, 2),
            gflops=round(candidate.cost.gflops, 6),
            latency_ns=tuple(map(int, median[row])),
            latency_p99_ns=tuple(map(int, p99[row])),
        )
        for row, candidate in enumerate(chosen)
        if row == len(chosen) - 1 or (median[row] != median[row + 1]).any()
    )


def _name(kind: SupernetKind, candidate: Candidate) -> str:
    """Return the name for tables: the supernet's first word and the accuracy, which is unique."""
    return f"{re.split('[^A-Za-z0-9]', kind.name)[0]}-{candidate.accuracy:.2f}"


def _provenance(request: Request, judge: Judge, n_judged: int, note: str, latency: str) -> str:
    effort = request.effort
    found = (
        f"Found by profiles.search: seed {effort.seed}, {effort.generations} generations of "
        f"{effort.population}; {n_judged} different subnets were judged."
    )
    weights = "Weights were random, on which latencies do not depend." if request.weights == RANDOM else ""
    return " ".join(part for part in (found, judge.words, note, latency, weights) if part)
