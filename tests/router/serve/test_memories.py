"""A real router and memory that its clients share: it reads what was offered, and nothing else."""

from __future__ import annotations

import os
import struct
from array import array
from typing import TYPE_CHECKING, Any

import pytest

from router.serve.recording import replay
from superserve import wire
from superserve.clock import SECOND
from superserve.net.connection import ask_status
from superserve.shared.foreign import ForeignMemory
from superserve.shared.offers import MemoryOffer, seen_proof
from superserve.shared.owned import OwnedMemory
from superserve.shared.slots import FIRST_OFFSET
from superserve.wire import (
    Control,
    Directive,
    Done,
    DoneRow,
    Kind,
    Ping,
    Pong,
    Pull,
    PullRow,
    Queries,
    Status,
)
from tests.router.serve.test_server import Net, Peer, role
from tests.superserve.client.fakes import WAIT_S, poll
from tests.superserve.shared.descriptors import memories_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from superserve.roles.processes import RoleProcess
    from superserve.wire import Message

pytestmark = pytest.mark.e2e

N_BYTES = 50_000


@pytest.fixture(scope="module")
def router() -> Iterator[RoleProcess]:
    """Yield one router for the tests that leave it as they found it."""
    with role() as router:
        yield router


@pytest.fixture
def net() -> Iterator[Net]:
    """Yield what peers are made of."""
    net = Net()
    yield net
    net.close()


@pytest.fixture
def memory() -> Iterator[OwnedMemory]:
    """Yield a client's memory of 16 MiB."""
    memory = OwnedMemory(3, 16 << 20)
    yield memory
    memory.close()


def share(peer: Peer, offer: MemoryOffer, **changes: Any) -> dict[str, Any]:
    """Offer a memory and return the router's answer."""
    peer.send(Control(Kind.SHARE, offer.body() | changes))
    return peer.control(Kind.SHARE)


def placed(memory: OwnedMemory, ids: tuple[int, ...], payloads: list[bytes]) -> Queries:
    """Return a message whose payloads lie in a memory."""
    places = []
    for payload in payloads:
        place = memory.place(payload, len(payload))
        assert place is not None
        places.append(struct.pack("<QQ", *place))
    return referring(ids, len(payloads[0]), b"".join(places), memory.offer.memory)


def referring(ids: tuple[int, ...], each: int, places: bytes, number: int) -> Queries:
    """Return a message with any places."""
    n = len(ids)
    slacks = array("q", [20 * SECOND] * n).tobytes()
    return Queries(
        0, 0, n, array("Q", ids).tobytes(), slacks, each, [], True,
        shared=wire.SharedPayloads(number, places),
    )  # fmt: skip


