"""SlackFit: worked examples, and agreement with a restatement that tries everything."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiles.table import Profile, SubnetProfile, load_profile
from router.policies import Choice, QueueView, WorkerView
from router.policies.slackfit import MAX_BUCKETS, SlackFit
from superserve.clock import MS
from superserve.errors import ConfigError
from tests.router.core.random_profiles import at_slack, profiles, slacks_ns

CNN = load_profile("cnn-8gpu-modelled")


def brute_force(profile: Profile, slack_ns: int, floor: int, n_buckets: int = 64) -> Choice | None:
    """Restate SlackFit in exact fractions, over every allowed row and every batch size."""
    tuples = [
        (batch_size, row, profile.latency_p99_ns(row, batch_size))
        for row in range(floor, profile.n_subnets)
        for batch_size in range(1, profile.max_batch_size + 1)
    ]
    shortest, longest = min(entry[2] for entry in tuples), max(entry[2] for entry in tuples)
    edges = [shortest + Fraction(k * (longest - shortest), n_buckets) for k in range(n_buckets + 1)]
    reached = [edge for edge in edges if edge <= slack_ns]
    if not reached:
        return None
    batch_size, row, _ = max(entry for entry in tuples if entry[2] <= reached[-1])
    return Choice(row, batch_size)


@pytest.mark.parametrize(
    ("slack_ms", "choice"),
    [
        # Edges of the shipped profile: 1.452 + k * (31.621 - 1.452) / 64 ms = 1.452 + k * 0.471390625.
        (-5.0, None),
        (1.451999, None),
        (1.452, Choice(0, 1)),  # edge 0 exactly
        (1.9, Choice(0, 1)),  # still edge 0, though 76.69 takes one query in 1.885
        (1.923391, Choice(0, 2)),  # edge 1, 1.92339: two queries at 73.82 take 1.860
        (7.571, Choice(1, 8)),  # edge 12, 7.109: 16 at 73.82 take 7.571; 8 at 76.69 take 6.773
        (8.0, Choice(0, 16)),  # edge 13, 7.580
        (13.0, Choice(1, 16)),  # edge 24, 12.765: 16 at 76.69 take 12.360, at 77.64 13.905
        (20.0, Choice(3, 16)),  # edge 39, 19.836: 16 at 78.25 take 16.892
        (31.62, Choice(4, 16)),  # edge 63, 31.150
        (31.621, Choice(5, 16)),  # edge 64: the largest batch at 80.16
        (36.0, Choice(5, 16)),  # past the last edge
    ],
)
def test_worked_examples_on_the_shipped_profile(slack_ms: float, choice: Choice | None) -> None:
    """Each slack takes the highest edge at most as long, then the largest batch, then accuracy."""
    assert at_slack(SlackFit(CNN), round(slack_ms * MS)) == choice


@pytest.mark.parametrize(
    ("slack_ms", "choice"),
    [
        # Rows from 78.25 up: edges 2.524 + k * (31.621 - 2.524) / 64 ms = 2.524 + k * 0.454640625.
        (2.523999, None),
        (2.524, Choice(3, 1)),
        (3.481, Choice(4, 1)),  # edge 2, 3.433: two at 78.25 take 3.481; one at 79.44 takes 3.430
        (36.0, Choice(5, 16)),
    ],
)
def test_worked_examples_with_a_floor(slack_ms: float, choice: Choice | None) -> None:
    """A floor is SlackFit on the profile without the rows below it."""
    assert at_slack(SlackFit(CNN), round(slack_ms * MS), floor=CNN.row("cnn-78.25")) == choice


@given(data=st.data(), profile=profiles(), n_buckets=st.sampled_from([None, 1, 7, 64]))
def test_slackfit_equals_trying_everything(
    data: st.DataObject, profile: Profile, n_buckets: int | None
) -> None:
    """For any profile, slack, floor and number of buckets it chooses as the restatement does."""
    policy = SlackFit(profile, None if n_buckets is None else str(n_buckets))
    floor = data.draw(st.integers(0, profile.n_subnets - 1))
    slack_ns = data.draw(slacks_ns(profile))
    assert at_slack(policy, slack_ns, floor=floor) == brute_force(profile, slack_ns, floor, n_buckets or 64)


@given(slack_ns=st.integers(0, 40 * MS), floor=st.integers(0, 5))
def test_slackfit_equals_trying_everything_on_the_shipped_profile(slack_ns: int, floor: int) -> None:
    """The same on the profile that the paper's figures are reproduced with."""
    assert at_slack(SlackFit(CNN), slack_ns, floor=floor) == brute_force(CNN, slack_ns, floor)


@given(data=st.data(), profile=profiles())
def test_more_slack_never_means_a_smaller_batch(data: st.DataObject, profile: Profile) -> None:
    """With more slack the batch grows, or stays and the accuracy does not fall."""
    policy = SlackFit(profile)
    less_ns, more_ns = sorted((data.draw(slacks_ns(profile)), data.draw(slacks_ns(profile))))
    less, more = at_slack(policy, less_ns), at_slack(policy, more_ns)
    if less is not None:
        assert more is not None
        assert (less.batch_size, less.subnet) <= (more.batch_size, more.subnet)


def test_slack_is_counted_from_when_the_worker_can_begin() -> None:
    """Waiting for a worker, transport and a slow GPU all cost slack."""
    policy = SlackFit(CNN)
    queue = QueueView(head_deadline_ns=100 * MS, head_floor=0, length=1)
    # 100 - 70 - 2 = 28 ms, at 1.4 x: 20 ms of profiled time.
    worker = WorkerView(free_at_ns=70 * MS, allowance_ns=2 * MS, slowdown=1.4)
    assert policy.choose(queue, worker, now_ns=10 * MS) == at_slack(policy, 20 * MS) == Choice(3, 16)


def test_a_profile_of_one_figure_has_one_choice() -> None:
    """One subnet and one batch size: buckets of no width all hold it."""
    row = SubnetProfile("only", None, 50.0, None, (MS,), (MS,))
    policy = SlackFit(Profile("p", "n", "d", "modelled", "", {}, "2026-01-02", (4,), (row,)))
    assert at_slack(policy, MS - 1) is None
    assert [at_slack(policy, slack_ns) for slack_ns in (MS, MS + 1, 10**12)] == [Choice(0, 4)] * 3


@pytest.mark.parametrize("argument", ["", "0", "-1", "1.5", "many", "1025", "²", "9" * 5_000])
def test_the_number_of_buckets_is_checked(argument: str) -> None:
    """Anything but a number from 1 to 1,024 is refused."""
    with pytest.raises(ConfigError, match=r"slackfit: expected .*1 to 1024"):
        SlackFit(CNN, argument)


def test_the_number_of_buckets_can_be_set() -> None:
    """With one bucket there are two edges: below the longest latency the fastest choice alone."""
    policy = SlackFit(CNN, "1")
    assert at_slack(policy, 31 * MS) == Choice(0, 1)
    assert at_slack(policy, 32 * MS) == Choice(5, 16)
    assert len(SlackFit(CNN, str(MAX_BUCKETS)).buckets[0].choices) == MAX_BUCKETS + 1
