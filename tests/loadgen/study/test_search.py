"""`loadgen search` finds the highest rate that holds, twice, and distinguishes noise from its own limits."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner, Result

from loadgen.cli import cli
from loadgen.simulator.simulate import simulate
from loadgen.study.rate_search import Bounds
from loadgen.study.search import MAX_REPEATS, RateAnswer, Search, find_rate, simulated_offer
from loadgen.traces.trace import open_source
from profiles.table import load_profile
from superserve.clock import MS

if TYPE_CHECKING:
    from pathlib import Path

    from loadgen.results.result import RunResult
    from loadgen.traces.trace import Trace


CNN = load_profile("cnn-8gpu-modelled")
BOUNDS = Bounds(1000, lowest_qps=100, highest_qps=20_000, tolerance=0.03, max_probes=20)
SIMULATE = ("search", "--simulate", "--emulate", "cnn-8gpu-modelled:1", "--duration", "0.5")
LIMIT_QPS = 3300.0


@pytest.fixture(scope="module")
def result() -> RunResult:
    """Return the figures of a run in which every query was answered in time."""
    search = searched()
    found = simulate(search.trace_at(300, 0), [CNN]).result
    assert found.queries["ok"] == found.queries["total"]
    return found


def searched(bounds: Bounds = BOUNDS, attainment: float = 0.999) -> Search:
    """Return a search with short probes."""
    source = open_source("poisson", rate_qps=bounds.start_qps)
    return Search(source, "poisson", attainment, 36 * MS, bounds, duration_s=0.5)


class Played:
    """Simulates a cluster that holds up to `LIMIT_QPS`, on a machine that disturbs the given runs."""

    def __init__(self, result: RunResult) -> None:
        self.result = result
        self.noisy: dict[int, int] = {}  # how often a rate, rounded, still fails in noise
        self.unlucky_seeds: dict[int, float] = {}  # the limit under a seed
        self.unsent_from_qps = float("inf")
        self.seen: list[tuple[float, int]] = []

    def offer(self, trace: Trace, seed: int) -> tuple[RunResult, int]:
        """Return the result of a run."""
        rate_qps = trace.mean_qps
        self.seen.append((rate_qps, seed))
        if rate_qps >= self.unsent_from_qps:
            return replace(self._failed(), valid=False, invalid_because=("too late",)), 0
        if any(abs(rate_qps / one - 1) < 0.1 and n > 0 for one, n in self.noisy.items()):
            self.noisy = {one: n - 1 for one, n in self.noisy.items()}
            return self._failed(), 9 * MS
        limit_qps = self.unlucky_seeds.get(seed, LIMIT_QPS)
        return (self.result if rate_qps <= limit_qps else self._failed()), 0

    def _failed(self) -> RunResult:
        queries = dict(self.result.queries)
        queries["ok"] -= queries["total"] // 100
        queries["late"] += queries["total"] // 100
        return replace(self.result, queries=queries)


def searching(played: Played, bounds: Bounds = BOUNDS) -> RateAnswer:
    """Return what a search of a played cluster finds; drawn rates differ a little from those asked for."""
    source = open_source("constant", rate_qps=bounds.start_qps)
    search = Search(source, "constant", 0.999, 36 * MS, bounds, duration_s=2.0)
    return find_rate(search, played.offer, lambda _: None)


def test_the_rate_found_is_within_the_tolerance_of_the_limit(result: RunResult) -> None:
    """It holds, and one at most 3 % above it fails."""
    answer = searching(Played(result))

    assert answer.rate_qps is not None
    assert answer.fails_qps is not None
    assert answer.rate_qps <= LIMIT_QPS * 1.001
    assert LIMIT_QPS * 0.999 <= answer.fails_qps <= answer.rate_qps * 1.03
    assert not answer.is_disturbed
    assert not answer.is_by_sender


def test_a_probe_that_failed_in_noise_is_repeated(result: RunResult) -> None:
    """Noise that passes does not move the answer."""
    played = Played(result)
    played.noisy = {2000: MAX_REPEATS}

    assert searching(played).rate_qps == searching(Played(result)).rate_qps


def test_noise_that_stays_is_told(result: RunResult) -> None:
    """The limit may be higher than the answer, and the output shows that."""
    played = Played(result)
    played.noisy = {2000: 100}
    answer = searching(played)

    assert answer.rate_qps is not None
    assert answer.rate_qps < 2000
    assert answer.is_disturbed
    assert "DISTURBED" in "".join(answer.to_lines(searched()))


def test_a_limit_of_the_sender_is_called_that(result: RunResult) -> None:
    """Where the load that failed was not really offered, nobody takes it for the cluster's limit."""
    played = Played(result)
    played.unsent_from_qps = 1500
    answer = searching(played)

    assert answer.rate_qps is not None
    assert answer.rate_qps < 1500
    assert answer.is_by_sender
    assert "BY THE SENDER" in "".join(answer.to_lines(searched()))


def test_lag_that_costs_no_deadline_does_not_make_a_rate_fail(result: RunResult) -> None:
    """Latency counts from when a query was due, so what was answered in time was so in spite of it."""
    late = replace(result, valid=False, invalid_because=("send lag",))

    assert searching(Played(late)).rate_qps == searching(Played(result)).rate_qps


def test_a_rate_that_held_by_luck_is_given_up_for_the_next_lower_one(result: RunResult) -> None:
    """Under the other seed only lower rates hold; the answer is one of those, and the first one fails."""
    played = Played(result)
    played.unlucky_seeds = {1: 3000}
    lucky = searching(Played(result))
    answer = searching(played)

    assert answer.rate_qps is not None
    assert lucky.rate_qps is not None
    assert answer.rate_qps <= 3000 * 1.001 < lucky.rate_qps
    assert answer.fails_qps is not None
    assert answer.fails_qps <= lucky.rate_qps
    assert {seed for rate, seed in played.seen if rate <= answer.rate_qps * 1.001} >= {0, 1}


