"""A real router process, its ports open to anyone: it answers, counts, refuses and lives."""

from __future__ import annotations

import os
import random
import signal
import struct
from array import array
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import orjson
import pytest
import zmq

from profiles.table import load_profile
from router.serve.loop import RouterServer, ServerSettings
from router.serve.side import PeerConnection
from superserve import wire
from superserve.clock import MS, SECOND
from superserve.errors import ProcessError
from superserve.net import sockets
from superserve.net.connection import ask_status
from superserve.roles import processes
from superserve.wire import (
    Control,
    Done,
    DoneRow,
    Kind,
    Pong,
    Pull,
    PullRow,
    Queries,
    Results,
    RunStop,
    Status,
)
from tests.superserve.client.fakes import WAIT_S, ids_of, next_message, poll

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from superserve.roles.processes import ProcessGroup, RoleProcess
    from superserve.wire import Buffer, Message

pytestmark = pytest.mark.e2e

PROFILE = load_profile("cnn-8gpu-modelled")
SEED = 20_251


class Net:
    """The sockets of one test, closed at its end."""

    def __init__(self) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.sockets: list[zmq.Socket[bytes]] = []

    def close(self) -> None:
        """Close every socket."""
        for socket in self.sockets:
            socket.close(0)
        self.context.term()


class Peer:
    """A DEALER that says what the test says."""

    def __init__(self, net: Net, endpoint: str) -> None:
        self.socket = sockets.connect_dealer(net.context, endpoint)
        net.sockets.append(self.socket)

    def send(self, message: Message) -> None:
        """Send once the connection stands."""
        self.send_frames(wire.encode(message))

    def send_frames(self, frames: Sequence[Buffer]) -> None:
        """Send any bytes."""
        poll(lambda: sockets.send(self.socket, frames))

    def next(self) -> Message:
        """Return the next message."""
        return wire.decode(next_message(self.socket))

    def control(self, kind: Kind) -> dict[str, Any]:
        """Return the body of the next control message of `kind`."""
        while True:
            message = self.next()
            if isinstance(message, Control) and message.kind is kind:
                return message.body

    def hello(self, session: int = 7) -> dict[str, Any]:
        """Say HELLO as a client and return what WELCOME says."""
        self.send(Control(Kind.HELLO, {"role": "client", "session": session}))
        return self.control(Kind.WELCOME)

    def join(self, **changes: Any) -> dict[str, Any]:
        """Say HELLO as a worker of one GPU and return what WELCOME says."""
        self.send(Control(Kind.HELLO, worker_hello(**changes)))
        return self.control(Kind.WELCOME)

    def results(self) -> dict[int, Status]:
        """Return the ends in the next RESULTS, by id."""
        while True:
            message = self.next()
            if isinstance(message, Results):
                return {i: Status(g.status) for g in message.groups for i in array("Q", bytes(g.ids))}


def worker_hello(**changes: Any) -> dict[str, Any]:
    """Return the body of a worker's HELLO; a value of None leaves its key out."""
    body = {
        "role": "worker", "name": "fake", "n_slots": 1, "profiles": [PROFILE.to_dict()], "input": None,
        "output": {"dtype": "uint8", "shape": [4]},
    } | changes  # fmt: skip
    return {key: value for key, value in body.items() if value is not None or key == "input"}


def queries(*ids: int, slack_ns: int = 20 * SECOND, sent_ns: int = 0, epoch: int = 0) -> Queries:
    """Return a QUERIES message of four bytes each."""
    n = len(ids)
    slacks = array("q", [slack_ns] * n).tobytes()
    return Queries(epoch, sent_ns, n, array("Q", ids).tobytes(), slacks, 4, [bytes(4 * n)])


@contextmanager
def role(*args: str) -> Iterator[RoleProcess]:
    """Run a router process; it must still be alive at the end of the block, or have ended well."""
    with processes.start("router", ["-m", "router", *args]) as router:
        processes.wait_ready(router, WAIT_S)
        yield router
        assert router.poll() in (None, 0), router.tail()


@pytest.fixture(scope="module")
def shared() -> Iterator[RoleProcess]:
    """Yield one router for the tests that leave it as they found it."""
    with role() as router:
        yield router


@pytest.fixture
def net() -> Iterator[Net]:
    """Yield what peers are made of."""
    net = Net()
    yield net
    net.close()


