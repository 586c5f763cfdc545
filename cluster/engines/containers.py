"""What containers of every engine share: the image's user and folder, and what a file may not ask of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from superserve.roles.local import DEFAULT_NAME

if TYPE_CHECKING:
    import re

    from cluster.engines.describe import Description, RoleGroup

IMAGE = "superserve"
"""The image that deploy/Dockerfile builds, unless the command names another."""
USER = 10_001
"""The user and the group of the image."""
FOLDER = "/run/superserve"
"""Where a role's files lie in its container."""
SCRATCH = "/tmp"  # noqa: S108  the container's own
"""What a role may write, in memory: the root file system is read-only."""
DEVICE = "cuda:0"
"""The GPU of a container that was given one."""


@dataclass(frozen=True, slots=True)
class RenderOptions:
    """What the command adds to a hosts file.

    Attributes:
        image: The image of every role.
        owner: User and group of the files that are written beside the rendered one.
    """

    image: str = IMAGE
    owner: tuple[int, int] = (USER, USER)


def object_name(cluster: str) -> str:
    """Return what the names of a cluster's objects begin with."""
    return "superserve" if cluster == DEFAULT_NAME else cluster


def project_name(description: Description, pattern: re.Pattern[str], expected: str) -> str:
    """Return the name under which an engine knows the cluster.

    Raises:
        ConfigError: The engine would not take it.
    """
    name = object_name(description.name)
    if pattern.fullmatch(name) is None:
        raise description.error(("cluster",), f"expected {expected}, got {name!r}")
    return name


def check_network(description: Description, engine: str) -> None:
    """Refuse roles that would have to listen beyond loopback without leave.

    Raises:
        ConfigError: There are no keys, and the file does not say that none are needed.
    """
    if description.has_keys or description.hosts.security == "none":
        return
    raise description.error(
        ("security",),
        f"on {engine} roles reach each other over a network, and without keys nothing listens beyond "
        f"loopback: make keys with `cluster keys make` and write `keys: FOLDER`, or write `security: none` "
        f"if every program that reaches that network may use it",
    )


def device_of(group: RoleGroup) -> str:
    """Return the device of a worker as its container sees it."""
    return DEVICE if group.gpus else "cpu"
