"""The benchmark harness: its search, its files, and one row measured end to end. No time is asserted."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import psutil  # type: ignore[import-untyped]  # it has no stubs
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from loadgen.bench import table as bench
from loadgen.bench.rows.calls import decision_us, wide_profile
from loadgen.bench.rows.row import BenchRow
from loadgen.study.rate_search import Bounds, Probe, confirmed, highest_rate, undisturbed
from profiles.table import load_profile

if TYPE_CHECKING:
    from pathlib import Path
    from random import Random

MS = 1_000_000
FIELDS = {"name", "value", "unit", "reference", "reference_value", "ratio", "machine", "date"}
BOUNDS = Bounds(start_qps=8_000, lowest_qps=100, highest_qps=100_000, tolerance=0.05, max_probes=40)

rates = st.floats(101, 99_999)


def probe(rate_qps: float, *, holds: bool, noise_ns: int = 0) -> Probe:
    """Return a probe without measuring anything."""
    return Probe(rate_qps, share=1.0 if holds else 0.5, holds=holds, noise_ns=noise_ns)


@given(limit_qps=rates, start_qps=rates)
def test_the_search_comes_as_close_as_its_tolerance(limit_qps: float, start_qps: float) -> None:
    """Of a limit within the bounds it finds a rate below it, at most 5 % away, wherever it starts."""
    bounds = Bounds(start_qps, lowest_qps=100, highest_qps=100_000, tolerance=0.05, max_probes=40)

    found = highest_rate(lambda rate: rate <= limit_qps, bounds)

    assert found is not None
    assert found <= limit_qps <= found * 1.05 * (1 + 1e-9)


@given(limit_qps=st.floats(1, 1e6), max_probes=st.integers(1, 10))
def test_the_search_is_bounded_and_returns_what_it_tried(limit_qps: float, max_probes: int) -> None:
    """It probes at most `max_probes` rates, all within the bounds, and returns the highest that held."""
    tried: list[float] = []

    def holds(rate_qps: float) -> bool:
        tried.append(rate_qps)
        return rate_qps <= limit_qps

    found = highest_rate(holds, Bounds(8_000, lowest_qps=100, highest_qps=100_000, max_probes=max_probes))

    assert len(tried) <= max_probes
    assert all(100 <= rate <= 100_000 for rate in tried)
    assert found == max((rate for rate in tried if rate <= limit_qps), default=None)


def test_nothing_holds_and_everything_holds() -> None:
    """The search returns None if even the lowest rate fails, and stops at the highest one."""
    assert highest_rate(lambda _: False, BOUNDS) is None
    assert highest_rate(lambda _: True, BOUNDS) == BOUNDS.highest_qps


@given(limit_qps=rates, rng=st.randoms(use_true_random=False))
def test_noise_that_strikes_once_a_rate_does_not_move_the_search(limit_qps: float, rng: Random) -> None:
    """Probes spoiled by noise, never the same rate twice, are repeated: the rate found is the same."""
    spoiled: set[float] = set()

    def offer(rate_qps: float) -> Probe:
        if rate_qps not in spoiled and rng.random() < 0.5:
            spoiled.add(rate_qps)
            return probe(rate_qps, holds=False, noise_ns=9 * MS)
        return probe(rate_qps, holds=rate_qps <= limit_qps)

    found = highest_rate(lambda rate: undisturbed(offer, rate, noisy_ns=4 * MS).holds, BOUNDS)

    assert found == highest_rate(lambda rate: rate <= limit_qps, BOUNDS)


@pytest.mark.parametrize(
    ("holds", "noise_ms", "n_runs"), [(True, 9, 1), (False, 1, 1), (False, 9, 2), (True, 1, 1)]
)
def test_only_a_failure_in_noise_is_repeated(*, holds: bool, noise_ms: int, n_runs: int) -> None:
    """A probe is repeated, once, exactly if it failed and the machine was noisy."""
    tried: list[float] = []

    def offer(rate_qps: float) -> Probe:
        tried.append(rate_qps)
        return probe(rate_qps, holds=holds, noise_ns=noise_ms * MS)

    found = undisturbed(offer, 100, noisy_ns=4 * MS)

    assert found.holds == holds
    assert len(tried) == n_runs


def test_nothing_is_repeated_once_time_is_up() -> None:
    """When a search has had its time, a failure in noise stands: the benchmarks end."""
    tried: list[float] = []

    def offer(rate_qps: float) -> Probe:
        tried.append(rate_qps)
        return probe(rate_qps, holds=False, noise_ns=9 * MS)

    found = confirmed(offer, 100, noisy_ns=4 * MS, steps=(1.0, 0.5), may_repeat=lambda: False)

    assert not found.holds
    assert tried == [100, 50]


@given(limit_qps=st.floats(1, 2_000))
def test_a_rate_is_confirmed_or_lowered(limit_qps: float) -> None:
    """The confirmed rate held in a long run; if no step does, the probe says so."""
    found = confirmed(lambda rate: probe(rate, holds=rate <= limit_qps), 1_000, noisy_ns=4 * MS)

    assert found.holds == (found.rate_qps <= limit_qps)
    assert found.holds == (limit_qps >= 500)


def test_a_row_writes_the_fields_of_its_file(tmp_path: Path) -> None:
    """A file has every field; the ratio is value over reference."""
    row = BenchRow("some_qps", 30.0, "q/s", "echo", 60.0, {"senders": 1}, 1.5)

    bench.write(row, tmp_path)

    written = json.loads((tmp_path / "some_qps.json").read_text())
    assert set(written) >= FIELDS
    assert (written["value"], written["ratio"], written["noise_p99_9_ms"]) == (30.0, 0.5, 1.5)
    assert written["conditions"] == {"senders": 1}


def test_what_was_not_found_is_null(tmp_path: Path) -> None:
    """A rate that no run confirmed is null, not a number, in the file; a dash in the table."""
    row = BenchRow("some_qps", None, "q/s", "echo", 60.0)

    bench.write(row, tmp_path)

    written = json.loads((tmp_path / "some_qps.json").read_text())
    assert written["value"] is None
    assert written["ratio"] is None
    assert "-" in bench.table([row])[1]


def test_a_profile_of_1000_subnets_is_a_profile() -> None:
    """The wide profile keeps a profile's rules, which its constructor checks."""
    assert wide_profile(1_000).n_subnets == 1_000