def emulated_worker(group: ProcessGroup, router: RoleProcess, name: str = "emulated") -> RoleProcess:
    """Start a real worker process with one emulated GPU."""
    worker = group.start(name, emulated_argv(router, name))
    processes.wait_ready(worker, 2 * WAIT_S)
    return worker


def emulated_argv(router: RoleProcess, name: str) -> list[str]:
    """Return the arguments of a worker process with one emulated GPU."""
    return [
        "-m",
        "gpu_worker",
        "--connect",
        router.ready["worker"],
        "--name",
        name,
        "--emulate",
        PROFILE.name,
    ]


def served(client: Peer, query_id: int) -> bool:
    """Return whether a good query still gets its output."""
    client.send(queries(query_id))
    return client.results() == {query_id: Status.OK}


# --- strangers ------------------------------------------------------------------------------


@pytest.mark.parametrize("port", ["client", "worker"])
def test_whoever_has_not_said_hello_is_told_to(shared: RoleProcess, net: Net, port: str) -> None:
    """No message of a stranger but HELLO, STATUS and control has an effect."""
    peer = Peer(net, shared.ready[port])
    message: Message = queries(1) if port == "client" else Pull(1, [PullRow(0, 1, 0, 0, 0, 0, 0)])
    peer.send(message)

    refused = peer.control(Kind.REFUSED)
    assert (refused["code"], refused["reason"]) == ("say-hello", "the router has no HELLO from you: send one")


@pytest.mark.parametrize("port", ["client", "worker"])
def test_anyone_may_ask_for_status(shared: RoleProcess, net: Net, port: str) -> None:
    """Without a HELLO, on both ports, as JSON."""
    peer = Peer(net, shared.ready[port])
    peer.send(Control(Kind.STATUS))

    body = peer.control(Kind.STATUS)
    assert body["router"]["pid"] == shared.pid
    assert set(body) >= {"router", "queries", "queue", "batches", "workers", "model", "clients", "counts"}


@pytest.mark.parametrize("port", ["client", "worker"])
@pytest.mark.parametrize(
    ("frames", "reason"),
    [
        ([b""], "prelude"),
        ([b"noise, no message"], "magic"),
        ([b"SS\x02\x63" + bytes(4)], "unknown kind 99"),
        ([b"SS\x02\x01" + bytes(4), b"{"], "expected JSON"),
        ([b"SS\x02\x01" + bytes(4), b'{"wire": 2}'], "hello: wire: expected [lowest, highest], got 2"),
        ([b"SS\x02\x03" + bytes(4), b""], "queries: header"),
        (wire.encode_run(RunStop()), "RUN_STOP is between load generators"),
    ],
    ids=["empty", "magic", "kind", "json", "range", "short", "run"],
)
def test_a_malformed_message_is_counted_and_its_sender_told_why(
    shared: RoleProcess, net: Net, port: str, frames: list[bytes], reason: str
) -> None:
    """The reason names the field; the process lives."""
    before = ask_status(shared.ready["client"]).counts.get("malformed", 0)
    peer = Peer(net, shared.ready[port])
    peer.send_frames(frames)

    refused = peer.control(Kind.REFUSED)
    assert refused["code"] == "malformed"
    assert reason in refused["reason"]
    assert ask_status(shared.ready["client"]).counts["malformed"] == before + 1


def frame(version: int, kind: Kind) -> bytes:
    """Return frame 0 of a control message in any wire version."""
    return struct.pack("<2sBBI", b"SS", version, kind, 0)


