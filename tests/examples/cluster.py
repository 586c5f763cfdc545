"""The digits supernet served on this machine, by a router that can be killed and started again."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from superserve.roles.processes import ProcessGroup, wait_ready

if TYPE_CHECKING:
    from collections.abc import Iterator

    from superserve.roles.processes import RoleProcess

READY_S = 60.0


@dataclass(slots=True)
class DigitsCluster:
    """A router on endpoints of its own choice, and one CPU worker.

    Attributes:
        client_endpoint: Where clients connect, whichever router is there.
        worker_endpoint: Where the worker connects.
    """

    group: ProcessGroup
    router: RoleProcess
    client_endpoint: str
    worker_endpoint: str

    def kill_router(self) -> None:
        """SIGKILL the router."""
        self.router.kill()

    def start_router(self) -> None:
        """Start another at the same endpoints; return when it can serve."""
        self.router = self.group.start(
            "router", ["-m", "router", "--client-endpoint", self.client_endpoint,
                       "--worker-endpoint", self.worker_endpoint],
        )  # fmt: skip
        wait_ready(self.router, READY_S)


@contextlib.contextmanager
def serving(*router_options: str, has_worker: bool = True) -> Iterator[DigitsCluster]:
    """Serve the digits supernet; every process is gone when the block ends.

    Args:
        router_options: What the first router is given beyond its defaults.
        has_worker: Without one, queries wait in the queue until they expire.
    """
    with ProcessGroup() as group:
        router = group.start("router", ["-m", "router", *router_options])
        group.wait_ready(READY_S)
        if has_worker:
            group.start(
                "worker",
                ["-m", "gpu_worker", "--connect", router.ready["worker"], "--supernet", "digits",
                 "--device", "cpu", "--threads", "1"],
            )  # fmt: skip
            group.wait_ready(READY_S)
        yield DigitsCluster(group, router, router.ready["client"], router.ready["worker"])
