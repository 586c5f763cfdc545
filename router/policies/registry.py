"""Policies by name: the shipped ones, and those that other packages plug in.

A package adds a policy with an entry point in the group `superserve.policies`:

    [project.entry-points."superserve.policies"]
    mine = "my_package:MyPolicy"

You then choose it by `--policy mine` or `--policy mine:argument`, and the router builds it as
`MyPolicy(profile, argument)`: see `router.policies.Policy`.
"""

from __future__ import annotations

import difflib
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from superserve.errors import ConfigError
from superserve.plugins import load_attribute

if TYPE_CHECKING:
    from collections.abc import Callable

    from profiles.table import Profile
    from router.policies import Policy

ENTRY_POINT_GROUP = "superserve.policies"
"""The group in which packages register policies."""

# Looked up before the entry points: a checkout with stale installed metadata still serves, and no
# package can take over a shipped name. Imported only when chosen.
_SHIPPED = {
    "slackfit": ("router.policies.slackfit", "SlackFit"),
    "demandfit": ("router.policies.demandfit", "DemandFit"),
    "planfit": ("router.policies.planfit", "PlanFit"),
    "maxacc": ("router.policies.baselines", "MaxAcc"),
    "maxbatch": ("router.policies.baselines", "MaxBatch"),
    "fixed": ("router.policies.baselines", "Fixed"),
    "mincost": ("router.policies.baselines", "MinCost"),
}


def known_policies() -> tuple[str, ...]:
    """Return the names that `make_policy` takes: the shipped ones, then the plugged-in ones."""
    plugged_in = {point.name for point in entry_points(group=ENTRY_POINT_GROUP)}
    return (*_SHIPPED, *sorted(plugged_in - _SHIPPED.keys()))


def make_policy(spec: str, profile: Profile) -> Policy:
    """Build the policy that `spec` names.

    Args:
        spec: `name` or `name:argument`, such as "slackfit" or "fixed:largest"; or `module:attribute`,
            perhaps with `:argument`, for your own policy.
        profile: What the policy chooses from.

    Raises:
        ConfigError: No policy has that name, it cannot be imported, or it refuses the argument.
    """
    name, colon, argument = spec.partition(":")
    factory = _factory(name)
    if factory is None and colon:
        attribute, colon, argument = argument.partition(":")
        factory = _own_factory(name, attribute)
    if factory is None:
        raise ConfigError(_no_policy(name))
    try:
        policy: Policy = factory(profile, argument if colon else None)
    except ConfigError:
        raise
    except Exception as error:
        # A worker with such a profile is refused, as one with other subnets is; the router serves on.
        raise ConfigError(f"policy {name!r}: it cannot be built for {profile.name}: {error!r}") from error
    if not callable(getattr(policy, "choose", None)) or not isinstance(getattr(policy, "name", None), str):
        raise ConfigError(
            f"policy {name!r}: expected an object with a name and choose(), got {type(policy).__name__}"
        )
    return policy


def _own_factory(module: str, attribute: str) -> Callable[[Profile, str | None], Any]:
    """Return the factory `module:attribute`."""
    try:
        own: Callable[[Profile, str | None], Any] = load_attribute(module, attribute)
    except ModuleNotFoundError as error:
        if error.name == module.partition(".")[0]:
            raise ConfigError(_no_policy(module)) from error
        raise ConfigError(f"policy {module}:{attribute}: {error}") from error
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"policy {module}:{attribute}: {error}") from error
    return own


def _factory(name: str) -> Callable[[Profile, str | None], Any] | None:
    """Return the factory of the policy called `name`; None if there is none."""
    if name in _SHIPPED:
        module, attribute = _SHIPPED[name]
        shipped: Callable[[Profile, str | None], Any] = getattr(import_module(module), attribute)
        return shipped
    for point in entry_points(group=ENTRY_POINT_GROUP, name=name):
        try:
            plugged_in: Callable[[Profile, str | None], Any] = point.load()
        except (ImportError, AttributeError) as error:
            raise ConfigError(f"policy {name!r}: {point.value} cannot be imported: {error}") from error
        return plugged_in
    return None


def _no_policy(name: str) -> str:
    """Return the error for an unknown policy: the nearest name, and all that are known."""
    known = known_policies()
    nearest = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    return f"policy {name!r} is unknown: expected one of {', '.join(known)}{hint}"
