"""Random profiles and views for properties of policies."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from hypothesis import strategies as st

from profiles.table import Profile, SubnetProfile
from router.policies import Choice, QueueView, Shed, WorkerView

if TYPE_CHECKING:
    from router.policies import Policy


@st.composite
def profiles(draw: st.DrawFn, max_subnets: int = 6) -> Profile:
    """Draw a sound profile: 1 to 6 rows, 1 to 5 batch sizes, ties among its p99 latencies."""
    n_subnets = draw(st.integers(1, max_subnets))
    batch_sizes = sorted(draw(st.sets(st.integers(1, 20), min_size=1, max_size=5)))
    steps_ns = st.lists(st.integers(1, 3_000), min_size=len(batch_sizes), max_size=len(batch_sizes))
    quantum_ns = draw(st.sampled_from([1, 500, 2_000]))
    medians_ns = [0] * len(batch_sizes)
    rows = []
    for row in range(n_subnets):
        # Sums of positive steps along rows and columns ascend along both.
        medians_ns = [
            sum(pair) for pair in zip(medians_ns, itertools.accumulate(draw(steps_ns)), strict=True)
        ]
        p99_ns = tuple(-(-median // quantum_ns) * quantum_ns for median in medians_ns)  # rounded up
        rows.append(SubnetProfile(f"s{row}", None, 50.0 + row, None, tuple(medians_ns), p99_ns))
    return Profile(
        "random", "none", "none", "modelled", "", {}, "2026-01-02", tuple(batch_sizes), tuple(rows)
    )


def slacks_ns(profile: Profile) -> st.SearchStrategy[int]:
    """Draw a slack: around each of the profile's latencies, and anywhere up to past the longest."""
    latencies_ns = sorted({latency for row in profile.subnets for latency in row.latency_p99_ns})
    near = st.builds(int.__add__, st.sampled_from(latencies_ns), st.integers(-1, 1))
    return near | st.integers(-1_000, latencies_ns[-1] + 1_000)


def at_slack(policy: Policy, slack_ns: int, *, floor: int = 0, slowdown: float = 1.0) -> Choice | None:
    """Ask `policy` with `slack_ns` left at the head, an idle worker and no transport."""
    queue = QueueView(head_deadline_ns=1_000 + slack_ns, head_floor=floor, length=1)
    choice = policy.choose(queue, WorkerView(free_at_ns=0, allowance_ns=0, slowdown=slowdown), now_ns=1_000)
    assert not isinstance(choice, Shed), "nothing is shed by who does not know of any demand"
    return choice


def many_subnets(n_subnets: int) -> Profile:
    """Return a profile of `n_subnets` rows from 1 to 3 ms a query, affine in batch size."""
    sizes = (1, 2, 4, 8, 16)
    rows = []
    for row in range(n_subnets):
        latencies_ns = tuple((1_000_000 + 2_000_000 * row // n_subnets) * size for size in sizes)
        rows.append(
            SubnetProfile(f"s{row}", None, 50 + 40 * row / n_subnets, None, latencies_ns, latencies_ns)
        )
    return Profile("many", "none", "none", "modelled", "", {}, "2026-01-02", sizes, tuple(rows))
