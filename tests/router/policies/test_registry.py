"""The registry, and what every policy in it promises."""

from __future__ import annotations

import math
from importlib.metadata import EntryPoint, EntryPoints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiles.table import Profile, load_profile
from router.policies import Choice, QueueView, Shed, WorkerView, registry
from router.policies.baselines import Fixed, MaxAcc, MaxBatch, MinCost
from router.policies.planfit import PlanFit
from router.policies.registry import ENTRY_POINT_GROUP, known_policies, make_policy
from router.policies.slackfit import SlackFit
from superserve.clock import MS
from superserve.errors import ConfigError
from tests.instructions import instructions
from tests.router.core.random_profiles import at_slack, many_subnets, profiles, slacks_ns

CNN = load_profile("cnn-8gpu-modelled")
SPECS = (
    "slackfit",
    "slackfit:16",
    "demandfit",
    "planfit",
    "maxacc",
    "maxbatch",
    "fixed:smallest",
    "fixed:largest",
    "mincost",
)


class Alone:
    """A policy of another package: one query on a row, always."""

    def __init__(self, profile: Profile, argument: str | None) -> None:
        self.name = "alone"
        self.row = profile.row(argument) if argument else 0

    def choose(self, queue: QueueView, worker: WorkerView, now_ns: int) -> Choice | None:
        """Return one query on the row."""
        del queue, worker, now_ns
        return Choice(self.row, 1)


def no_policy(profile: Profile, argument: str | None) -> object:
    """Build something that cannot choose."""
    del profile, argument
    return object()


def failing(profile: Profile, argument: str | None) -> object:
    """Fail to build a policy."""
    raise ZeroDivisionError(profile, argument)


@pytest.fixture
def plugged_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that packages with these entry points are installed, and ours is not."""
    here = "tests.router.policies.test_registry"
    values = {
        "alone": f"{here}:Alone",
        "not-a-policy": f"{here}:no_policy",
        "gone": "no_such_package_of_anyone:Policy",
        "renamed": f"{here}:NoSuchPolicy",
        "slackfit": f"{here}:Alone",
    }
    points = EntryPoints(EntryPoint(name, value, ENTRY_POINT_GROUP) for name, value in values.items())
    monkeypatch.setattr(registry, "entry_points", points.select)


@pytest.mark.parametrize(
    ("spec", "kind"),
    [
        ("slackfit", SlackFit),
        ("slackfit:32", SlackFit),
        ("maxacc", MaxAcc),
        ("maxbatch", MaxBatch),
        ("fixed:cnn-78.25", Fixed),
        ("mincost", MinCost),
        ("planfit", PlanFit),
    ],
)
@pytest.mark.usefixtures("plugged_in")
def test_shipped_policies_need_no_metadata(spec: str, kind: type) -> None:
    """They are found in a stale checkout, and another package cannot take their names."""
    assert type(make_policy(spec, CNN)) is kind


@pytest.mark.usefixtures("plugged_in")
def test_a_package_plugs_in_a_policy() -> None:
    """An entry point's factory gets the profile and what follows the first colon."""
    assert at_slack(make_policy("alone", CNN), 0) == Choice(0, 1)
    assert at_slack(make_policy("alone:cnn-79.44", CNN), 0) == Choice(4, 1)
    assert set(known_policies()) >= {"slackfit", "maxacc", "maxbatch", "fixed", "mincost", "alone"}
    assert len(set(known_policies())) == len(known_policies())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "slakfit",
            r"'slakfit' is unknown: expected one of slackfit, demandfit, .*; did you mean 'slackfit'\?",
        ),
        ("", "policy '' is unknown: expected one of slackfit"),
        (":16", "policy '' is unknown"),
        ("Alone", r"did you mean 'alone'\?"),
        ("gone", "policy 'gone': no_such_package_of_anyone:Policy cannot be imported"),
        ("renamed", "policy 'renamed': .*NoSuchPolicy cannot be imported"),
        ("not-a-policy", r"policy 'not-a-policy': expected an object with a name and choose\(\), got object"),
        ("mincost:", "mincost: expected no argument, got ''"),
    ],
)
@pytest.mark.usefixtures("plugged_in")
def test_what_is_no_policy_is_refused(spec: str, message: str) -> None:
    """The message names the policies that there are, or what is wrong with this one."""
    with pytest.raises(ConfigError, match=message):
        make_policy(spec, CNN)


