"""Where the routers are, for roles on an engine that chooses the machines: pure, but for one file.

An engine learns only while a cluster runs where it has placed a router, and may place it elsewhere later. So
a role's arguments have names for it, and the job or actor that keeps the role there replaces them:

    {routers}    of a worker: the endpoints of the routers that run, with commas between
    {listed}     of a router: the file that lists those, which is written again when one comes, moves or goes

Workers and clients hear of other routers from those that they know. A worker is started again only if all
that it can know of are gone and others run.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.spec.roles import at, routers_file
from superserve.files import write_private

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

ROUTERS, LISTED = "{routers}", "{listed}"
"""In a role's arguments: where workers reach the routers, and the file that lists them."""

_NUMBER = re.compile(r"-(\d+)$")


@dataclass(frozen=True, slots=True)
class RouterAt:
    """A router that runs.

    Attributes:
        client: Where clients reach it.
        worker: Where workers reach it.
    """

    client: str
    worker: str


def router_at(argv: Sequence[str], address: str) -> RouterAt:
    """Return where a router is reached that was started with these arguments on a machine."""
    ports = [
        int(argv[argv.index(f"--{whose}-endpoint") + 1].rpartition(":")[2]) for whose in ("client", "worker")
    ]
    client, worker = (at(address, port) for port in ports)
    return RouterAt(client, worker)


class RoutersKnown:
    """The routers that one role knows of.

    Args:
        name: The role's.
        argv: Its arguments, with names for what is replaced.
        listed: The file that a router is given, if it is one of a list.
    """

    def __init__(self, name: str, argv: Sequence[str], listed: Path) -> None:
        self._argv = tuple(argv)
        self._listed = listed
        self._known: set[str] = set()
        self._written: list[RouterAt] | None = None
        number = _NUMBER.search(name)
        self._turn = int(number[1]) if number is not None else 0
        self.needs_one = any(ROUTERS in word for word in self._argv)
        self.is_listed = any(LISTED in word for word in self._argv)

    def started(self, found: Mapping[str, RouterAt]) -> tuple[str, ...] | None:
        """Return the arguments to start the role with; None while no router runs that it needs.

        Args:
            found: The routers that run, by name.
        """
        if self.needs_one and not found:
            return None
        ends = [found[name].worker for name in sorted(found)]
        self._known = set(ends)
        # Each begins its list with another router: of routers that are alike it joins the first.
        turn = self._turn % len(ends) if ends else 0
        connect = ",".join(ends[turn:] + ends[:turn])
        self.write(found)
        return tuple(word.replace(ROUTERS, connect).replace(LISTED, str(self._listed)) for word in self._argv)

    def has_moved(self, found: Mapping[str, RouterAt]) -> bool:
        """Take where the routers are now; return whether the role can know none of them."""
        self.write(found)
        ends = {router.worker for router in found.values()}
        if not self.needs_one or not ends:
            return False
        if ends & self._known:
            self._known |= ends  # it hears of the others
            return False
        return True

    def write(self, found: Mapping[str, RouterAt]) -> None:
        """Write the list of routers for a router that is one of them; what is not known changes nothing."""
        routers = [found[name] for name in sorted(found)]
        if not self.is_listed or routers == self._written or (self._written is not None and not routers):
            return
        self._written = routers
        others = routers if len(routers) > 1 else []  # a single one has none to name
        content = routers_file([router.client for router in others], [router.worker for router in others])
        self._listed.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_private(self._listed, content)
