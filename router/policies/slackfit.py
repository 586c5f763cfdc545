"""SlackFit: spend the slack of the earliest deadline, larger batches before accuracy.

Offline, SlackFit cuts the range of latencies of a profile into evenly spaced buckets, and keeps
one choice for each. Online, the slack selects the bucket: one division, one look-up.
Under load slack is short, and the low buckets hold large batches of small subnets; when load
falls slack grows, and accuracy with it. No part of it predicts the load.

Source: SlackFit, section 4 and appendix A.5 of SuperServe (NSDI '25).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from router.policies import Choice, usable_slack_ns
from superserve.build import mypyc_attr
from superserve.errors import ConfigError

if TYPE_CHECKING:
    from profiles.table import Profile
    from router.policies import QueueView, WorkerView

DEFAULT_BUCKETS = 64
"""Number of buckets without `slackfit:<n>`."""

MAX_BUCKETS = 1_024
"""Most buckets. With 1,000 subnets the tables of all floors take 6 MB and 0.1 s at 64 buckets; 16 times that
at 1,024."""


@dataclass(frozen=True, slots=True)
class Buckets:
    """SlackFit's choices for queries that only rows from `floor` up may serve.

    Edge k is first_ns + k * span_ns / n for k = 0..n: the first is the latency of one query on
    row `floor`, the last that of the largest batch on the most accurate row, both p99.

    Attributes:
        first_ns: Edge 0; with less slack nothing fits.
        span_ns: Edge n minus edge 0; at least 1.
        choices: What edge k holds, shape (n + 1,).
    """

    first_ns: int
    span_ns: int
    choices: tuple[Choice, ...]

    def at(self, slack_ns: int) -> Choice | None:
        """Return the choice of the slowest edge that is at most `slack_ns`; None below edge 0."""
        ahead_ns = slack_ns - self.first_ns
        if ahead_ns < 0:
            return None
        last = len(self.choices) - 1
        # Integers throughout: an edge exactly as long as the slack still meets the deadline.
        return self.choices[min(ahead_ns * last // self.span_ns, last)]


def make_buckets(profile: Profile, floor: int, n_buckets: int) -> Buckets:
    """Return the buckets of the profile's rows from `floor` up.

    An edge holds the largest batch whose p99 latency on any row is at most the edge, and the
    most accurate row that runs this batch in that time.
    """
    first_ns = profile.latency_p99_ns(floor, 1)
    span_ns = profile.latency_p99_ns(profile.n_subnets - 1, profile.max_batch_size) - first_ns
    edges_ns = (first_ns + k * span_ns // n_buckets for k in range(n_buckets + 1))
    choices = tuple(_largest_then_most_accurate(profile, floor, edge_ns) for edge_ns in edges_ns)
    return Buckets(first_ns=first_ns, span_ns=max(1, span_ns), choices=choices)


def _largest_then_most_accurate(profile: Profile, floor: int, budget_ns: int) -> Choice:
    """Return the choice for a latency of `budget_ns`, which is at least edge 0."""
    batch_size = profile.largest_batch(floor, budget_ns)  # no row above `floor` is faster (P2)
    assert batch_size is not None, "edge 0 fits the smallest batch on the floor"
    subnet = profile.most_accurate(batch_size, budget_ns)
    assert subnet is not None, "what fits on the floor fits on some row"
    return Choice(subnet, batch_size)


@mypyc_attr(allow_interpreted_subclasses=True)
class SlackFit:
    """The paper's policy: the choice of the bucket closest to, but not above, the head's slack.

    A head with an accuracy floor uses the buckets made from the rows that satisfy it, so that a
    feasible head always finds a choice; with floor 0 this is exactly the paper's policy.

    Args:
        profile: Latencies by row and batch size.
        argument: Number of buckets, 1 to 1,024; None for 64.

    Raises:
        ConfigError: The argument is not such a number.
    """

    name = "slackfit"

    def __init__(self, profile: Profile, argument: str | None = None) -> None:
        n_buckets = DEFAULT_BUCKETS if argument is None else _parse_buckets(argument)
        # For all floors, now: building them on first use would break that decision's limit of 20 us.
        self.buckets = tuple(make_buckets(profile, floor, n_buckets) for floor in range(profile.n_subnets))

    def choose(self, queue: QueueView, worker: WorkerView, now_ns: int) -> Choice | None:
        """Return the choice of the bucket that the head's slack reaches; None if it reaches none."""
        return self.buckets[queue.head_floor].at(usable_slack_ns(queue, worker, now_ns))


def _parse_buckets(argument: str) -> int:
    """Return the number of buckets that follows `slackfit:`."""
    if not (argument.isascii() and argument.isdecimal() and len(argument) <= len(str(MAX_BUCKETS))):
        raise ConfigError(f"slackfit: expected a number of buckets from 1 to {MAX_BUCKETS}, got {argument!r}")
    n_buckets = int(argument)
    if not 1 <= n_buckets <= MAX_BUCKETS:
        raise ConfigError(f"slackfit: expected 1 to {MAX_BUCKETS} buckets, got {n_buckets}")
    return n_buckets
