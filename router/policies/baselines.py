"""The policies that SlackFit is compared with.

Each looks only at the slack of the earliest deadline, and fits batches by the profile's p99.
Each keeps the head's accuracy floor: it serves no row below `head_floor`. With floor 0 they
are exactly the paper's.

Source: section 6.1 and appendix A.5 of SuperServe (NSDI '25).
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

from router.policies import Choice, usable_slack_ns
from superserve.build import mypyc_attr
from superserve.errors import ConfigError

if TYPE_CHECKING:
    from profiles.table import Profile
    from router.policies import QueueView, WorkerView


@mypyc_attr(allow_interpreted_subclasses=True)
class MaxBatch:
    """The largest batch that fits with the smallest subnet, then the most accurate subnet for it.

    Args:
        profile: Latencies by row and batch size.
        argument: None; it takes no argument.

    Raises:
        ConfigError: There is an argument.
    """

    name = "maxbatch"

    def __init__(self, profile: Profile, argument: str | None = None) -> None:
        _refuse_argument(self.name, argument)
        self._profile = profile

    def choose(self, queue: QueueView, worker: WorkerView, now_ns: int) -> Choice | None:
        """Return the largest batch, then the most accurate row, that fits the head's slack."""
        slack_ns = usable_slack_ns(queue, worker, now_ns)
        batch_size = self._profile.largest_batch(queue.head_floor, slack_ns)
        if batch_size is None:
            return None
        subnet = self._profile.most_accurate(batch_size, slack_ns)
        assert subnet is not None, "what fits on the floor fits on some row"
        return Choice(subnet, batch_size)


@mypyc_attr(allow_interpreted_subclasses=True)
class MaxAcc:
    """The most accurate subnet that fits with one query, then the largest batch on it.

    Args:
        profile: Latencies by row and batch size.
        argument: None; it takes no argument.

    Raises:
        ConfigError: There is an argument.
    """

    name = "maxacc"

    def __init__(self, profile: Profile, argument: str | None = None) -> None:
        _refuse_argument(self.name, argument)
        self._profile = profile

    def choose(self, queue: QueueView, worker: WorkerView, now_ns: int) -> Choice | None:
        """Return the most accurate row, then the largest batch, that fits the head's slack."""
        slack_ns = usable_slack_ns(queue, worker, now_ns)
        subnet = self._profile.most_accurate(1, slack_ns)
        if subnet is None or subnet < queue.head_floor:
            return None
        batch_size = self._profile.largest_batch(subnet, slack_ns)
        assert batch_size is not None, "one query fits"
        return Choice(subnet, batch_size)


@mypyc_attr(allow_interpreted_subclasses=True)
class Fixed:
    """Clipper+: always one subnet, with the largest batch that fits.

    A head whose floor is above that subnet is served on the floor's row: keeping a promise to a
    query matters more than a pure baseline.

    Args:
        profile: Latencies by row and batch size.
        argument: The subnet: its name, its row, "smallest" or "largest".

    Raises:
        ConfigError: There is no argument, or no such subnet.
    """

    def __init__(self, profile: Profile, argument: str | None = None) -> None:
        self.subnet = _parse_subnet(profile, argument)
        self.name = f"fixed:{profile.subnets[self.subnet].name}"
        self._profile = profile

    def choose(self, queue: QueueView, worker: WorkerView, now_ns: int) -> Choice | None:
        """Return the largest batch of the fixed row that fits the head's slack."""
        subnet = max(self.subnet, queue.head_floor)
        return _largest_on(self._profile, subnet, usable_slack_ns(queue, worker, now_ns))


@mypyc_attr(allow_interpreted_subclasses=True)
class MinCost:
    """INFaaS without an accuracy constraint: always the cheapest, least accurate subnet.

    A head's floor is such a constraint: the cheapest subnet is then the floor's row.

    Args:
        profile: Latencies by row and batch size.
        argument: None; it takes no argument.

    Raises:
        ConfigError: There is an argument.
    """

    name = "mincost"

    def __init__(self, profile: Profile, argument: str | None = None) -> None:
        _refuse_argument(self.name, argument)
        self._profile = profile

    def choose(self, queue: QueueView, worker: WorkerView, now_ns: int) -> Choice | None:
        """Return the largest batch of the cheapest allowed row that fits the head's slack."""
        return _largest_on(self._profile, queue.head_floor, usable_slack_ns(queue, worker, now_ns))


def _largest_on(profile: Profile, subnet: int, slack_ns: int) -> Choice | None:
    """Return the largest batch of one row that fits; None if not even one query does."""
    batch_size = profile.largest_batch(subnet, slack_ns)
    return None if batch_size is None else Choice(subnet, batch_size)


def _refuse_argument(name: str, argument: str | None) -> None:
    if argument is not None:
        raise ConfigError(f"{name}: expected no argument, got {argument!r}")


def _parse_subnet(profile: Profile, argument: str | None) -> int:
    """Return the row that the text after `fixed:` means; a subnet's name wins over a row's number."""
    names = tuple(subnet.name for subnet in profile.subnets)
    rows = {str(row): row for row in range(profile.n_subnets)}
    rows |= {"smallest": 0, "largest": profile.n_subnets - 1}
    rows |= {name: row for row, name in enumerate(names)}
    if argument is None:
        raise ConfigError(f"fixed: expected a subnet, as in fixed:{names[0]} or fixed:largest")
    if argument not in rows:
        nearest = difflib.get_close_matches(argument, ("smallest", "largest", *names), n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ConfigError(
            f"fixed: profile {profile.name!r} has no subnet {argument!r}: expected a name, "
            f"a row from 0 to {profile.n_subnets - 1}, 'smallest' or 'largest'{hint}"
        )
    return rows[argument]
