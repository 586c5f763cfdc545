"""On which terms a query runs: how long it may take, its class and its least accuracy.

A time may come from five places: the parameter `timeout`, gRPC's own deadline, and three headers. The
tightest counts, from the request's arrival at the gateway. All are durations: instants of two machines are
not compared.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from gateway.v2.verdicts import invalid
from superserve.wire.traceparent import parsed

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

US, MS = 1_000, 1_000_000
MAX_SLO_NS = 86_400 * 1_000 * MS
"""A day: what the wire takes. A longer time is cut to it, since gRPC callers may ask for years."""
PRIORITY_LEVELS = 256
"""Triton's levels run from 1, the highest, to this; ours from 255, the highest, to 0."""

_UNITS = {"H": 3_600_000 * MS, "M": 60_000 * MS, "S": 1_000 * MS, "m": MS, "u": US, "n": 1}
NO_SLO = (
    "no deadline: expected parameters.timeout (microseconds), a header superserve-slo-ms, grpc-timeout or "
    "x-envoy-expected-rq-timeout-ms, or a gRPC deadline; or start the gateway with --default-slo-ms"
)


class Terms(NamedTuple):
    """On which terms a request's queries run.

    Attributes:
        slo_ns: From arrival to answer; None if the request has no time.
        priority: Our class, 0 to 255; the higher goes first.
        min_accuracy: Least profiled accuracy, percent; None for any.
        trace_id: Of the caller's `traceparent`, 32 hexadecimal digits; "" if there is none.
        traceparent: The same whole, for the router; None if there is none.
        is_trace_ignored: Whether one came that is malformed.
    """

    slo_ns: int | None = None
    priority: int = 0
    min_accuracy: float | None = None
    trace_id: str = ""
    traceparent: str | None = None
    is_trace_ignored: bool = False


def grpc_timeout_ns(text: str) -> int:
    """Return the duration of a header `grpc-timeout`: one to eight digits and a unit of H, M, S, m, u or n.

    Raises:
        GatewayError: It is not of that form.
    """
    digits, unit = text[:-1], text[-1:]
    if not (1 <= len(digits) <= 8 and digits.isascii() and digits.isdigit() and unit in _UNITS and unit):
        raise invalid(f"grpc-timeout: expected 1 to 8 digits and one of H M S m u n, got {text!r:.40}")
    return int(digits) * _UNITS[unit]


def _milliseconds_ns(name: str, text: str) -> int:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < 1e12 or "_" in text:
        raise invalid(f"{name}: expected milliseconds above 0, got {text!r:.40}")
    return max(int(number * MS), 1)


def _timeout_ns(value: Any) -> int | None:
    """Return the parameter `timeout`; None for 0, with which Triton's clients say that there is none."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 20:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise invalid(f"parameters.timeout: expected whole microseconds, got {value!r:.40}")
    return value * US or None


def class_of(priority: Any) -> int:
    """Return our class for Triton's level: 1 is the highest and becomes 255, 0 means none given and stays 0.

    Raises:
        GatewayError: It is not a level from 0 to 256.
    """
    if isinstance(priority, str) and priority.isascii() and priority.isdigit() and len(priority) <= 4:
        priority = int(priority)
    if isinstance(priority, bool) or not isinstance(priority, int) or not 0 <= priority <= PRIORITY_LEVELS:
        raise invalid(
            f"parameters.priority: expected 0 to {PRIORITY_LEVELS}, 1 the highest and 0 for none, "
            f"got {priority!r:.40}"
        )
    return PRIORITY_LEVELS - priority if priority else 0


def floor_of(name: str, value: Any) -> float:
    """Return a least accuracy, percent.

    Raises:
        GatewayError: It is not a number from 0 to 100.
    """
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number <= 100:
        raise invalid(f"{name}: expected 0 to 100 percent, got {value!r:.40}")
    return number


def terms_of(
    parameters: Mapping[str, Any],
    headers: Mapping[str, str],
    *,
    given_ns: Iterable[int] = (),
    default_ns: int | None = None,
) -> Terms:
    """Return the terms of a request.

    Args:
        parameters: Of the request's body.
        headers: HTTP's or gRPC's metadata, names in lower case.
        given_ns: Further durations, such as gRPC's deadline.
        default_ns: If the request has no time.

    Raises:
        GatewayError: A parameter or header is malformed.
    """
    times = list(given_ns)
    if (text := headers.get("superserve-slo-ms")) is not None:
        times.append(_milliseconds_ns("superserve-slo-ms", text))
    if (text := headers.get("grpc-timeout")) is not None:
        times.append(grpc_timeout_ns(text))
    if (text := headers.get("x-envoy-expected-rq-timeout-ms")) is not None:
        times.append(_milliseconds_ns("x-envoy-expected-rq-timeout-ms", text))
    floor: float | None = None
    priority = 0
    if (text := headers.get("superserve-min-accuracy")) is not None:
        floor = floor_of("superserve-min-accuracy", text)
    if parameters:  # most requests have none: each look-up is paid for by every query
        if (timeout := parameters.get("timeout")) is not None and (timeout_ns := _timeout_ns(timeout)):
            times.append(timeout_ns)
        if (given := parameters.get("min_accuracy")) is not None:
            floor = max(floor_of("parameters.min_accuracy", given), floor or 0.0)
        if "priority" in parameters:
            priority = class_of(parameters["priority"])
    slo_ns = min(times) if times else default_ns
    slo_ns = None if slo_ns is None else min(slo_ns, MAX_SLO_NS)
    trace = headers.get("traceparent")
    if trace is None:
        return Terms(slo_ns, priority, floor)
    context = parsed(trace)
    if context is None:
        return Terms(slo_ns, priority, floor, is_trace_ignored=True)
    return Terms(slo_ns, priority, floor, context.trace_id.hex(), trace)
