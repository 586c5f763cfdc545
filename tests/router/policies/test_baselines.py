"""The baselines: worked examples, and what each promises on any profile."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiles.table import Profile, load_profile
from router.policies import Choice
from router.policies.baselines import Fixed, MaxAcc, MaxBatch, MinCost
from superserve.clock import MS
from superserve.errors import ConfigError
from tests.router.core.random_profiles import at_slack, profiles, slacks_ns

CNN = load_profile("cnn-8gpu-modelled")


def fitting(profile: Profile, slack_ns: int, floor: int) -> list[Choice]:
    """Return every choice from row `floor` up that ends within the slack, padded sizes included."""
    return [
        Choice(row, batch_size)
        for row in range(floor, profile.n_subnets)
        for batch_size in range(1, profile.max_batch_size + 1)
        if profile.latency_p99_ns(row, batch_size) <= slack_ns
    ]


@pytest.mark.parametrize(
    ("slack_ms", "choice"),
    [
        (1.451999, None),
        (1.452, Choice(0, 1)),
        (4.5, Choice(0, 8)),  # 8 at 73.82 take 4.307, at 76.69 6.773
        (7.571, Choice(0, 16)),
        (17.0, Choice(3, 16)),  # 16 at 78.25 take 16.892, at 79.44 24.205
        (36.0, Choice(5, 16)),
    ],
)
def test_maxbatch_on_the_shipped_profile(slack_ms: float, choice: Choice | None) -> None:
    """MaxBatch sizes the batch on the smallest subnet and then raises the accuracy."""
    assert at_slack(MaxBatch(CNN), round(slack_ms * MS)) == choice


@pytest.mark.parametrize(
    ("slack_ms", "choice"),
    [
        (1.451999, None),
        (1.452, Choice(0, 1)),
        (3.43, Choice(4, 1)),  # one at 79.44 takes 3.430 exactly
        (4.5, Choice(4, 1)),  # two take 4.815
        (20.0, Choice(5, 8)),  # 8 at 80.16 take 17.305, 16 take 31.621
        (36.0, Choice(5, 16)),
    ],
)
def test_maxacc_on_the_shipped_profile(slack_ms: float, choice: Choice | None) -> None:
    """MaxAcc picks the subnet for one query and then packs what fits."""
    assert at_slack(MaxAcc(CNN), round(slack_ms * MS)) == choice


@pytest.mark.parametrize(
    ("slack_ms", "choice"),
    [(2.523999, None), (2.524, Choice(3, 1)), (9.229, Choice(3, 8)), (36.0, Choice(3, 16))],
)
def test_fixed_on_the_shipped_profile(slack_ms: float, choice: Choice | None) -> None:
    """Clipper+ at 78.25 serves nothing else, and nothing at all when one query does not fit."""
    assert at_slack(Fixed(CNN, "cnn-78.25"), round(slack_ms * MS)) == choice


@pytest.mark.parametrize(
    ("slack_ms", "choice"),
    [(1.451999, None), (4.306999, Choice(0, 4)), (4.307, Choice(0, 8)), (36.0, Choice(0, 16))],
)
def test_mincost_on_the_shipped_profile(slack_ms: float, choice: Choice | None) -> None:
    """INFaaS without a constraint serves the least accurate subnet however much slack there is."""
    assert at_slack(MinCost(CNN), round(slack_ms * MS)) == choice


@pytest.mark.parametrize(
    ("argument", "row"), [("cnn-73.82", 0), ("cnn-80.16", 5), ("2", 2), ("smallest", 0), ("largest", 5)]
)
def test_fixed_takes_a_name_a_row_or_an_end(argument: str, row: int) -> None:
    """However it is written, the policy is named after the subnet."""
    policy = Fixed(CNN, argument)
    assert (policy.subnet, policy.name) == (row, f"fixed:{CNN.subnets[row].name}")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (None, "fixed: expected a subnet, as in fixed:cnn-73.82 or fixed:largest"),
        ("", "has no subnet ''"),
        ("6", "has no subnet '6': expected a name, a row from 0 to 5"),
        ("-1", "has no subnet '-1'"),
        ("cnn-78.52", "has no subnet 'cnn-78.52': .* did you mean 'cnn-78.25'"),
        ("larges", "did you mean 'largest'"),
    ],
)
def test_fixed_refuses_what_is_no_subnet(argument: str | None, message: str) -> None:
    """The message says what would do, and the nearest."""
    with pytest.raises(ConfigError, match=message):
        Fixed(CNN, argument)


@pytest.mark.parametrize("policy", [MaxAcc, MaxBatch, MinCost])
def test_the_others_take_no_argument(policy: type[MaxAcc | MaxBatch | MinCost]) -> None:
    """An argument that would be ignored is refused."""
    with pytest.raises(ConfigError, match=f"{policy.__name__.lower()}: expected no argument, got 'x'"):
        policy(CNN, "x")


@given(data=st.data(), profile=profiles())
def test_each_baseline_equals_trying_everything(data: st.DataObject, profile: Profile) -> None:
    """On any profile, slack and floor each picks the extreme of its own order."""
    slack_ns = data.draw(slacks_ns(profile))
    floor = data.draw(st.integers(0, profile.n_subnets - 1))
    row = data.draw(st.integers(0, profile.n_subnets - 1))
    options = fitting(profile, slack_ns, floor)

    def on(subnet: int) -> list[Choice]:
        return [choice for choice in options if choice.subnet == subnet]

    by_batch = max(options, key=lambda choice: (choice.batch_size, choice.subnet), default=None)
    by_accuracy = max(options, key=lambda choice: (choice.subnet, choice.batch_size), default=None)
    assert at_slack(MaxBatch(profile), slack_ns, floor=floor) == by_batch
    assert at_slack(MaxAcc(profile), slack_ns, floor=floor) == by_accuracy
    assert at_slack(MinCost(profile), slack_ns, floor=floor) == max(on(floor), key=_size, default=None)
    fixed = at_slack(Fixed(profile, str(row)), slack_ns, floor=floor)
    assert fixed == max(on(max(row, floor)), key=_size, default=None)


def _size(choice: Choice) -> int:
    return choice.batch_size


def test_fixed_below_the_floor_serves_the_floor() -> None:
    """A promise to a query outranks the purity of a baseline."""
    policy = Fixed(CNN, "smallest")
    assert at_slack(policy, 13 * MS, floor=2) == Choice(2, 8)
    assert at_slack(policy, 2 * MS, floor=2) is None
    assert at_slack(Fixed(CNN, "largest"), 13 * MS, floor=2) == Choice(5, 4)