def test_gpus_come_with_the_rate() -> None:
    """There are 2 at least, and enough for 1,200 q/s each."""
    assert bench.n_gpus(10) == 2
    assert bench.n_gpus(40_000) == 34


@pytest.mark.parametrize("policy", ["planfit", "slackfit"])
def test_a_decision_takes_some_microseconds(policy: str) -> None:
    """The measurement of a row, in two rounds of a thousand decisions: of a policy that sees demand, too."""
    assert decision_us(policy, load_profile("cnn-8gpu-modelled"), n_rounds=2) > 0


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("name", ["policy_decision_us", "actuation_us"])
def test_single_calls_are_measured(name: str, tmp_path: Path) -> None:
    """The command writes the row's file and prints it."""
    result = CliRunner().invoke(bench.cli, ["--only", name, "--out", str(tmp_path)])

    assert result.exit_code == 0, result.output
    assert name in result.output
    if "skipped" not in result.output:
        written = json.loads((tmp_path / f"{name}.json").read_text())
        assert set(written) >= FIELDS
        assert written["value"] > 0


@pytest.mark.e2e
def test_a_row_is_measured_end_to_end_and_leaves_no_process(tmp_path: Path) -> None:
    """At low load the path and the echo both answer; afterwards every process is gone."""
    result = CliRunner().invoke(
        bench.cli, ["--only", "added_latency_p50_ms", "--seconds", "0.2", "--out", str(tmp_path)]
    )

    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "added_latency_p50_ms.json").read_text())
    assert written["value"] > 0
    assert written["reference_value"] > 0
    assert written["conditions"]["gpus"] == 8
    assert psutil.Process().children(recursive=True) == []


@pytest.mark.e2e
def test_an_interrupt_leaves_no_process(tmp_path: Path) -> None:
    """Ctrl-C in the middle of a run ends the command and every process that it started."""
    argv = ["-m", "loadgen.bench", "--only", "added_latency_p50_ms", "--seconds", "5", "--out", str(tmp_path)]
    with subprocess.Popen([sys.executable, *argv], stdout=subprocess.DEVNULL) as command:
        own = psutil.Process(command.pid)
        while not (children := own.children(recursive=True)):
            time.sleep(0.05)
        command.send_signal(signal.SIGINT)
        exit_code = command.wait(30)

    assert exit_code != 0
    psutil.wait_procs(children, timeout=5)
    assert not any(child.is_running() for child in children)


@pytest.mark.e2e
@pytest.mark.parametrize("target", ["client", "async-client"])
def test_queries_through_a_client_are_offered_and_answered(target: str) -> None:
    """A few hundred queries a second, each a `submit`: a share of them is in time, none is lost."""
    found = bench.Bench(0.5, lambda _: None)._offer_client(target, 300.0, 0.5)

    assert 0 < found.share <= 1
    assert psutil.Process().children(recursive=True) == []