def test_a_policy_that_cannot_be_built_is_refused() -> None:
    """Whatever its constructor raises: a worker that brings such a profile must not end the router."""
    with pytest.raises(ConfigError, match=r"cannot be built for cnn-8gpu-modelled: ZeroDivisionError\("):
        make_policy(f"{__name__}:failing", CNN)


@pytest.mark.parametrize("spec", SPECS)
@given(data=st.data(), slowdown=st.sampled_from([1.0, 1.0 / 3.0, 1.07, 2.9]))
def test_the_chosen_batch_ends_by_the_deadline(spec: str, data: st.DataObject, slowdown: float) -> None:
    """Begun as soon as the worker is free, at the profile's p99, every batch is in time."""
    profile = data.draw(profiles())
    ns = st.integers(0, 20_000)
    queue = QueueView(
        head_deadline_ns=data.draw(st.integers(0, 80_000)),
        head_floor=data.draw(st.integers(0, profile.n_subnets - 1)),
        length=data.draw(st.integers(1, 30)),
    )
    worker = WorkerView(
        free_at_ns=data.draw(ns), allowance_ns=data.draw(st.integers(0, 500)), slowdown=slowdown
    )
    now_ns = data.draw(ns)
    choice = make_policy(spec, profile).choose(queue, worker, now_ns)
    assert not isinstance(choice, Shed)
    if choice is not None:
        running_ns = profile.latency_p99_ns(choice.subnet, choice.batch_size) * slowdown
        end_ns = max(now_ns, worker.free_at_ns) + math.floor(running_ns) + worker.allowance_ns
        assert end_ns <= queue.head_deadline_ns
        assert choice.subnet >= queue.head_floor
        assert choice.batch_size in profile.batch_sizes


@pytest.mark.parametrize(
    "spec",
    ["slackfit", "slackfit:1", "demandfit", "planfit", "maxacc", "maxbatch", "fixed:smallest", "mincost"],
)
@given(data=st.data())
def test_a_feasible_head_is_never_left(spec: str, data: st.DataObject) -> None:
    """These choose nothing only when no allowed subnet could take the head alone."""
    profile = data.draw(profiles())
    floor = data.draw(st.integers(0, profile.n_subnets - 1))
    slack_ns = data.draw(slacks_ns(profile))
    feasible = any(profile.latency_p99_ns(row, 1) <= slack_ns for row in range(floor, profile.n_subnets))
    assert (at_slack(make_policy(spec, profile), slack_ns, floor=floor) is not None) == feasible


def decision_instructions(spec: str, n_subnets: int) -> int:
    """Return how much work a decision is."""
    policy = make_policy(spec, many_subnets(n_subnets))
    queue = QueueView(head_deadline_ns=25 * MS, head_floor=n_subnets // 2, length=1_000)
    worker = WorkerView(free_at_ns=MS, allowance_ns=100_000, slowdown=1.07)
    policy.choose(queue, worker, MS)  # the first one may prepare
    return instructions(lambda: policy.choose(queue, worker, MS))


@pytest.mark.parametrize("spec", SPECS)
def test_a_decision_takes_as_long_however_many_subnets(spec: str) -> None:
    """Instructions, not microseconds, which depend on the machine: 1,000 of them take 10 to 20 us."""
    few = decision_instructions(spec, 6)

    assert 0 < few < 2_000
    assert decision_instructions(spec, 1_000) < 1.25 * few + 50
