"""What belongs to a model: its queue, its demand, its profiles and their policies.

There is one model today. What serves several gives each one of these, and a worker those that it hosts.
"""

from __future__ import annotations

from math import isnan
from typing import TYPE_CHECKING

import numpy as np

from router.core.edf import EdfQueue
from router.core.lanes import LaneQueue
from router.policies.caution import Caution
from router.policies.demand import Demand
from router.policies.due import weights_of
from superserve.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from profiles.table import Profile
    from router.policies import Policy
    from superserve.wire import Buffer

_F32_ERROR = 2.0**-18
"""How far above what was meant a percentage sent as f32 may lie: half of its spacing from 64 to 128."""


class Model:
    """A model that queries ask for and GPUs host.

    Args:
        make_policy: Builds the policy for a GPU's profile; called once per distinct profile.

    Attributes:
        queue: Its queries that wait. Another object once the policy turns out to see demand.
        demand: What arrives and what can serve it; None unless its policy asks.
        caution: What its losses say about the measurements.
        reference: The first profile that a worker brought; all others have its subnets. None before.
        payload_bytes: What it takes for each query; None if any size will do, or no worker has said.
    """

    __slots__ = ("_make_policy", "_policies", "caution", "demand", "payload_bytes", "queue", "reference")

    def __init__(self, make_policy: Callable[[Profile], Policy]) -> None:
        self.queue = EdfQueue()
        self.demand: Demand | None = None
        self.caution = Caution()
        self.reference: Profile | None = None
        self.payload_bytes: int | None = None
        self._make_policy = make_policy
        # By identity: a profile is a large table, and a thousand GPUs share one object.
        self._policies: dict[int, tuple[Profile, Policy]] = {}

    @property
    def n_profiles(self) -> int:
        """How many distinct profiles its GPUs have brought so far."""
        return len(self._policies)

    def policy_of(self, profile: Profile) -> Policy:
        """Return the policy for GPUs of a profile; equal profiles share one.

        Raises:
            ConfigError: The profile has other subnets than those of the first.
        """
        known = self._policies.get(id(profile))
        if known is None:
            reference = self.reference
            if reference is not None and _names(reference) != _names(profile):
                raise ConfigError(
                    f"profile {profile.name}: expected the subnets of {reference.name}, "
                    "which the cluster's other workers host"
                )
            for other, policy in self._policies.values():
                if other == profile:
                    return policy
            known = self._policies[id(profile)] = (profile, self._make_policy(profile))
            if reference is None:
                self.reference = profile
        return known[1]

    def retune(self, make_policy: Callable[[Profile], Policy]) -> None:
        """Let another policy decide from now on; the queue becomes what that one takes from.

        Raises:
            ConfigError: It cannot be built for a profile; then nothing has changed.
        """
        self._policies = {
            key: (profile, make_policy(profile)) for key, (profile, _) in self._policies.items()
        }
        self._make_policy = make_policy
        if self.reference is None:
            return
        had_demand = self.demand is not None
        if not had_demand:
            waiting = self.queue.take_before(1 << 63)
            self.show_demand()
            for cohort, lo, hi in waiting:
                self.queue.push(cohort, lo, hi)
                if self.demand is not None:
                    # All that is known of how patient queries are: without it all would seem late.
                    slacks_ns = [deadline_ns - cohort.base_ns for deadline_ns in cohort.deadlines_ns[lo:hi]]
                    self.demand.arrived(slacks_ns, cohort.arrived_ns)
        elif not self._sees_demand():
            waiting = self.queue.take_before(1 << 63)
            self.demand, self.queue = None, EdfQueue()
            for cohort, lo, hi in waiting:
                self.queue.push(cohort, lo, hi)

    def show_demand(self) -> None:
        """Keep track of demand, and the queue in lanes, from now on if the policy asks for it.

        Call it once the first profile is known and what waits has its floors: lanes are by floor.
        """
        if self._sees_demand():
            assert self.reference is not None, "a policy is built for a profile"
            self.demand = Demand()
            self.queue = LaneQueue(self.queue, weights_of(self.reference.least_costs_ns()))

    def _sees_demand(self) -> bool:
        assert self.reference is not None, "a policy is built for a profile"
        return bool(getattr(self.policy_of(self.reference), "sees_demand", False))

    def floor_rows(self, min_accuracy: Buffer, lo: int, hi: int) -> list[int | None]:
        """Return the smallest row that is as accurate as each of queries lo to hi asks for; None if none is.

        Args:
            min_accuracy: Percent, f32, as the wire has it.
            lo: The first query.
            hi: The one after the last.
        """
        profile = self.reference
        assert profile is not None, "rows are those of a profile"
        asked = np.frombuffer(min_accuracy, "<f4")[lo:hi].tolist()
        return [None if isnan(one) else profile.floor_row(one - _F32_ERROR) for one in asked]


def _names(profile: Profile) -> tuple[str, ...]:
    return tuple(subnet.name for subnet in profile.subnets)