@pytest.mark.parametrize("port", ["client", "worker"])
@pytest.mark.parametrize(
    ("frames", "theirs"),
    [
        ([frame(1, Kind.HELLO), b'{"role":"client","session":7}'], "1"),
        ([frame(1, Kind.HELLO), b'{"role":"worker","name":"old","wire":1}'], "1"),
        ([frame(1, Kind.STATUS), b"{}"], "1"),
        ([frame(1, Kind.PING) + bytes(8)], "1"),
        ([frame(3, Kind.HELLO), b'{"role":"client","session":7,"wire":[3,4]}'], "3 to 4"),
        ([frame(2, Kind.HELLO), b'{"role":"client","session":7,"wire":[3,4]}'], "3 to 4"),
        ([frame(3, Kind.STATUS), b'{"wire":[3,3]}'], "3"),
        ([frame(9, Kind.QUERIES) + bytes(40)], "9"),
    ],
    ids=["hello 1", "worker 1", "status 1", "ping 1", "hello 3-4", "range alone", "status 3", "queries 9"],
)
def test_a_peer_without_a_wire_version_in_common_is_refused_by_name_and_counted(
    shared: RoleProcess, net: Net, port: str, frames: list[bytes], theirs: str
) -> None:
    """In the version that it wrote in, which it can read; not counted as malformed."""
    before = ask_status(shared.ready["client"]).counts
    peer = Peer(net, shared.ready[port])
    peer.send_frames(frames)

    first, second = next_message(peer.socket)
    assert bytes(first) == frame(frames[0][2], Kind.REFUSED)
    body = orjson.loads(second)
    assert (body["code"], body["wire"]) == ("version", [wire.LOWEST, wire.HIGHEST])
    assert body["reason"].startswith(f"wire version: expected 2, got {theirs}: ")
    after = ask_status(shared.ready["client"]).counts
    assert after["wrong_version"] == before.get("wrong_version", 0) + 1
    assert after.get("malformed", 0) == before.get("malformed", 0)


@pytest.mark.parametrize("version", [1, 2])
def test_a_peer_that_also_speaks_other_wire_versions_is_welcomed_in_the_highest_in_common(
    shared: RoleProcess, net: Net, version: int
) -> None:
    """A HELLO is understood in the lowest version of its sender, even where that is not ours."""
    client, worker = Peer(net, shared.ready["client"]), Peer(net, shared.ready["worker"])
    for peer, body in ((client, {"session": 7}), (worker, worker_hello(name="next"))):
        peer.send(Control(Kind.HELLO, body | {"wire": [version, 3]}, version))
        first, second = next_message(peer.socket)
        assert bytes(first) == frame(2, Kind.WELCOME)
        assert orjson.loads(second)["wire"] == 2
        peer.send(Control(Kind.BYE))
    asker = Peer(net, shared.ready["client"])
    asker.send(Control(Kind.STATUS, {"wire": [version, 3]}, version))
    assert bytes(next_message(asker.socket)[0]) == frame(2, Kind.STATUS)


@pytest.mark.parametrize("session", [None, "seven", 1.5])
def test_a_clients_hello_needs_a_session(shared: RoleProcess, net: Net, session: Any) -> None:
    """The reason names the field."""
    peer = Peer(net, shared.ready["client"])
    peer.send(Control(Kind.HELLO, {"session": session}))

    assert "session: expected an integer" in peer.control(Kind.REFUSED)["reason"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"n_slots": None}, "n_slots: expected 1 to 4096, got None"),
        ({"n_slots": 0}, "n_slots: expected 1 to 4096, got 0"),
        ({"profiles": None}, "profiles: expected one for all GPUs"),
        ({"profiles": [{}]}, "worker fake"),
        ({"profiles": [7]}, "worker fake"),
        ({"input": {"dtype": "float32", "shape": ["a"]}}, "input: expected a dtype and a shape"),
        ({"input": {"dtype": ",", "shape": [1]}}, "input: expected a dtype and a shape"),
        ({"input": [1]}, "input: expected a dtype and a shape"),
        ({"output": {"dtype": "float32"}}, "output: expected a dtype and a shape"),
    ],
    ids=str,
)
def test_a_worker_whose_hello_lacks_something_is_refused_with_the_reason(
    shared: RoleProcess, net: Net, changes: dict[str, Any], reason: str
) -> None:
    """It names the worker and the field, and what was expected."""
    peer = Peer(net, shared.ready["worker"])
    peer.send(Control(Kind.HELLO, worker_hello(**changes)))

    refused = peer.control(Kind.REFUSED)
    assert refused["code"] == "refused"
    assert reason in refused["reason"]
    assert ask_status(shared.ready["client"]).workers == ()


def test_a_worker_with_other_subnets_or_another_model_is_refused(net: Net) -> None:
    """One router serves one supernet; the reason says which one others host."""
    other = load_profile("transformer-8gpu-modelled").to_dict()
    with role() as router:
        first = Peer(net, router.ready["worker"])
        first.join(name="first")
        for changes, reason in (
            ({"profiles": [other]}, ""),
            ({"profiles": [other | {"supernet": PROFILE.supernet}]}, "expected the subnets of"),
            ({"output": {"dtype": "uint8", "shape": [9]}}, "expected the model"),
        ):
            second = Peer(net, router.ready["worker"])
            second.send(Control(Kind.HELLO, worker_hello(name="second", **changes)))
            assert reason in second.control(Kind.REFUSED)["reason"]
        names = [worker.name for worker in ask_status(router.ready["client"]).workers]
        assert names == ["first"]


