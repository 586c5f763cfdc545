"""A run's figures are exact, its file checks out, and its validity follows the rule."""

from __future__ import annotations

import threading
from dataclasses import fields, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadgen.results.result import (
    LAG_QUANTILES,
    LATENCY_QUANTILES,
    OUTCOMES,
    NoiseProbe,
    RunResult,
    judge_validity,
    load_run,
    quantile_ns,
    quantiles_ms,
)
from loadgen.traces.arrivals import arrivals_cv2
from superserve.clock import MS
from superserve.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path


DURATIONS = st.lists(st.integers(-(2**53), 2**53), min_size=1, max_size=3_000)
RUN = RunResult(
    trace="poisson:rate=100",
    policy="slackfit",
    slo_ms=36.0,
    duration_s=1.0,
    offered_qps=100.0,
    realised_qps=99.0,
    realised_cv2=1.02,
    queries={"total": 100, **dict.fromkeys(OUTCOMES, 0), "ok": 98, "late": 1, "unsent": 1},
    slo_attainment=0.98,
    mean_accuracy=78.5,
    goodput_qps=98.0,
    latency_ms={"p50": 5.0, "p90": 9.0, "p99": 20.0, "p99_9": 40.0, "max": 40.0},
    send_lag_ms={"p50": 0.01, "p99": 0.1, "p99_9": 0.2, "max": 0.2},
    batch_size_mean=7.5,
    subnet_share={"small": 0.25, "large": 0.75},
    valid=False,
    invalid_because=("1 queries stayed unsent",),
)
QUIET = RunResult(
    trace="empty",
    policy="slackfit",
    slo_ms=36.0,
    duration_s=0.0,
    offered_qps=0.0,
    realised_qps=0.0,
    realised_cv2=None,
    queries={"total": 0, **dict.fromkeys(OUTCOMES, 0)},
    slo_attainment=None,
    mean_accuracy=None,
    goodput_qps=0.0,
    latency_ms=dict.fromkeys(LATENCY_QUANTILES),
    send_lag_ms=dict.fromkeys(LAG_QUANTILES),
    batch_size_mean=None,
    subnet_share={},
    valid=True,
    invalid_because=(),
)


def defined_quantile(values: list[int], permille: int) -> int:
    """Return the smallest value that at least `permille` thousandths do not exceed, by trying all."""
    for value in sorted(values):
        share = Fraction(sum(other <= value for other in values), len(values))
        if share >= Fraction(permille, 1000):
            return value
    raise AssertionError("the maximum is not exceeded by any")


@given(values=st.lists(st.integers(-(2**53), 2**53), min_size=1, max_size=60), permille=st.integers(1, 1000))
def test_a_quantile_is_what_its_definition_says(values: list[int], permille: int) -> None:
    """Against exhaustive search with exact fractions."""
    assert quantile_ns(np.array(values, dtype=np.int64), permille) == defined_quantile(values, permille)


