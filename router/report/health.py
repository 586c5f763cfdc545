"""Whether the router lives, is ready, and meets its SLOs now: three questions, three answers.

Each is a function of STATUS, and is positive only for a reason: a router without workers is not
ready, and one that has answered no query lately meets its SLO only if it could serve one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from superserve.status import EndCounts, RouterSummary

SLO_ATTAINMENT = 0.99
"""Least share of the last ten seconds' queries that must end OK for `slo` to be positive."""


class Health(NamedTuple):
    """An answer and its reason."""

    is_well: bool
    why: str


def attainment(answered: EndCounts) -> float:
    """Return the share that ended OK of all queries that were not cancelled; NaN without any."""
    n = answered.wanted
    return answered.ok / n if n else float("nan")


def live(_summary: RouterSummary) -> Health:
    """Return whether the loop passes: it made the summary, so it does."""
    return Health(True, "the loop passes")


def ready(summary: RouterSummary) -> Health:
    """Return whether a query sent now would be queued for a GPU that takes work."""
    if summary.router.draining:
        return Health(False, "the router is draining")
    n_ready = summary.workers_ready
    if not n_ready:
        return Health(False, "no GPU takes work")
    return Health(True, f"{n_ready} GPUs take work")


def slo(summary: RouterSummary) -> Health:
    """Return whether queries meet their deadlines now, judged by those of the last ten seconds."""
    share = attainment(summary.recent.short.answered)
    if share != share:  # NaN: nothing ended, so judge by whether a query could be served
        could = ready(summary)
        return Health(could.is_well, f"nothing ended in the last 10 s; {could.why}")
    # Truncated, not rounded: a value below the bound must not print as the bound.
    words = f"attainment {int(share * 10_000) / 10_000:.4f} over the last 10 s, expected {SLO_ATTAINMENT}"
    return Health(share >= SLO_ATTAINMENT, words)