def test_a_second_live_worker_of_one_name_is_refused_and_costs_the_first_nothing(net: Net) -> None:
    """The refusal says what to do; the same process on a new connection takes its own place."""
    with role() as router:
        first = Peer(net, router.ready["worker"])
        first.join(name="twin", life="a", host="here")
        second = Peer(net, router.ready["worker"])
        second.send(Control(Kind.HELLO, worker_hello(name="twin", life="b")))
        refused = second.control(Kind.REFUSED)
        assert refused["code"] == "refused"
        assert (
            "worker twin: a live worker on here has this name: give each its own with --name"
            in refused["reason"]
        )
        again = Peer(net, router.ready["worker"])
        again.join(name="twin", life="a")

        assert len(ask_status(router.ready["client"]).workers) == 1
        assert router.tail(50).count("worker twin joined") == 2


def test_a_name_is_free_once_its_worker_is_silent(net: Net) -> None:
    """An older life that hangs is thrown out as soon as it is suspect, before it is dead."""
    with role() as router:
        Peer(net, router.ready["worker"]).join(name="twin", life="a")
        second = Peer(net, router.ready["worker"])

        def joins() -> bool:
            second.send(Control(Kind.HELLO, worker_hello(name="twin", life="b")))
            while isinstance(message := second.next(), Control):
                if message.kind in (Kind.WELCOME, Kind.REFUSED):
                    return message.kind is Kind.WELCOME
            return False

        poll(joins)
        assert [worker.name for worker in ask_status(router.ready["client"]).workers] == ["twin"]


def test_a_second_process_of_one_name_ends_and_says_why() -> None:
    """The first one serves on, and is never thrown out."""
    with role() as router, processes.ProcessGroup() as group:
        emulated_worker(group, router, "twin")
        with (
            pytest.raises(ProcessError, match=r"a live worker .*has this name"),
            processes.start("second", emulated_argv(router, "twin")) as second,
        ):
            processes.wait_ready(second, 2 * WAIT_S)
        assert router.tail(50).count("worker twin joined") == 1


# --- noise ----------------------------------------------------------------------------------


def mangled(rng: random.Random, messages: list[list[Buffer]]) -> list[bytes]:
    """Return a message with bytes changed, cut off or added, frames lost or repeated; or plain noise."""
    if rng.random() < 0.2:
        return [rng.randbytes(rng.randrange(40)) for _ in range(rng.randrange(1, 4))]
    frames = [bytearray(frame) for frame in rng.choice(messages)]
    for _ in range(rng.randrange(4)):
        frame = rng.choice(frames)
        if frame:
            frame[rng.randrange(len(frame))] = rng.randrange(256)
    frame = rng.choice(frames)
    match rng.randrange(6):
        case 0:
            del frame[rng.randrange(len(frame) + 1) :]
        case 1:
            frame += rng.randbytes(rng.randrange(20))
        case 2:
            frames.append(rng.choice(frames))
        case 3 if len(frames) > 1:
            frames.remove(frame)
    made = [bytes(frame) for frame in frames]
    return made if not is_order(made[0]) else [b"noise"]


def is_order(frame: bytes) -> bool:
    """Return whether it is a DRAIN: an operator's, which would end the test's router as it should."""
    return frame[3:4] == bytes([Kind.DRAIN])


def sound_messages() -> list[list[Buffer]]:
    """Return messages of both sides with extreme numbers in them."""
    huge = 2**63 - 1
    row = DoneRow(1, 0, 1, 0, 1, huge, huge, huge, huge, huge, 4, b"out!")
    made: list[Message] = [
        queries(1, 2, 3),
        queries(4, sent_ns=-huge),
        queries(5, sent_ns=huge),
        queries(6, slack_ns=-wire.MAX_SLACK_NS, sent_ns=-huge),
        wire.Cancel(0, 2, array("Q", [1, 2]).tobytes()),
        Pong(-huge, huge),
        Pong(huge, -huge),
        wire.Ping(huge),
        Pull(1, [PullRow(0, 65_535, 9, 9, huge, huge, huge), PullRow(0, 1, 0, 0, 0, 0, -huge)]),
        Pull(1, [PullRow(9, 1, 0, 0, 0, 0, 0)]),
        Done(1, [row]),
        Control(Kind.HELLO, {"session": 9}),
        Control(Kind.HELLO, worker_hello(name="noisy")),
        Control(Kind.BYE),
        Control(Kind.STATUS),
        Control(Kind.WELCOME, {"epoch": 1}),
        Control(Kind.REFUSED, {"reason": "no"}),
        Results(1, []),
    ]
    return [wire.encode(message) for message in made]


