"""Whether the router lives, is ready, and meets its SLOs now: three questions, three answers.

Each is a function of STATUS, and says yes only for a reason: a router without workers is not
ready, and one that has answered nobody lately meets no SLO unless it could.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from superserve.status import EndCounts, RouterSummary

SLO_ATTAINMENT = 0.99
"""Least share of the last ten seconds' queries that must have ended OK for `slo` to say yes."""


class Health(NamedTuple):
    """An answer, and what it rests on."""

    is_well: bool
    why: str


def attainment(answered: EndCounts) -> float:
    """Return the share of queries that ended OK, of all that ended uncancelled; NaN of none."""
    n = answered.wanted
    return answered.ok / n if n else float("nan")


def live(_summary: RouterSummary) -> Health:
    """Tell whether the loop passes: whoever has a summary of it has seen it do so."""
    return Health(True, "the loop passes")


def ready(summary: RouterSummary) -> Health:
    """Tell whether a query sent now would be queued for a GPU that takes work."""
    if summary.router.draining:
        return Health(False, "the router is draining")
    n_ready = summary.workers_ready
    if not n_ready:
        return Health(False, "no GPU takes work")
    return Health(True, f"{n_ready} GPUs take work")


def slo(summary: RouterSummary) -> Health:
    """Tell whether queries end by their deadlines now, by those that ended in the last ten seconds."""
    share = attainment(summary.recent.short.answered)
    if share != share:  # NaN: nothing ended, and what could be done is all there is to tell by
        could = ready(summary)
        return Health(could.is_well, f"nothing ended in the last 10 s; {could.why}")
    # Cut, not rounded: below the bound it shall not read as if it were on it.
    words = f"attainment {int(share * 10_000) / 10_000:.4f} over the last 10 s, expected {SLO_ATTAINMENT}"
    return Health(share >= SLO_ATTAINMENT, words)
