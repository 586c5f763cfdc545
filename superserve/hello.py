"""HELLO and WELCOME: how client, worker and router introduce themselves, as dataclasses.

They travel as the JSON objects of Control messages. The receiver decodes each once, at its socket;
`superserve.fields` reports missing and wrong fields by name.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from superserve.errors import WireError
from superserve.fields import OMITTED, body_of, read, shown
from superserve.subnet import TensorSpec  # noqa: TC001  read at run time: the fields' types are the format

if TYPE_CHECKING:
    from typing import Self

MAX_SLOTS = 4096
"""Most GPUs of one worker process: a bound on what one HELLO makes the router allocate."""


class Introduction:
    """What HELLO and WELCOME have in common."""

    __slots__ = ()

    def body(self) -> dict[str, Any]:
        """Return the body of the message."""
        return body_of(self)


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What a router's workers serve; None as `input` or `output` takes or gives any bytes.

    Attributes:
        supernet: Its name.
    """

    input: TensorSpec | None = None
    output: TensorSpec | None = None
    supernet: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientHello(Introduction):
    """The first message of a client.

    Attributes:
        session: Identifies the client beyond its connection: it keeps its queries across reconnects.
        wire: The lowest and highest wire version that it speaks; None if it does not state them.
    """

    role: str = "client"
    session: int
    wire: tuple[int, int] | None = field(default=None, metadata=OMITTED)

    @classmethod
    def from_body(cls, body: dict[str, Any]) -> Self:
        """Read the body of a client's HELLO.

        Raises:
            WireError: The session is missing, or a field is not what it should be.
        """
        if body.get("role") == "worker":
            raise WireError("hello: a worker came to the endpoint of clients: expected that of workers")
        return read(cls, _with_range(body), "hello")


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerHello(Introduction):
    """The first message of a worker process: its name, and what its GPUs run and how fast.

    Attributes:
        name: Unique in the cluster; with "" the router names it after its connection.
        n_slots: How many GPUs it has, 1 to `MAX_SLOTS`.
        profiles: One for all GPUs or one for each, as `Profile.to_dict` gives it.
        input: What one query takes; None means any bytes.
        output: What one query gives; None means any bytes.
        host: The machine that it runs on; "" if not stated.
        version: The version of the code that it runs; "" if not stated.
        pid: Its process; 0 if not stated.
        life: Distinguishes this process from every other of the same name; "" if not stated.
        device: What its GPUs are, in words.
        fingerprint: Of the weights; "" if there are none.
        shared: Whether it takes offers of memory with payloads; see `superserve.shared`.
        guest: Whether it belongs to another router, and only lends this one credits: sent to routers that
            have said what GPU time is worth to them.
        wire: As for `ClientHello`; older workers send one number, which is both.
    """

    role: str = "worker"
    name: str = ""
    host: str = ""
    version: str = ""
    pid: int = 0
    life: str = ""
    device: str = ""
    fingerprint: str = ""
    shared: bool | None = field(default=None, metadata=OMITTED)
    guest: bool | None = field(default=None, metadata=OMITTED)
    profiles: tuple[dict[str, Any], ...]
    n_slots: int
    input: TensorSpec | None = None
    output: TensorSpec | None = None
    wire: tuple[int, int] | None = field(default=None, metadata=OMITTED)

    @classmethod
    def from_body(cls, body: dict[str, Any], name: str) -> Self:
        """Read the body of a worker's HELLO; errors begin with the worker's name.

        Args:
            body: As received.
            name: What to call a worker without a name.

        Raises:
            WireError: A field is missing or not what it should be.
        """
        if body.get("role") == "client":
            raise WireError("hello: a client came to the endpoint of workers: expected that of clients")
        given = body.get("name") or name
        where = f"worker {given if isinstance(given, str) else name}"
        n_slots, tables = body.get("n_slots"), body.get("profiles")
        if not isinstance(n_slots, int) or isinstance(n_slots, bool) or not 1 <= n_slots <= MAX_SLOTS:
            raise WireError(f"{where}: n_slots: expected 1 to {MAX_SLOTS}, got {shown(n_slots)}")
        if not isinstance(tables, list | tuple) or len(tables) not in (1, n_slots):
            raise WireError(f"{where}: profiles: expected one for all GPUs, or one for each")
        return read(cls, _with_range({**body, "name": given}), where)


