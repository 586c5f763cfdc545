"""Measuring on a device whose latencies are known: a fake executor that moves a virtual clock."""

from __future__ import annotations

import itertools
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from profiles.cli import cli
from profiles.measuring.measure import (
    MIN_ROUNDS,
    Place,
    Setting,
    fit,
    isotonic,
    measure,
    pareto_rows,
    percentile_99,
    thinned,
)
from profiles.table import SubnetProfile, load_profile
from superserve.clock import MS
from superserve.errors import ConfigError
from superserve.subnet import Subnet, TensorSpec
from tests.clock import ProcessorClock, VirtualClock

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy.typing as npt

PLACE = Place("a fake", {"fake": "1"})

LATENCIES = st.lists(st.floats(0.1, 1e3), min_size=1, max_size=8).map(np.array)


class FakeExecutor:
    """Takes `base_ms * (1 + batch size)` a batch; every tenth run ten times as long."""

    def __init__(self, clock: VirtualClock, base_ms: Sequence[float]) -> None:
        self.rows = tuple(
            SubnetProfile(f"s{row}", {"d": [row + 1]}, 80.0 + row, 0.1 * row, (), ())
            for row in range(len(base_ms))
        )
        self.subnets = tuple(Subnet(row.name, row.control) for row in self.rows)
        self.input_spec = TensorSpec("float32", (2,))
        self.n_runs = 0
        self._base_ms = base_ms
        self._clock = clock

    def execute(self, subnet: int, batch: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Move the clock."""
        assert batch.shape[1:] == self.input_spec.shape
        self.n_runs += 1
        hiccup = 10 if self.n_runs % 10 == 0 else 1
        self._clock.advance(round(hiccup * self._base_ms[subnet] * (1 + len(batch)) * MS))
        return batch


@pytest.mark.parametrize("rounds", [50, 200])
def test_a_measured_profile_has_the_true_medians(rounds: int, tmp_path: Path) -> None:
    """Hiccups move the p99, not the median, and the file loads as a profile."""
    clock = VirtualClock()
    executor = FakeExecutor(clock, [1.0, 2.0, 4.0])
    setting = Setting(batch_sizes=(1, 2, 4), rounds=rounds)
    measurement = measure(executor, executor.rows, setting, PLACE, name="fake", supernet="none", clock=clock)
    path = tmp_path / "fake.json"
    path.write_bytes(measurement.to_json())
    profile = load_profile(path)

    assert profile == measurement.profile
    assert profile.source == "measured"
    assert [subnet.latency_ns for subnet in profile.subnets] == [
        tuple(base * (1 + size) * MS for size in (1, 2, 4)) for base in (1, 2, 4)
    ]
    assert all(subnet.latency_p99_ns[0] >= 5 * subnet.latency_ns[0] for subnet in profile.subnets)
    assert set(json.loads(path.read_bytes())["raw"]) == {"s0", "s1", "s2"}


def test_a_subnet_that_pays_nothing_is_left_out() -> None:
    """s1 is slower than the more accurate s2: it is dropped, and named; its figures stay in raw."""
    clock = VirtualClock()
    executor = FakeExecutor(clock, [1.0, 4.0, 3.0])
    setting = Setting(batch_sizes=(1, 2), rounds=20)
    measurement = measure(executor, executor.rows, setting, PLACE, name="fake", supernet="none", clock=clock)

    assert [subnet.name for subnet in measurement.profile.subnets] == ["s0", "s2"]
    assert measurement.dropped == ("s1",)
    assert "s1" in measurement.raw


def test_the_budget_ends_the_rounds() -> None:
    """Once the time is spent no round starts, but a few are always measured."""
    clock = VirtualClock()
    executor = FakeExecutor(clock, [1.0])
    setting = Setting(batch_sizes=(1,), rounds=1000, budget_ns=1)
    measurement = measure(executor, executor.rows, setting, PLACE, name="fake", supernet="none", clock=clock)

    assert f"{MIN_ROUNDS} interleaved rounds" in measurement.profile.provenance


@given(values=LATENCIES)
def test_isotonic_ascends_and_keeps_the_mean(values: npt.NDArray[np.float64]) -> None:
    """Pooling makes the values ascend and moves none of their sum."""
    fitted = isotonic(values)

    assert all(before <= after for before, after in itertools.pairwise(fitted.tolist()))
    assert fitted.sum() == pytest.approx(values.sum())
    assert np.array_equal(isotonic(np.sort(values)), np.sort(values))


@given(
    table=st.integers(1, 5).flatmap(
        lambda width: st.lists(
            st.lists(st.floats(0.1, 1e3), min_size=width, max_size=width), min_size=1, max_size=5
        ).map(np.array)
    )
)
def test_a_fitted_table_ascends_both_ways(table: npt.NDArray[np.float64]) -> None:
    """P1 and P2 hold of any fitted table, to the last bit."""
    fitted = fit(table)

    assert fitted.shape == table.shape
    assert (np.diff(fitted, axis=0) >= 0).all()
    assert (np.diff(fitted, axis=1) >= 0).all()


@given(scores=st.lists(st.floats(0.1, 1e3), min_size=1, max_size=8))
def test_the_most_accurate_subnet_is_always_kept(scores: list[float]) -> None:
    """Kept rows ascend in latency and end with the most accurate."""
    rows = pareto_rows(np.array(scores)[:, np.newaxis])

    assert rows[-1] == len(scores) - 1
    assert all(scores[before] < scores[after] for before, after in itertools.pairwise(rows))


@pytest.mark.parametrize("seed", range(4))
def test_any_noise_leaves_rows_that_a_profile_can_have(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is slower than the one before at some size; the most accurate is among them.

    Two rounds, of whose runs two in five wait for up to 30 ms: of the 50 tables of a seed the fit makes rows
    equal in some.
    """
    subnets = load_profile("digits-cpu").subnets
    true_ns = np.array([[row.latency_ns[0], 1.6 * row.latency_ns[0]] for row in subnets])
    rng, clock = np.random.default_rng(seed), VirtualClock()
    fake = FakeExecutor(clock, [])
    for _ in range(50):
        shape = (2, *true_ns.shape)
        waits_ns = np.where(rng.random(shape) < 0.4, rng.integers(0, 30 * MS, shape), 0)
        samples = (true_ns + waits_ns).astype(np.int64)
        monkeypatch.setattr("profiles.measuring.measure.sample", lambda *_, found=samples: found)
        setting = Setting(batch_sizes=(1, 2), rounds=2)
        done = measure(fake, subnets, setting, PLACE, name="x", supernet="digits", clock=clock)

        assert done.profile.subnets[-1].name == subnets[-1].name
        assert len(done.profile.subnets) + len(done.dropped) == len(subnets)


@pytest.mark.parametrize(
    ("at_most", "rows"), [(None, [0, 1, 2, 3, 4, 5]), (9, [0, 1, 2, 3, 4, 5]), (3, [0, 2, 5])]
)
def test_a_thinned_profile_keeps_its_ends(at_most: int | None, rows: list[int]) -> None:
    """The given number of rows, evenly spread; all of them if there are no more."""
    profile = load_profile("cnn-8gpu-modelled")

    assert thinned(profile, at_most).subnets == tuple(profile.subnets[row] for row in rows)


def test_few_rounds_share_their_tail() -> None:
    """With few rounds one hiccup does not become one cell's p99."""
    samples = np.full((20, 2, 2), 1000)
    samples[3, 1, 1] = 50_000

    shared = percentile_99(samples)
    assert len(set(shared.flatten().tolist())) == 1


def test_a_stall_in_a_short_cell_is_no_ratio_of_a_long_one() -> None:
    """Stalls of 15 ms, 150 times what the small subnet takes, are 15 ms of a large one of 18, not seconds."""
    samples = np.tile(np.array([[100_000], [18 * MS]]), (20, 1, 1))
    samples[3, 0, 0] += 15 * MS
    samples[9, 0, 0] += 15 * MS

    (small,), (large,) = percentile_99(samples).tolist()
    assert small == 100_000 + 15 * MS
    assert large == 18 * MS + 15 * MS


def test_a_long_cell_does_not_lengthen_the_tail_of_a_short_one() -> None:
    """Where all cells vary in proportion, a tail is that proportion, not the milliseconds of the longest."""
    samples = np.tile(np.array([[100_000], [18 * MS]]), (20, 1, 1))
    samples[5:8] *= 2

    (small,), (large,) = percentile_99(samples).tolist()
    assert small == 200_000
    assert large == 36 * MS


@pytest.mark.parametrize("batch_sizes", [(), (0, 1), (2, 1), (1, 1)])
def test_batch_sizes_ascend(batch_sizes: tuple[int, ...]) -> None:
    """A setting refuses sizes that could not head a profile's columns."""
    with pytest.raises(ConfigError, match="batch_sizes: expected ascending"):
        Setting(batch_sizes=batch_sizes, rounds=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--supernet", "digit"],
            "supernet: expected one of digits, ofa-resnet50, dynabert, ofa-mobilenet-v3,",
        ),
        (["--supernet", "digit"], "did you mean 'digits'?"),
        (["--supernet", "os:path"], "supernet os:path: expected a SupernetKind, got module"),
        (["--supernet", "nobody.here:kind"], "supernet nobody.here:kind: No module named 'nobody'"),
        (["--supernet", "ofa-resnet50"], "--subnets: ofa-resnet50 comes without a profile"),
        (
            ["--subnets", "cnn-8gpu-modelled"],
            "subnets: expected a profile of digits, got one of ofa-resnet50",
        ),
        (["--weights", "absent.pt"], "absent.pt: expected a safetensors or .pt file"),
        (["--precision", "int4"], "precision: expected auto, float32, float16, bfloat16, got 'int4'"),
        (["--device", "tpu"], "device: expected cpu, cuda or cuda:<n>, got 'tpu'"),
        (["--batch-sizes", "1,x"], "--batch-sizes: expected whole numbers"),
        (["--batch-sizes", "2,1"], "batch_sizes: expected ascending"),
        (["--repeats", "0"], "repeats: expected at least 1, got 0"),
        (["--threads", "0"], "threads: expected at least 1, got 0"),
    ],
)
def test_a_bad_option_is_one_clear_line(options: list[str], message: str, tmp_path: Path) -> None:
    """The command fails, names the option, and writes nothing."""
    out = tmp_path / "out.json"
    result = CliRunner().invoke(cli, ["measure", "--out", str(out), *options])

    assert result.exit_code == 1
    assert message in result.output
    assert len(result.output.splitlines()) == 1
    assert not out.exists()


def test_the_command_writes_a_profile_of_the_shipped_supernet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it writes loads, and was measured here."""
    # By the real clock, twice each, other work may leave no order among the subnets that a profile can have.
    monkeypatch.setattr("profiles.measuring.commands.MonotonicClock", ProcessorClock)
    out = tmp_path / "here.json"
    arguments = ["measure", "--batch-sizes", "1,2", "--repeats", "2", "--out", str(out)]
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)

    assert result.exit_code == 0, result.output
    profile = load_profile(out)
    assert (profile.name, profile.supernet, profile.source) == ("here", "digits", "measured")
    assert profile.batch_sizes == (1, 2)
    assert {"python", "torch", "numpy"} <= set(profile.versions)
