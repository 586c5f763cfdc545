"""Messages of one connection keep their order, whatever befalls it."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from loadgen.simulator.links import SimLink, Trouble, Way
from superserve.clock import MS

TROUBLES = st.builds(
    lambda at, span, delay, jitter, loss, doubled, cut: Trouble(
        at, at + span, delay, jitter, loss, doubled, is_cut=cut
    ),
    st.integers(0, 50 * MS), st.integers(1, 50 * MS), st.integers(0, 20 * MS), st.integers(0, 20 * MS),
    st.sampled_from([0.0, 0.3]), st.sampled_from([0.0, 0.5]), st.booleans(),
)  # fmt: skip


@given(st.lists(TROUBLES, max_size=3), st.lists(st.integers(0, 3 * MS), max_size=40), st.integers(0, 9))
def test_what_is_sent_first_arrives_first(troubles: list[Trouble], gaps_ns: list[int], seed: int) -> None:
    """Delay, jitter, cuts and doubles never let a message overtake one of the same peer; none is early."""
    link = SimLink(Way(100_000, 200_000), f"{seed}", tuple(troubles))
    sent_ns, last_ns = 0, 0
    for gap_ns in gaps_ns:
        sent_ns += gap_ns
        for at_ns in link.arrivals(sent_ns):
            assert at_ns >= max(last_ns, sent_ns + 100_000)
            last_ns = at_ns


def test_a_cut_holds_messages_until_it_ends() -> None:
    """As TCP has it: nothing is lost, all of it comes when the connection is whole again."""
    link = SimLink(Way(100_000, 0), "", (Trouble(10 * MS, 30 * MS, is_cut=True),))

    assert link.arrivals(5 * MS) == (5 * MS + 100_000,)
    assert link.arrivals(12 * MS) == (30 * MS + 100_000,)
    assert link.arrivals(31 * MS) == (31 * MS + 100_000,)


def test_shares_are_lost_and_doubled() -> None:
    """Of many messages about the share that was asked for is lost, or arrives twice."""
    link = SimLink(Way(0, 0), "x", (Trouble(0, MS, loss=0.25), Trouble(MS, 2 * MS, doubled=0.25)))

    lost = [link.arrivals(i) for i in range(1000)].count(())
    doubled = sum(len(link.arrivals(MS + i)) == 2 for i in range(1000))

    assert 200 < lost < 300
    assert 200 < doubled < 300


def test_many_at_once_keep_their_order_too() -> None:
    """What is drawn together for messages known beforehand is in order, and within the jitter."""
    sent_ns = np.arange(0, 10 * MS, 10_000)

    arrives_ns = SimLink(Way(100_000, 500_000), "y").arrivals_of(sent_ns)

    assert (np.diff(arrives_ns) >= 0).all()
    assert (arrives_ns - sent_ns >= 100_000).all()
    assert (arrives_ns - sent_ns <= 600_000).all()
