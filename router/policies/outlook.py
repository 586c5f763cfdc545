"""What PlanFit knows as it decides: the queue by deadline, the GPU time that there is, and what takes it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from router.policies.due import Tight


class Outlook:
    """What stands behind one decision: the queue by deadline, and the GPU time that there is for it.

    Times are those of the profile of the worker that is asked for, from the instant at which it can begin.

    Attributes:
        begin_ns: The instant at which the worker can begin, plus the way back.
        slowdown: What the clock's time is divided by.
        patience_ns: How long a query can wait and run.
        limit_ns: How long a full batch may take.
        gap_ns: How long a GPU idles before a batch that was decided in time: see `Supply.gap_ns`.
        turn_ns: No batch occupies a GPU for less: see `WorkerView.turnaround_ns`.
        full: Queries of a full batch of the smallest subnet within that.
        full_ns: How long it takes, at p99.
        cycle_ns: That, and the gap before it.
        is_lone: Whether little comes, and no more is expected than has come.
        unit_ns: What a query of it costs.
        others: How many such GPUs the other ones are worth.
        taken_ns: Their time that is taken by batches already sent.
        lost_ns: That, and what they waste before a deadline.
        lost_at_ns, enough_ns: What tells that a deadline is lost, or met: see `router.policies.due.GpuTime`.
        tight: (time until a deadline, queries due by then that the other GPUs cannot serve), ascending; None
            if one is missed whatever is run.
        tightest: Which of them left the last batch least time.
        budget_ns: GPU time that there is for a query.
        longest_ns: Prices count batches up to that.
        doubt: See `router.policies.WorkerView`.
        room_ns: GPU time neither taken, nor reserved for a surge, nor asked for by the queue.
        share_ns: What of it one GPU may take.
    """

    __slots__ = (
        "begin_ns", "budget_ns", "cycle_ns", "doubt", "enough_ns", "full", "full_ns", "gap_ns", "is_lone",
        "limit_ns", "longest_ns", "lost_at_ns", "lost_ns", "others", "patience_ns", "room_ns", "share_ns",
        "slowdown", "taken_ns", "tight", "tightest", "turn_ns", "unit_ns",
    )  # fmt: skip

    begin_ns: int
    budget_ns: float
    cycle_ns: float
    doubt: float
    enough_ns: float
    full: int
    full_ns: int
    gap_ns: float
    is_lone: bool
    limit_ns: float
    longest_ns: float
    lost_at_ns: float
    lost_ns: float
    others: float
    patience_ns: float
    room_ns: float
    share_ns: float
    slowdown: float
    taken_ns: float
    tight: Tight
    tightest: int
    turn_ns: float
    unit_ns: float

    def __init__(self) -> None:
        self.limit_ns = -1.0
        self.gap_ns = self.turn_ns = 0.0
