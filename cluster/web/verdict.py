"""One sentence on a router's STATUS: what is wrong and what to do, in doctor's words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cluster.operate.doctor import CHECKS, Finding, Seen, Verdict

if TYPE_CHECKING:
    from superserve.status import RouterStatus

MET = 0.99
"""Below this share of the last 10 seconds the SLO is missed, as the router's `/slo` has it."""
ASKED = ("versions", "speed", "load", "counters")
"""The checks that need nothing but STATUS."""


def findings_of(name: str, status: RouterStatus, before: RouterStatus | None) -> list[Finding]:
    """Return what doctor finds in a STATUS, the worst first.

    Args:
        name: The cluster's, for the commands that a finding names.
        status: The latest.
        before: One of about a second earlier.
    """
    seen = Seen(name, True, (), status, before, ())
    found = [one for check, look, _ in CHECKS if check in ASKED for one in look(seen)]
    if status.router.draining:
        found.append(Finding("router", Verdict.WRONG, "router: drains, and refuses queries"))
    short = status.recent.short.answered
    if short.wanted and short.ok < MET * short.wanted:
        missed = {name: n for name, n in short.items() if n and name not in ("ok", "cancelled")}
        most = max(missed, key=lambda name: missed[name]).replace("_", " ")
        words = f"{1 - short.ok / short.wanted:.1%} of the queries of the last 10 s missed, mostly {most}"
        found.append(Finding("slo", Verdict.WRONG, words, "`superserve explain live` says why"))
    if not status.workers_ready:
        fix = f"{seen.command('status')} and {seen.command('logs')} say why"
        found.append(Finding("workers", Verdict.WRONG, "no GPU takes work", fix))
    return sorted(found, key=lambda one: one.verdict is not Verdict.WRONG)