def test_a_limit_beyond_what_was_tried_is_not_made_up(result: RunResult) -> None:
    """Where no rate fails there is no upper end; where none holds there is no answer."""
    low = replace(BOUNDS, highest_qps=2000.0)
    high = replace(BOUNDS, start_qps=8000.0, lowest_qps=4000.0)

    found, none = searching(Played(result), low), searching(Played(result), high)

    assert (found.rate_qps, found.fails_qps) == (2000, None)
    assert "higher than what was tried" in "".join(found.to_lines(searched()))
    assert none.rate_qps is None
    assert none.fails_qps == 4000


def test_a_simulated_search_finds_what_a_single_gpu_can_do() -> None:
    """The answer holds at its attainment in a simulation of its own, and 20 % more does not.

    Under `mincost`, whose capacity is one number: at its edge SlackFit holds one draw of arrivals and not
    the next.
    """
    search = searched(attainment=0.99)
    answer = find_rate(search, simulated_offer([CNN], "mincost", search.slo_ns), lambda _: None)

    assert answer.rate_qps is not None
    again = simulate(search.trace_at(answer.rate_qps, 0), [CNN], policy="mincost", seed=0).result
    above = simulate(search.trace_at(answer.rate_qps * 1.2, 0), [CNN], policy="mincost", seed=0).result
    assert again.slo_attainment is not None
    assert above.slo_attainment is not None
    assert again.slo_attainment >= 0.99 > above.slo_attainment


def loadgen(*args: str) -> Result:
    """Run a command of the load generator in this process."""
    return CliRunner().invoke(cli, list(args))


def test_the_command_prints_each_probe_and_writes_them(tmp_path: Path) -> None:
    """A line for each, the answer, and the same in the file; equal options find equal rates."""
    path = tmp_path / "search.json"
    told, again = loadgen(*SIMULATE, "--json", str(path)), loadgen(*SIMULATE)

    assert (told.exit_code, again.exit_code) == (0, 0), told.output + again.output
    found = json.loads(path.read_bytes())
    lines = [line for line in told.output.splitlines() if "attainment" in line and "q/s for" in line]
    assert len(lines) == len(found["probes"])
    assert f"highest rate     {found['rate_qps']:,.0f} q/s" in told.output
    assert f"least that fails {found['fails_qps']:,.0f} q/s" in told.output
    assert [line for line in again.output.splitlines() if "q/s for" in line] == lines
    assert found["environment"]["cluster"] == "simulated: cnn-8gpu-modelled:1"


def test_the_command_exits_1_where_no_rate_holds() -> None:
    """A script can tell."""
    told = loadgen(*SIMULATE, "--start", "9000", "--lowest", "8000")

    assert told.exit_code == 1
    assert "no rate holds" in told.output


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("search", "--simulate"), "--simulate: expected the GPUs as --emulate"),
        ((*SIMULATE, "--connect", "127.0.0.1:1"), "and no --connect"),
        ((*SIMULATE, "--start", "0.5"), "--start: expected a rate from --lowest"),
        ((*SIMULATE, "--highest", "nan"), "--highest: expected"),
        ((*SIMULATE, "--slo-ms", "0"), "--slo-ms: expected milliseconds above 0"),
        ((*SIMULATE, "--attainment", "1.5"), "--attainment"),
        ((*SIMULATE, "--policy", "slakfit"), "slackfit"),
        ((*SIMULATE, "--trace", "poison"), "poison: no such file"),
    ],
)
def test_wrong_options_are_refused(args: tuple[str, ...], message: str) -> None:
    """In one line, before anything is started."""
    told = loadgen(*args)

    assert told.exit_code in (1, 2)
    assert message in told.output
    assert "Traceback" not in told.output


def test_a_recorded_trace_is_played_as_a_whole(tmp_path: Path) -> None:
    """Faster for a higher rate: its queries are all kept."""
    out = tmp_path / "saved"
    loadgen("trace", "make", "gamma:rate=1000,cv2=4", "--duration", "1", "--out", str(out))
    path = tmp_path / "search.json"
    told = loadgen("search", "--simulate", "--emulate", "cnn-8gpu-modelled:2", "--trace", str(out),
                   "--json", str(path))  # fmt: skip

    assert told.exit_code == 0, told.output
    probes = json.loads(path.read_bytes())["probes"]
    assert len({probe["queries"]["total"] for probe in probes}) == 1
    assert all(
        probe["duration_s"] * probe["rate_qps"] == pytest.approx(probe["queries"]["total"], rel=1e-3)
        for probe in probes
    )


@pytest.mark.e2e
def test_a_live_search_ends_with_an_answer_that_its_event_logs_bear_out(tmp_path: Path) -> None:
    """Against emulated GPUs, with an attainment that any machine reaches at the lowest rate."""
    path = tmp_path / "search.json"
    told = loadgen("search", "--emulate", "cnn-8gpu-modelled:1", "--attainment", "0.2", "--duration", "0.5",
                   "--start", "100", "--lowest", "100", "--highest", "200", "--slo-ms", "500",
                   "--json", str(path))  # fmt: skip

    assert told.exit_code == 0, told.output
    found = json.loads(path.read_bytes())
    assert found["rate_qps"] in (100, 200)
    assert len(found["probes"]) >= 3
    assert "no violations" in told.output
