"""The formulas of slack, each to the nanosecond."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiles.table import load_profile
from router.core.estimates import RecentQuantiles
from router.core.events import CoreSettings
from router.core.ledger import ClientState
from router.core.slack import Slack
from router.core.workers import Peer, Worker
from router.policies.slackfit import SlackFit
from superserve.clock import MS

CNN = load_profile("cnn-8gpu-modelled")
NOW_NS = 1_000 * MS
MEDIAN_NS, BOUND_NS = 400_001, 1_000_000
"""Transport of the worker; odd, so that it shows which half has the nanosecond."""
THERE_NS = 200_000
RETURN_NS = 70_000
SLACK = Slack(
    CoreSettings(dispatch_ahead_ns=2 * MS, margin_ns=MS, overrun_factor=3, overrun_grace_ns=10 * MS)
)


def make_worker(*ratios: float, free_in_ns: int = 0) -> Worker:
    """Return a GPU whose subnets are slower than profiled by these ratios, and the rest as profiled."""
    peer = Peer("key", "host", 1, NOW_NS)
    peer.transport = RecentQuantiles([MEDIAN_NS] * 15 + [BOUND_NS])
    worker = Worker(peer, 0, CNN, SlackFit(CNN), NOW_NS)
    worker.correction._differs[: len(ratios)] = ratios
    worker.free_at_ns = NOW_NS + free_in_ns
    peer.workers.append(worker)
    return worker


def make_client(n_samples: int = 8, of_all: RecentQuantiles | None = None) -> ClientState:
    """Return a client whose messages take RETURN_NS, and twice that nearly at worst."""
    client = ClientState("client", 1, 1, of_all or RecentQuantiles([50_000] * 15 + [250_000]))
    client.transits = RecentQuantiles([RETURN_NS] * (n_samples - 2) + [2 * RETURN_NS] * 2)
    return client


@pytest.mark.parametrize(("free_in_ns", "expected_ns"), [(-5 * MS, 0), (0, 0), (5 * MS, 5 * MS)])
def test_a_worker_is_free_now_or_when_it_says(free_in_ns: int, expected_ns: int) -> None:
    """One that has been idle is free now, not in the past."""
    assert SLACK.free_ns(make_worker(free_in_ns=free_in_ns), NOW_NS) == NOW_NS + expected_ns


@pytest.mark.parametrize(
    ("free_in_ns", "expected_ns"),
    [(-5 * MS, THERE_NS), (THERE_NS - 1, THERE_NS), (THERE_NS + 1, THERE_NS + 1), (5 * MS, 5 * MS)],
)
def test_a_batch_begins_when_it_is_there_and_the_worker_free(free_in_ns: int, expected_ns: int) -> None:
    """The later of half a median transport from now, and the worker's own instant."""
    assert SLACK.begin_ns(make_worker(free_in_ns=free_in_ns), NOW_NS) == NOW_NS + expected_ns


def test_a_worker_is_given_work_shortly_before_it_is_free() -> None:
    """`dispatch_ahead_ns` and the whole median transport before."""
    worker = make_worker(free_in_ns=9 * MS)

    assert SLACK.decide_ns(worker) == NOW_NS + 9 * MS - 2 * MS - MEDIAN_NS


def test_the_way_back_to_the_router_is_nearly_the_worst_and_the_margin() -> None:
    """The 99th percentile of the transport, less the half median that counts as the way there."""
    worker = make_worker()

    assert SLACK.there_ns(worker) == THERE_NS
    assert SLACK.back_ns(worker) == BOUND_NS - THERE_NS + MS


def test_the_way_back_to_a_client_adds_what_its_messages_took() -> None:
    """Nearly at worst: its own 99th percentile after a hundred messages, before that as all vary."""
    back_ns = SLACK.back_ns(make_worker())
    of_all = RecentQuantiles([50_000] * 15 + [450_000])

    assert SLACK.way_back_ns(make_worker(), make_client(100, of_all)) == back_ns + 2 * RETURN_NS
    assert SLACK.way_back_ns(make_worker(), make_client(99, of_all)) == back_ns + RETURN_NS + 400_000


def test_the_way_back_to_a_client_of_few_messages_varies_as_the_ways_to_workers_do() -> None:
    """By half of what those vary, there and back, if that is more than all clients' ways do."""
    back_ns, half_ns = SLACK.back_ns(make_worker()), (BOUND_NS - MEDIAN_NS) // 2

    assert SLACK.way_back_ns(make_worker(), make_client(99)) == back_ns + RETURN_NS + half_ns
    assert SLACK.way_back_ns(make_worker(), make_client(100)) == back_ns + 2 * RETURN_NS


def test_the_usual_way_back_has_no_margin() -> None:
    """Medians of both parts; of an odd median the way back has the odd nanosecond."""
    assert SLACK.usual_way_back_ns(make_worker(), make_client()) == MEDIAN_NS - THERE_NS + RETURN_NS


