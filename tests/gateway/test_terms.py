"""Deadlines, classes and floors: which counts, and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.v2.terms import MAX_SLO_NS, MS, PRIORITY_LEVELS, class_of, grpc_timeout_ns, terms_of
from gateway.v2.verdicts import GatewayError

TRACE = "0af7651916cd43dd8448eb211c80319c"


@pytest.mark.parametrize(
    ("parameters", "headers", "given_ns", "expected_ns"),
    [
        ({}, {}, (), None),
        ({"timeout": 36_000}, {}, (), 36 * MS),
        ({"timeout": 0}, {}, (), None),  # what Triton's clients send for none
        ({"timeout": 36_000}, {"superserve-slo-ms": "20"}, (), 20 * MS),
        ({"timeout": 10_000}, {"superserve-slo-ms": "20.5"}, (), 10 * MS),
        ({}, {"grpc-timeout": "15m", "x-envoy-expected-rq-timeout-ms": "30"}, (), 15 * MS),
        ({}, {"x-envoy-expected-rq-timeout-ms": "30"}, (7 * MS,), 7 * MS),
        ({"timeout": 10**18}, {}, (), MAX_SLO_NS),
        ({"timeout": "36000"}, {}, (), 36 * MS),
    ],
)
def test_the_tightest_time_counts(
    parameters: dict[str, object], headers: dict[str, str], given_ns: tuple[int, ...], expected_ns: int | None
) -> None:
    """Of body, headers and gRPC's deadline the shortest; a default only without any."""
    assert terms_of(parameters, headers, given_ns=given_ns).slo_ns == expected_ns
    with_default = terms_of(parameters, headers, given_ns=given_ns, default_ns=5).slo_ns
    assert with_default == (5 if expected_ns is None else expected_ns)


@pytest.mark.parametrize(
    ("unit", "ns"),
    [("H", 3_600 * 10**9), ("M", 60 * 10**9), ("S", 10**9), ("m", 10**6), ("u", 1_000), ("n", 1)],
)  # fmt: skip
def test_units_of_grpc_timeout(unit: str, ns: int) -> None:
    """M are minutes and m milliseconds."""
    assert grpc_timeout_ns(f"12{unit}") == 12 * ns


@pytest.mark.parametrize("text", ["", "m", "5", "123456789m", "-5m", "5x", "+5m", "1.5S", "٣m", "5 m"])
def test_a_malformed_grpc_timeout_is_refused(text: str) -> None:
    """One to eight digits and a unit, and nothing else."""
    with pytest.raises(GatewayError, match="grpc-timeout"):
        terms_of({}, {"grpc-timeout": text})


@pytest.mark.parametrize(
    ("parameters", "headers", "named"),
    [
        ({"timeout": -1}, {}, "timeout"),
        ({"timeout": 1.5}, {}, "timeout"),
        ({"timeout": True}, {}, "timeout"),
        ({"timeout": [1]}, {}, "timeout"),
        ({"priority": 257}, {}, "priority"),
        ({"priority": -1}, {}, "priority"),
        ({"priority": None}, {}, "priority"),
        ({"min_accuracy": 101}, {}, "min_accuracy"),
        ({"min_accuracy": "high"}, {}, "min_accuracy"),
        ({}, {"superserve-min-accuracy": "nan"}, "superserve-min-accuracy"),
        ({}, {"superserve-slo-ms": "0"}, "superserve-slo-ms"),
        ({}, {"superserve-slo-ms": "inf"}, "superserve-slo-ms"),
        ({}, {"superserve-slo-ms": "1_0"}, "superserve-slo-ms"),
        ({}, {"x-envoy-expected-rq-timeout-ms": "soon"}, "x-envoy"),
    ],
)
def test_what_is_malformed_is_named(
    parameters: dict[str, object], headers: dict[str, str], named: str
) -> None:
    """An error names the parameter or the header."""
    with pytest.raises(GatewayError, match=named) as caught:
        terms_of(parameters, headers)

    assert caught.value.verdict.http == 400


def test_tritons_priorities_are_reversed() -> None:
    """Level 1 is Triton's highest and our 255; none given is our 0, like the lowest level."""
    assert class_of(1) == 255
    assert class_of(2) == 254
    assert class_of(PRIORITY_LEVELS) == 0
    assert class_of(0) == 0


@given(st.integers(1, PRIORITY_LEVELS), st.integers(1, PRIORITY_LEVELS))
def test_a_smaller_level_is_a_higher_class(one: int, other: int) -> None:
    """The order is kept, reversed."""
    assert (one < other) == (class_of(one) > class_of(other))


def test_the_higher_floor_counts() -> None:
    """A header can raise a floor of the body, and not lower it."""
    assert terms_of({"min_accuracy": 70}, {"superserve-min-accuracy": "75"}).min_accuracy == 75
    assert terms_of({"min_accuracy": 80}, {"superserve-min-accuracy": "75"}).min_accuracy == 80
    assert terms_of({}, {}).min_accuracy is None


def test_a_traceparent_goes_on_whole() -> None:
    """A malformed one is as if there were none, but noted."""
    sound = f"00-{TRACE}-b7ad6b7169203331-01"
    terms = terms_of({}, {"traceparent": sound})
    assert (terms.trace_id, terms.traceparent, terms.is_trace_ignored) == (TRACE, sound, False)
    terms = terms_of({}, {"traceparent": f"{sound}, {sound}"})
    assert (terms.trace_id, terms.traceparent, terms.is_trace_ignored) == ("", None, True)
    assert not terms_of({}, {}).is_trace_ignored