class Worker(Peer):
    """A worker of one GPU that says what the test says."""

    def start(self, **changes: Any) -> None:
        """Join and take a batch at a time."""
        self.epoch = self.join(**changes)["epoch"]
        self.send(Pull(self.epoch, [PullRow(0, 2, 0, 0, 0, 0, 0)]))

    def next(self) -> Message:
        """Return the next message; PINGs are answered, or the router would bury it."""
        while isinstance(message := super().next(), Ping):
            self.send(Pong(message.stamp_ns, 0))
        return message

    def directive(self) -> Directive:
        """Return the next batch."""
        while not isinstance(message := self.next(), Directive):
            pass
        return message

    def done(self, directive: Directive) -> None:
        """Answer every query of a batch with four bytes."""
        batch, n = directive.batch_id, directive.n
        self.send(
            Done(self.epoch, [DoneRow(batch, 0, 2, 0, n, 0, SECOND // 1000, batch, 0, 0, 4, bytes(4 * n))])
        )


def counts(router: RoleProcess) -> dict[str, int]:
    """Return the router's counts."""
    return ask_status(router.ready["client"], timeout_s=WAIT_S).counts


def test_a_worker_that_sees_the_memory_reads_it_and_another_gets_copies(
    net: Net, memory: OwnedMemory
) -> None:
    """The first batch is copied, since the worker has not proved anything yet; after the proof it is not."""
    with role() as router:
        worker = Worker(net, router.ready["worker"])
        worker.start(shared=True)
        client = Peer(net, router.ready["client"])
        assert client.hello()["shared"] is True
        assert share(client, memory.offer)["seen"] == ForeignMemory(memory.offer).seen
        payloads = [bytes([i]) * N_BYTES for i in (1, 2)]

        client.send(placed(memory, (1, 2), payloads))

        first = worker.directive()
        assert [bytes(payload) for payload in first.payload_list()] == payloads
        offer = MemoryOffer.from_body(worker.control(Kind.SHARE))
        worker.done(first)
        assert client.results() == {1: Status.OK, 2: Status.OK}

        worker.send(Control(Kind.SHARE, {"memory": offer.memory, "seen": ForeignMemory(offer).seen}))
        poll_until_read(client, worker, memory, offer)

        client.send(Control(Kind.BYE))
        assert worker.control(Kind.SHARE) == {"gone": [offer.memory]}
        assert counts(router)["copied_payloads"] >= 2


def poll_until_read(client: Peer, worker: Worker, memory: OwnedMemory, offer: MemoryOffer) -> None:
    """Send queries until the worker is given places: its proof travels beside them."""
    for i in range(10, 200):
        client.send(placed(memory, (i,), [bytes([i % 251]) * N_BYTES]))
        directive = worker.directive()
        worker.done(directive)
        assert client.results() == {i: Status.OK}
        (segment,) = directive.segments
        if segment.shared is not None:
            assert segment.shared.memory == offer.memory
            offset, stamp = struct.unpack("<QQ", segment.shared.places)
            into = bytearray(N_BYTES)
            assert ForeignMemory(offer).read((offset, stamp), into)
            assert into == bytes([i % 251]) * N_BYTES
            return
    raise AssertionError("the worker was never given places")


@pytest.mark.parametrize("why", ["older", "another host"])
def test_a_worker_that_does_not_see_the_memory_gets_copies_for_ever(
    net: Net, memory: OwnedMemory, why: str
) -> None:
    """Of an older release, or on another host: it asks for no offer, or cannot prove that it sees it."""
    with role() as router:
        worker = Worker(net, router.ready["worker"])
        worker.start(shared=None if why == "older" else True)
        client = Peer(net, router.ready["client"])
        client.hello()
        share(client, memory.offer)
        for i in range(1, 5):
            payload = bytes([i]) * N_BYTES
            client.send(placed(memory, (i,), [payload]))
            directive = worker.directive()
            assert [bytes(one) for one in directive.payload_list()] == [payload]
            if i == 1 and why == "another host":
                number = worker.control(Kind.SHARE)["memory"]
                worker.send(Control(Kind.SHARE, {"memory": number, "seen": seen_proof(b"guessed")}))
            worker.done(directive)
            assert client.results() == {i: Status.OK}
        assert counts(router)["copied_payloads"] == 4


@pytest.mark.parametrize(
    ("places", "number", "each"),
    [
        (struct.pack("<QQ", 0, 1), 3, N_BYTES),
        (struct.pack("<QQ", (16 << 20) - 100, 1), 3, N_BYTES),
        (struct.pack("<QQ", 2**64 - 1, 1), 3, N_BYTES),
        (struct.pack("<QQ", FIRST_OFFSET, 1), 3, 2**32 - 2),
        (struct.pack("<QQ", FIRST_OFFSET, 1), 4, N_BYTES),
        (struct.pack("<QQ", FIRST_OFFSET, 1), 2**64 - 1, N_BYTES),
    ],
    ids=["head", "end", "overflow", "long", "another", "no such"],
)
def test_a_place_outside_what_the_connection_offered_is_refused_and_counted(
    router: RoleProcess, net: Net, memory: OwnedMemory, places: bytes, number: int, each: int
) -> None:
    """Its query ends as INVALID at once, and the router lives."""
    client, other = Peer(net, router.ready["client"]), Peer(net, router.ready["client"])
    client.hello(1)
    other.hello(2)
    another = OwnedMemory(4, 1 << 20)
    before = counts(router).get("refused_payloads", 0)
    share(client, memory.offer)
    share(other, another.offer)

    client.send(referring((5,), each, places, number))

    assert client.results() == {5: Status.INVALID}
    assert counts(router)["refused_payloads"] == before + 1
    another.close()


def test_a_place_before_any_offer_is_refused(router: RoleProcess, net: Net) -> None:
    """So is one after the connection is another one: each offers its own memory."""
    client = Peer(net, router.ready["client"])
    client.hello()
    client.send(referring((5,), N_BYTES, struct.pack("<QQ", FIRST_OFFSET, 1), 3))
    assert client.results() == {5: Status.INVALID}


def test_hostile_offers_are_answered_alike_and_open_nothing(
    router: RoleProcess, net: Net, memory: OwnedMemory
) -> None:
    """Who guesses processes and files does not learn which there are; the router opens none of them."""
    client = Peer(net, router.ready["client"])
    client.hello()
    pipe = os.pipe()
    poll(lambda: memories_of(router.pid) == 0)
    n_refused = counts(router).get("refused_memories", 0)
    for changes in (
        {"pid": 2**62}, {"pid": router.pid}, {"pid": 1, "fd": 0}, {"fd": 2**62}, {"fd": pipe[0]},
        {"n_bytes": 1}, {"n_bytes": 2**62}, {"proof": ""}, {"proof": "x" * 10_000},
    ):  # fmt: skip
        assert share(client, memory.offer, **changes) == {"memory": 3, "seen": ""}
    for wrong in ({"pid": -1}, {"pid": "1"}, {"fd": None}, {"proof": 7}, {"n_bytes": 0.5}):
        client.send(Control(Kind.SHARE, memory.offer.body() | wrong))
        assert client.control(Kind.REFUSED)["code"] == "malformed"
    assert memories_of(router.pid) == 0
    assert counts(router)["refused_memories"] == n_refused + 9
    assert share(client, memory.offer)["seen"], "the true offer is accepted still"
    os.close(pipe[0])
    os.close(pipe[1])


def test_a_stranger_cannot_offer_and_a_worker_cannot_share(
    router: RoleProcess, net: Net, memory: OwnedMemory
) -> None:
    """SHARE is for peers that said HELLO."""
    for end in ("client", "worker"):
        stranger = Peer(net, router.ready[end])
        stranger.send(Control(Kind.SHARE, memory.offer.body()))
        assert stranger.control(Kind.REFUSED)["code"] == "malformed"


def test_an_offer_replaces_the_one_before_and_bye_ends_it(
    router: RoleProcess, net: Net, memory: OwnedMemory
) -> None:
    """A connection has one memory at a time; the router has no descriptor left of any other."""
    client = Peer(net, router.ready["client"])
    client.hello()
    poll(lambda: memories_of(router.pid) == 0)
    for _ in range(20):
        assert share(client, memory.offer)["seen"]
    assert memories_of(router.pid) == 1
    client.send(Control(Kind.BYE))
    poll(lambda: memories_of(router.pid) == 0)


def test_payloads_in_memory_count_against_the_routers_bound(net: Net, memory: OwnedMemory) -> None:
    """Descriptors are small, but what they stand for is held until it is answered."""
    with role("--max-bytes", "120000") as router:
        client = Peer(net, router.ready["client"])
        client.hello()
        share(client, memory.offer)
        client.send(placed(memory, (1, 2), [bytes(N_BYTES)] * 2))
        assert ask_status(router.ready["client"], timeout_s=WAIT_S).queue.held_bytes == 2 * N_BYTES

        client.send(placed(memory, (3,), [bytes(N_BYTES)]))

        assert client.results() == {3: Status.OVERLOADED}
        client.send(Control(Kind.BYE))


def test_a_router_without_shared_memory_asks_for_none(net: Net, memory: OwnedMemory) -> None:
    """Its WELCOME is as an older release's, and it sees no memory."""
    with role("--no-shared-memory") as router:
        client = Peer(net, router.ready["client"])
        assert "shared" not in client.hello()
        assert share(client, memory.offer)["seen"] == ""


def test_a_recorded_run_with_shared_payloads_replays(net: Net, memory: OwnedMemory, tmp_path: Path) -> None:
    """The log has the payloads' sizes, as of those in frames: a query that was one too many is so again."""
    log = tmp_path / "router.jsonl"
    with role("--record", str(log), "--max-bytes", "120000") as router:
        worker = Worker(net, router.ready["worker"])
        worker.start()
        client = Peer(net, router.ready["client"])
        client.hello()
        share(client, memory.offer)
        client.send(placed(memory, (1, 2), [bytes(N_BYTES)] * 2))
        batch = worker.directive()
        client.send(placed(memory, (3,), [bytes(N_BYTES)]))
        assert client.results() == {3: Status.OVERLOADED}
        worker.done(batch)
        assert client.results() == {1: Status.OK, 2: Status.OK}
        assert router.stop() == 0

    result = replay(log)

    assert (result.n_directives, result.mismatches) == (1, ())


def test_an_answer_that_no_offer_asked_for_is_ignored(router: RoleProcess, net: Net) -> None:
    """One that is malformed is refused; the worker stays."""
    worker = Worker(net, router.ready["worker"])
    worker.start(shared=True, name="answering")
    worker.send(Control(Kind.SHARE, {"memory": 5, "seen": "x"}))
    worker.send(Control(Kind.SHARE, {"memory": "x"}))
    assert worker.control(Kind.REFUSED)["code"] == "malformed"
    worker.send(Control(Kind.BYE))