def test_thousands_of_mangled_messages_on_both_ports_cost_nobody_an_answer(net: Net) -> None:
    """The router lives, counts them, and a good query is still served. The seed is in this file."""
    rng = random.Random(SEED)
    sound = sound_messages()
    with role() as router, processes.ProcessGroup() as group:
        emulated_worker(group, router)
        client = Peer(net, router.ready["client"])
        client.hello(1)
        noisy = [Peer(net, router.ready[port]) for port in ("client", "worker") for _ in range(2)]
        for i in range(6_000):
            peer = noisy[i % len(noisy)]
            # Sound ones too, on either port: only so do mangled ones get past say-hello.
            peer.send_frames(mangled(rng, sound) if i % 7 else rng.choice(sound))
            while sockets.receive(peer.socket) is not None:
                pass
            if i % 1_000 == 999:
                group.check()
                assert router.poll() is None, f"seed {SEED}, message {i}: {router.tail()}"
                assert served(client, 10**6 + i)

        def are_counted() -> bool:
            # Not at once: who asks has its turn before the rest of a flood.
            counts = ask_status(router.ready["client"]).counts
            return counts["malformed"] + counts["wrong_version"] > 500 and counts["wrong_version"] > 0

        poll(are_counted)


def test_a_client_that_answers_its_first_ping_late_is_not_far_away() -> None:
    """Reading files when just connected costs no slack; a way that is long in three answers does."""
    server = RouterServer(ServerSettings())
    server._context.term()
    connection = server.clients.connections[b"c"] = PeerConnection(0)

    def pong_after(rtt_ns: int) -> int:
        connection.pinged_ns += SECOND
        stamp_ns = connection.pinged_ns
        server.clients.pong(b"c", Pong(stamp_ns - 1, 0), stamp_ns + 1)  # of an older PING
        server.clients.pong(b"c", Pong(stamp_ns, 0), stamp_ns + rtt_ns)
        return connection.one_way_ns

    assert pong_after(2 * SECOND) == 0
    assert pong_after(100 * MS) == 0
    assert pong_after(100 * MS) == 50 * MS
    assert pong_after(MS // 2) == MS // 4


def test_stamps_far_apart_are_no_reason_to_die(net: Net) -> None:
    """A client's stamps are its own business: they cost it its own slack at most."""
    with role() as router:
        client = Peer(net, router.ready["client"])
        client.hello()
        for i, sent_ns in enumerate((2**63 - 1, -(2**63), 0)):
            client.send(queries(i, sent_ns=sent_ns, slack_ns=SECOND // 5))
        client.send(Pong(-(2**63), 0))
        client.send(queries(9, sent_ns=-(2**63), slack_ns=0))
        ends: dict[int, Status] = {}
        while 9 not in ends:
            ends |= client.results()
        assert router.poll() is None


def test_a_session_that_went_on_elsewhere_leaves_its_old_connection_void(
    shared: RoleProcess, net: Net
) -> None:
    """Messages of the old connection may come after the new one's HELLO: refused with say-hello."""
    old, new = (Peer(net, shared.ready["client"]) for _ in range(2))
    old.hello(session=5)
    new.hello(session=5)
    old.send(queries(1))

    assert old.control(Kind.REFUSED)["code"] == "say-hello"
    assert shared.poll() is None


def test_a_worker_that_breaks_the_protocol_loses_its_place_only(net: Net) -> None:
    """A DONE for a GPU that it does not have: refused with the reason, dropped, and free to join again."""
    with role() as router:
        worker = Peer(net, router.ready["worker"])
        epoch = worker.join()["epoch"]
        worker.send(Pull(epoch, [PullRow(3, 1, 0, 0, 0, 0, 0)]))

        assert "has 1 GPUs, got slot 3" in worker.control(Kind.REFUSED)["reason"]
        assert ask_status(router.ready["client"]).workers == ()
        assert worker.join()["epoch"] > epoch


# --- leaving --------------------------------------------------------------------------------


def test_a_drained_worker_finishes_and_leaves(net: Net) -> None:
    """DRAIN by name: the process exits 0 and stays away; the other one serves on."""
    with role() as router, processes.ProcessGroup() as group:
        leaving, staying = (emulated_worker(group, router, name) for name in ("leaving", "staying"))
        client = Peer(net, router.ready["client"])
        client.hello()
        client.send(queries(1, 2, 3, 4))
        client.send(Control(Kind.DRAIN, {"worker": "leaving"}))
        ends: dict[int, Status] = {}
        while len(ends) < 4:
            ends |= client.results()
        poll(lambda: leaving.poll() is not None)

        assert set(ends.values()) == {Status.OK}
        assert leaving.poll() == 0
        assert staying.poll() is None
        assert served(client, 5)
        names = [worker.name for worker in ask_status(router.ready["client"]).workers]
        assert names == ["staying"]


def test_draining_a_worker_nobody_knows_names_those_that_are_known(net: Net) -> None:
    """A typo changes nothing and is answered with the right names."""
    with role() as router:
        Peer(net, router.ready["worker"]).join(name="alpha")
        client = Peer(net, router.ready["client"])
        client.send(Control(Kind.DRAIN, {"worker": "alhpa"}))

        assert client.control(Kind.REFUSED)["reason"] == "worker 'alhpa': known are: alpha"


def test_sigterm_finishes_what_is_queued_and_exits_0(net: Net) -> None:
    """Accepted queries are answered, later ones get DRAINING, and every peer gets BYE."""
    with role() as router:
        worker = Peer(net, router.ready["worker"])
        epoch = worker.join()["epoch"]
        client = Peer(net, router.ready["client"])
        client.hello()
        client.send(queries(1))
        worker.send(Pull(epoch, [PullRow(0, 1, 0, 0, 0, 0, 0)]))
        directive = worker.next()
        while not isinstance(directive, wire.Directive):
            directive = worker.next()
        os.kill(router.pid, signal.SIGTERM)
        poll(lambda: ask_status(router.ready["client"]).router.draining)
        client.send(queries(2))
        assert client.results() == {2: Status.DRAINING}
        row = DoneRow(directive.batch_id, 0, 1, 0, 1, 0, 1_000, directive.batch_id, 0, 0, 4, b"out!")
        worker.send(Done(epoch, [row]))

        assert client.results() == {1: Status.OK}
        assert client.control(Kind.BYE)["reason"] == "the router stops"
        assert worker.control(Kind.BYE)
        poll(lambda: router.poll() is not None)
        assert router.poll() == 0


def test_an_endpoint_that_is_taken_is_one_clear_line(shared: RoleProcess) -> None:
    """Exit code 1, the endpoint, the reason; no traceback."""
    endpoint = shared.ready["client"]
    with processes.start("second", ["-m", "router", "--client-endpoint", endpoint]) as second:
        poll(lambda: second.poll() is not None)
        assert second.poll() == 1
        assert second.tail().startswith(f"Error: bind {endpoint}: Address already in use")
        assert len(second.tail().splitlines()) == 1
        second.log_path.unlink()


def test_the_same_query_sent_again_is_answered_once(net: Net) -> None:
    """RESUBMITTED says that the router may know it already, and then it counts once."""
    with role() as router:
        client = Peer(net, router.ready["client"])
        client.hello()
        first, again = queries(1, slack_ns=SECOND // 5), queries(1, 2, slack_ns=SECOND // 5)
        again.resubmitted = True
        client.send(first)
        client.send(again)
        ends: list[int] = []
        while len(ends) < 2:
            ends.extend(client.results())
        assert sorted(ends) == [1, 2]
        assert ids_of(again) == [1, 2]
        assert ask_status(router.ready["client"]).queries.received == 2


def test_preludes_are_what_the_wire_module_writes() -> None:
    """The bytes written out above are the format's."""
    frame = wire.encode(Control(Kind.STATUS))[0]
    assert bytes(frame) == struct.pack("<2sBBI", b"SS", wire.HIGHEST, Kind.STATUS, 0)