def test_a_short_worst_way_back_counts_whole() -> None:
    """What a query can spare is more than that."""
    worker, client = make_worker(), make_client(100)
    usual_ns = SLACK.usual_way_back_ns(worker, client)

    assert SLACK.careful_way_back_ns(worker, client, usual_ns, 36 * MS) == SLACK.way_back_ns(worker, client)


def test_a_worst_way_back_beyond_the_slack_counts_for_a_third_of_what_the_usual_one_leaves() -> None:
    """A stall has taken 50 ms: allowed for whole, it would refuse every query of 36 ms, and for ever."""
    worker, client = make_worker(), make_client(100)
    worker.transport = RecentQuantiles([MEDIAN_NS] * 15 + [50 * MS])
    usual_ns = SLACK.usual_way_back_ns(worker, client)

    careful_ns = SLACK.careful_way_back_ns(worker, client, usual_ns, 36 * MS)

    assert careful_ns == usual_ns + (36 * MS - usual_ns) // 3 < SLACK.way_back_ns(worker, client)


def test_a_query_with_less_slack_than_the_usual_way_is_allowed_that_way() -> None:
    """It is lost in any case, but not for a negative allowance."""
    worker, client = make_worker(), make_client(100)
    usual_ns = SLACK.usual_way_back_ns(worker, client)

    assert SLACK.careful_way_back_ns(worker, client, usual_ns, 0) == usual_ns


@given(median_ns=st.integers(0, 10**9))
def test_the_way_there_and_the_usual_way_back_are_the_transport(median_ns: int) -> None:
    """No nanosecond of a measured transport is lost or counted twice."""
    worker, client = make_worker(), make_client()
    worker.transport = RecentQuantiles([median_ns] * 8)

    ways_ns = SLACK.there_ns(worker) + SLACK.usual_way_back_ns(worker, client)

    assert ways_ns == median_ns + client.return_ns


def test_an_answer_leaves_so_that_it_is_there_by_the_deadline() -> None:
    """The deadline less what the way to the client usually takes."""
    assert SLACK.leave_ns(NOW_NS, make_client()) == NOW_NS - RETURN_NS


@pytest.mark.parametrize(("ratio", "factor"), [(1.0, 1.0), (1.04, 1.0), (1.5, 1.5), (0.5, 0.5)])
def test_a_batch_of_one_takes_its_p99_as_slow_as_the_gpu_is(ratio: float, factor: float) -> None:
    """By the subnet's own slowdown; one within the noise is none."""
    worker = make_worker(9.0, ratio)

    alone_ns = SLACK.alone_ns(worker, 1)

    assert alone_ns == int(CNN.latency_p99_ns(1, 1) * factor)
    assert SLACK.alone_and_back_ns(worker, 1) == alone_ns + BOUND_NS - THERE_NS + MS


def test_the_quickest_answer_of_a_process_is_that_of_its_quickest_gpu() -> None:
    """The smallest subnet alone on the least slow one, and the median transport both ways."""
    worker = make_worker(3.0)
    worker.peer.workers += [make_worker(1.25), make_worker(2.0)]

    assert SLACK.quickest_ns(worker.peer) == int(CNN.latency_p99_ns(0, 1) * 1.25) + MEDIAN_NS


@pytest.mark.parametrize(("ratio", "factor"), [(1.0, 1.0), (2.0, 2.0), (0.5, 1.0)])
def test_a_batch_overruns_after_three_times_its_p99(ratio: float, factor: float) -> None:
    """A slow GPU gets its own time, a quick one the profile's; the way and the grace come on top."""
    p99_ns = int(CNN.latency_p99_ns(2, 8) * factor)

    assert SLACK.overrun_ns(make_worker(1, 1, ratio), 2, 8) == 3 * p99_ns + BOUND_NS + 10 * MS


@pytest.mark.parametrize(
    ("worst_ns", "expected_ns"),
    [
        (BOUND_NS, 100_000),
        (BOUND_NS + 100_001, 100_001),
        (BOUND_NS + 400_000, 400_000),
        (BOUND_NS + MS + 1, MS),
    ],
)
def test_the_margin_is_by_how_much_the_worst_way_exceeds_nearly_all(worst_ns: int, expected_ns: int) -> None:
    """On a quiet machine a tenth of what one with stalls needs."""
    worker = make_worker()
    worker.peer.worst_way_ns = worst_ns

    assert SLACK.back_ns(worker) == BOUND_NS - THERE_NS + expected_ns


def test_a_margin_that_was_asked_for_is_kept() -> None:
    """Whatever the worst way was."""
    slack, worker = Slack(CoreSettings().with_margin(7 * MS)), make_worker()
    worker.peer.worst_way_ns = BOUND_NS

    assert slack.back_ns(worker) == BOUND_NS - THERE_NS + 7 * MS


def test_a_decision_is_due_as_far_ahead_as_the_router_came_late() -> None:
    """The transport's median, and the lead that its punctuality asks for."""
    slack, worker = Slack(CoreSettings()), make_worker(free_in_ns=10 * MS)
    slack.punctuality.ahead_ns = 345_678

    assert slack.decide_ns(worker) == NOW_NS + 10 * MS - MEDIAN_NS - 345_678