def _with_range(body: dict[str, Any]) -> dict[str, Any]:
    """Return a body whose `wire` is a range: the single number of older workers is both ends."""
    wire = body.get("wire")
    return {**body, "wire": [wire, wire]} if isinstance(wire, int) else body


@dataclass(frozen=True, slots=True)
class ClientWelcome(Introduction):
    """The router's answer to a client's HELLO; sent again when the model changes.

    Attributes:
        epoch: The router's life. Another router has none of the queries sent under this one.
        model: What the workers serve; None before a worker has joined.
        subnets: Name and accuracy (percent) of each row of the profile.
        policy: What chooses the batches, as `--policy` takes it.
        wire: The wire version to speak from now on; None if there is only one.
        shared: Whether it takes offers of memory with payloads; see `superserve.shared`.
        routers: The client endpoints of all routers of the cluster; None if there is one.
        gpus: GPUs that get work here; None if there is one router.
    """

    epoch: int
    model: ModelSpec | None = None
    subnets: tuple[tuple[str, float], ...] = ()
    policy: str = ""
    wire: int | None = field(default=None, metadata=OMITTED)
    shared: bool | None = field(default=None, metadata=OMITTED)
    routers: tuple[str, ...] | None = field(default=None, metadata=OMITTED)
    gpus: int | None = field(default=None, metadata=OMITTED)

    @classmethod
    def from_body(cls, body: dict[str, Any]) -> Self:
        """Read the body of a WELCOME to a client.

        Raises:
            WireError: The epoch is missing, or a field is not what it should be.
        """
        return read(cls, body, "welcome")


@dataclass(frozen=True, slots=True)
class WorkerWelcome(Introduction):
    """The router's answer to a worker's HELLO.

    Attributes:
        epoch: This worker's: the router drops what comes under an older one. 0 to 2^64 - 1.
        router: The router's own life; 0 if not stated.
        wire: As for `ClientWelcome`.
        routers: The worker endpoints of all routers of the cluster; None if there is one.
    """

    epoch: int
    router: int = 0
    wire: int | None = field(default=None, metadata=OMITTED)
    routers: tuple[str, ...] | None = field(default=None, metadata=OMITTED)

    @classmethod
    def from_body(cls, body: dict[str, Any]) -> Self:
        """Read the body of a WELCOME to a worker.

        Raises:
            WireError: The epoch is missing, or a field is not what it should be.
        """
        found = read(cls, body, "welcome")
        if not 0 <= found.epoch < 2**64:
            raise WireError(f"welcome: epoch: expected 0 to 2^64 - 1, got {found.epoch}")
        return found


@dataclass(frozen=True, slots=True)
class RouterBrief(Introduction):
    """A router's short answer to a worker that asks with STATUS and `brief`: is this the place to be?

    Attributes:
        router: The router's life.
        gpus: GPUs that get work there.
        is_draining: It takes no new work.
        routers: The worker endpoints of all routers of the cluster; None if there is one.
        price: What GPU time is worth there (`router.core.price`); None if it takes no guests.
    """

    router: int
    gpus: int
    is_draining: bool = False
    routers: tuple[str, ...] | None = field(default=None, metadata=OMITTED)
    price: float | None = field(default=None, metadata=OMITTED)

    @classmethod
    def from_body(cls, body: dict[str, Any]) -> Self:
        """Read the body of the answer.

        Raises:
            WireError: A field is missing or not what it should be.
        """
        return read(cls, body, "status")