@given(values=DURATIONS)
def test_all_quantiles_are_elements_of_the_sorted_array(values: list[int]) -> None:
    """Nearest rank: the p99.9 of 1,000 values is the second largest, never between two."""
    ordered, n = sorted(values), len(values)
    ranks = {
        "p50": Fraction(1, 2),
        "p90": Fraction(9, 10),
        "p99": Fraction(99, 100),
        "p99_9": Fraction(999, 1000),
    }
    expected = {name: ordered[-(-n * share // 1) - 1] / MS for name, share in ranks.items()}

    assert quantiles_ms(np.array(values, dtype=np.int64)) == {**expected, "max": ordered[-1] / MS}


def test_no_durations_have_no_quantiles() -> None:
    """None rather than a number that nobody measured."""
    nothing = np.array([], dtype=np.int64)

    assert quantiles_ms(nothing) == dict.fromkeys(LATENCY_QUANTILES)
    assert quantiles_ms(nothing, LAG_QUANTILES) == dict.fromkeys(LAG_QUANTILES)
    assert quantile_ns(nothing, 999) is None


def test_quantiles_leave_their_input_alone() -> None:
    """The caller's array keeps its order: it runs parallel to others."""
    values = np.array([3, 1, 2], dtype=np.int64)

    quantiles_ms(values)
    quantile_ns(values, 500)

    assert values.tolist() == [3, 1, 2]


def test_cv2_tells_clockwork_from_poisson_from_bursts() -> None:
    """0 for equal gaps, about 1 for Poisson arrivals, more for bursts."""
    seeded = np.random.default_rng(1)
    poisson = np.cumsum(seeded.exponential(1e6, 100_000)).astype(np.int64)

    assert arrivals_cv2(np.arange(0, 1_000, 10)) == 0.0
    assert arrivals_cv2(poisson) == pytest.approx(1.0, abs=0.03)
    assert arrivals_cv2(np.array([0, 1, 2, 3, 1_000])) == pytest.approx(2.976, abs=0.001)


def test_cv2_does_not_depend_on_the_order_of_arrivals() -> None:
    """Instants from several senders come interleaved."""
    assert arrivals_cv2(np.array([30, 0, 10])) == arrivals_cv2(np.array([0, 10, 30])) == pytest.approx(1 / 9)


@pytest.mark.parametrize("arrivals", [[], [1], [1, 2], [5, 5, 5]])
def test_too_few_arrivals_have_no_cv2(arrivals: list[int]) -> None:
    """Fewer than two gaps, or gaps of nothing."""
    assert arrivals_cv2(np.array(arrivals, dtype=np.int64)) is None


@pytest.mark.parametrize("run", [RUN, QUIET, replace(QUIET, disturbed=True)])
def test_a_run_result_is_read_back_as_it_was_written(run: RunResult, tmp_path: Path) -> None:
    """Also one without a single query."""
    path = tmp_path / "run.json"
    path.write_text(run.to_json())

    assert load_run(path) == run


def test_a_run_result_has_the_fields_that_others_read() -> None:
    """The design's list, in its order."""
    in_the_design = (
        "schema trace policy slo_ms duration_s offered_qps realised_qps realised_cv2 queries"
        " slo_attainment mean_accuracy goodput_qps latency_ms send_lag_ms batch_size_mean"
        " subnet_share valid invalid_because disturbed"
    )

    assert " ".join(orjson.loads(RUN.to_json())) == in_the_design
    assert orjson.loads(orjson.dumps(RUN.to_dict())) == orjson.loads(RUN.to_json())


def test_numpys_numbers_are_numbers() -> None:
    """Figures straight from NumPy pass the check and reach the file as plain numbers."""
    counts: dict[str, Any] = {outcome: np.int64(count) for outcome, count in RUN.queries.items()}
    run = replace(RUN, slo_ms=np.float64(36.0), queries=counts)

    run.check()

    assert run.to_json() == RUN.to_json()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("schema", 2),
        ("trace", None),
        ("slo_ms", "36"),
        ("slo_ms", True),
        ("goodput_qps", float("nan")),
        ("realised_cv2", "1"),
        ("queries", {"total": 0}),
        ("queries", {**RUN.queries, "ok": 97}),
        ("queries", {**RUN.queries, "ok": -1}),
        ("queries", {**RUN.queries, "ok": 98.0}),
        ("slo_attainment", 0.99),
        ("slo_attainment", None),
        ("latency_ms", {"p50": 1.0}),
        ("send_lag_ms", RUN.latency_ms),
        ("subnet_share", {"small": "all"}),
        ("valid", 1),
        ("invalid_because", ()),
        ("invalid_because", (1,)),
        ("disturbed", "yes"),
        ("reasons", {"LATE": 1}),
        ("timeline", []),
        ("environment", "here"),
    ],
)
def test_a_wrong_field_is_an_error_that_names_it(field: str, value: Any, tmp_path: Path) -> None:
    """In a result about to be written, and in a file, which is named too."""
    wrong = {**RUN.to_dict(), field: value}
    path = tmp_path / "run.json"
    path.write_bytes(orjson.dumps(wrong))

    with pytest.raises(ConfigError, match=f"^{field}.*: expected"):
        replace(RUN, **{field: value}).check()
    with pytest.raises(ConfigError, match=rf"run\.json: {field}.*: expected"):
        load_run(path)


OPTIONAL = (
    "disturbed", "partial", "reasons", "timeline", "environment", "calibration", "quantiles", "generators",
    "gaps", "lanes",
)  # fmt: skip


@pytest.mark.parametrize("field", [field.name for field in fields(RunResult) if field.name not in OPTIONAL])
def test_a_missing_field_is_an_error_that_names_it(field: str, tmp_path: Path) -> None:
    """All are required but "disturbed", which is false when absent, and what a run may not have kept."""
    path = tmp_path / "run.json"
    path.write_bytes(orjson.dumps({name: value for name, value in RUN.to_dict().items() if name != field}))

    with pytest.raises(ConfigError, match=rf"run\.json: {field}: expected .*, got nothing"):
        load_run(path)


def test_further_fields_are_left_to_their_readers(tmp_path: Path) -> None:
    """A file may carry more, such as a report's time series."""
    path = tmp_path / "run.json"
    more = {**RUN.to_dict(), "series": [1, 2]}
    del more["disturbed"]
    path.write_bytes(orjson.dumps(more))

    assert load_run(path) == RUN


@pytest.mark.parametrize(
    ("text", "expected"), [("", "expected JSON"), ("{", "expected JSON"), ("[]", r"an object, got \[\]")]
)
def test_a_file_that_holds_no_run_is_an_error_that_names_it(text: str, expected: str, tmp_path: Path) -> None:
    """As is a file that is not there."""
    path = tmp_path / "run.json"
    path.write_text(text)

    with pytest.raises(ConfigError, match=rf"run\.json: .*{expected}"):
        load_run(path)
    with pytest.raises(ConfigError, match=r"absent\.json: expected a readable run result"):
        load_run(tmp_path / "absent.json")


# SLO 36 ms: 5 % is 1.8 ms.
@pytest.mark.parametrize(
    ("lag_us", "noise_us", "unsent", "valid", "disturbed"),
    [
        pytest.param(100, 60, 0, True, False, id="quiet"),
        pytest.param(1_800, 0, 0, True, False, id="exactly 5 %"),
        pytest.param(1_801, 0, 0, False, False, id="over 5 %, no noise"),
        pytest.param(1_801, 900, 0, False, False, id="over 5 %, over twice the noise"),
        pytest.param(1_802, 901, 0, True, True, id="over 5 %, exactly twice the noise"),
        pytest.param(1_500, 10, 0, True, False, id="over twice the noise, under 5 %"),
        pytest.param(1_500, 9_000, 0, True, False, id="noise alone"),
        pytest.param(100, 60, 1, False, False, id="unsent"),
        pytest.param(5_000, 60, 1, False, False, id="unsent and late"),
        pytest.param(5_000, 5_000, 1, False, True, id="unsent and disturbed"),
        pytest.param(None, 60, 9, False, False, id="nothing sent"),
        pytest.param(None, 60, 0, True, False, id="nothing to send"),
        pytest.param(5_000, None, 0, False, False, id="late, no probe"),
    ],
)
def test_validity_follows_the_rule(
    lag_us: int | None, noise_us: int | None, unsent: int, valid: bool, disturbed: bool
) -> None:
    """Invalid when unsent, or late beyond both 5 % of the SLO and twice the noise."""
    verdict = judge_validity(
        lag_p99_9_ns=None if lag_us is None else lag_us * 1_000,
        noise_p99_9_ns=None if noise_us is None else noise_us * 1_000,
        slo_ns=36 * MS,
        unsent=unsent,
    )

    assert (verdict.valid, verdict.disturbed) == (valid, disturbed)
    assert bool(verdict.reasons) == (not valid)


def test_every_reason_is_given() -> None:
    """A run can fail twice, and says so in words."""
    _, _, reasons = judge_validity(lag_p99_9_ns=5 * MS, noise_p99_9_ns=1 * MS, slo_ns=36 * MS, unsent=3)

    assert len(reasons) == 2
    assert "3 queries stayed unsent" in reasons[0]
    assert "5.000 ms, over 5 % of the SLO (1.800 ms)" in reasons[1]


def test_the_noise_probe_sees_sleeps_end_late_and_never_early() -> None:
    """Every sleep is measured, and none ends before it is due."""
    probe = NoiseProbe(period_ns=MS // 10)
    probe.start()
    while len(probe) < 20:
        threading.Event().wait(0.001)  # a probe that never measures runs into the test's time limit

    late_ns = probe.stop()

    assert late_ns.dtype == np.int64
    assert len(late_ns) == len(probe.woke_ns) == len(probe) >= 20
    assert (np.diff(probe.woke_ns) >= MS // 10).all()
    assert (late_ns >= 0).all()
    assert all(thread.name != "noise-probe" for thread in threading.enumerate())
