"""A real router process with keys: who is not listed gets nothing, and who no longer is, is cut off."""

from __future__ import annotations

import random
import socket as os_socket
import time
from typing import TYPE_CHECKING, Any

import pytest
import zmq

from loadgen.study.explain.flight import FlightReader
from router.serve.loop import RouterServer, ServerSettings
from superserve import Client, wire
from superserve.errors import ConfigError, UnansweredError
from superserve.hello import WorkerHello
from superserve.net import keys, sockets
from superserve.net.connection import ask_status
from superserve.net.handshake import Handshake
from superserve.roles import processes
from superserve.wire import Control, Kind, Status
from tests.router.serve.test_server import Net, Peer, queries, worker_hello
from tests.superserve.client.fakes import WAIT_S, poll

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from superserve.roles.processes import RoleProcess
    from superserve.status import RouterStatus

pytestmark = pytest.mark.e2e

SEED = 40_961


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a router's folder of keys: two clients, two workers, an operator."""
    folder = tmp_path / "keys"
    keys.make_ring(folder)
    for name in ("web", "batch"):
        keys.add_peer(folder, "client", name)
    for name in ("gpu-1", "gpu-2"):
        keys.add_peer(folder, "worker", name)
    return folder


@pytest.fixture
def router(folder: Path) -> Iterator[RoleProcess]:
    """Yield a router with those keys; it must be alive at the end."""
    with processes.start("router", ["-m", "router", "--keys", str(folder)]) as router:
        processes.wait_ready(router, WAIT_S)
        yield router
        assert router.poll() in (None, 0), router.tail()


def test_a_router_reads_its_secret_where_it_is_mounted(folder: Path, tmp_path: Path) -> None:
    """With its lists in one place and its secret in another it serves the same peers."""
    (folder / "router.key").rename(tmp_path / "mounted")
    argv = ["-m", "router", "--keys", str(folder), "--router-key", str(tmp_path / "mounted")]
    with processes.start("router", argv) as router:
        endpoint = processes.wait_ready(router, WAIT_S)["client"]
        assert ask_status(endpoint, WAIT_S, keys=folder / "clients" / "web.key") is not None


@pytest.fixture
def net() -> Iterator[Net]:
    """Yield what peers are made of."""
    net = Net()
    yield net
    net.close()


def test_only_an_operators_key_reads_the_flight_record(router: RoleProcess, folder: Path) -> None:
    """It has every client's queries. STATUS, which has none of them, is for every client."""
    endpoint = router.ready["client"]
    reader = FlightReader(endpoint, folder / "operator.key")
    try:
        assert reader.ask({"since": -1})[1] is not None
    finally:
        reader.close()
    reader = FlightReader(endpoint, folder / "clients" / "web.key")
    try:
        for asked in ({"since": -1}, {"river": True}):
            with pytest.raises(ConfigError, match=f"{endpoint}: flight record: expected an operator's key"):
                reader.ask(asked)
    finally:
        reader.close()
    assert ask_status(endpoint, WAIT_S, keys=folder / "clients" / "web.key") is not None


class KeyedPeer(Peer):
    """A DEALER that shows a key."""

    def __init__(self, net: Net, endpoint: str, path: Path) -> None:
        self.socket = sockets.connect_dealer(net.context, endpoint, keys.peer_keys(path))
        net.sockets.append(self.socket)


def status(router: RoleProcess, folder: Path) -> RouterStatus:
    """Return STATUS, as an operator asks for it."""
    return ask_status(router.ready["client"], timeout_s=WAIT_S, keys=folder / "operator.key")


def listed_clients(router: RoleProcess, folder: Path) -> tuple[str, ...]:
    """Return the names of the clients that the router admits."""
    keys = status(router, folder).keys
    assert keys is not None
    return keys.clients


def counts(router: RoleProcess, folder: Path) -> dict[str, int]:
    """Return what the router has counted."""
    return status(router, folder).counts


def strange_router_key(folder: Path, tmp_path: Path) -> Path:
    """Return a listed client's key file with another key for the router than its own."""
    public, _ = keys._pair()
    path = tmp_path / "strange.key"
    text = (folder / "clients" / "web.key").read_text()
    path.write_text(text.replace(keys.router_keys(folder).public, public))
    path.chmod(0o600)
    return path


# --- nobody gets in unlisted --------------------------------------------------------------


@pytest.mark.parametrize("port", ["client", "worker"])
@pytest.mark.parametrize("shown", ["nothing", "unlisted", "other role's", "strange router's"])
def test_who_is_not_listed_gets_nothing(
    router: RoleProcess, folder: Path, net: Net, tmp_path: Path, port: str, shown: str
) -> None:
    """No connection is made, and none of their messages reaches the decoder: the counters prove it."""
    other = tmp_path / "other"
    keys.make_ring(other)
    (other / "router.key").write_text((folder / "router.key").read_text())
    unlisted, _ = keys.add_peer(other, port, "stranger")
    path = {
        "nothing": None,
        "unlisted": unlisted,
        "other role's": folder / ("workers/gpu-1.key" if port == "client" else "clients/web.key"),
        "strange router's": strange_router_key(folder, tmp_path),
    }[shown]
    before = counts(router, folder)[f"{port}_messages"]
    own = None if path is None else keys.peer_keys(path)
    endpoint = router.ready[port]
    handshake = Handshake(net.context, endpoint, own)
    socket = handshake.socket
    net.sockets.append(socket)
    with handshake:
        poll(lambda: handshake.look(time.monotonic_ns()))
        assert not sockets.send(socket, wire.encode(Control(Kind.HELLO, worker_hello(session=1))))
        assert not socket.poll(0, zmq.POLLIN)
    poll(lambda: counts(router, folder)["handshake_failures"] > 0)
    after = status(router, folder)
    if port == "worker":
        assert after.counts["worker_messages"] == before == 0
    assert after.workers == ()
    assert after.counts.get("malformed", 0) == 0
    assert after.clients == 1  # who asks


def test_a_frame_without_a_key_is_dropped_before_the_decoder(folder: Path) -> None:
    """Should one ever arrive, as over inproc, which has no handshake: it is counted and never decoded."""
    server = RouterServer(ServerSettings(client_endpoint="inproc://clients", keys=folder))
    server.open()
    with server._context.socket(zmq.DEALER) as socket:
        socket.connect("inproc://clients")
        socket.send_multipart([b"not even a message", b"with frames"])
        socket.send(b"another")
        assert server._pass() == 0
        assert server._serving.gate is not None
        assert server._serving.gate.counts()["unauthenticated_frames"] == 2
        assert server.counts["malformed"] == server.counts["client_messages"] == 0
    server.stop()
    server.run()


def test_a_failed_handshake_is_logged_with_its_cause_once(
    router: RoleProcess, folder: Path, net: Net, tmp_path: Path
) -> None:
    """A peer that tries on and on costs a line or two; a refused key is named with where it came from."""
    peer = KeyedPeer(net, router.ready["client"], strange_router_key(folder, tmp_path))
    poll(lambda: counts(router, folder)["handshake_failures"] >= 5)
    assert not sockets.send(peer.socket, [b"x"])
    assert 1 <= router.tail().count("handshake failed") <= 2  # by its address, and where that was gone
    KeyedPeer(net, router.ready["worker"], folder / "clients" / "web.key")
    own = keys.peer_keys(folder / "clients" / "web.key")
    assert own is not None
    poll(lambda: f"worker at 127.0.0.1 refused: the key {own.public} is not listed" in router.tail())


# --- what the peer is told ----------------------------------------------------------------


def test_a_wrong_router_key_does_not_look_like_a_router_that_is_down(
    router: RoleProcess, folder: Path, tmp_path: Path
) -> None:
    """The error names the file and the key in it; a client without keys learns that it needs some."""
    endpoint, strange = router.ready["client"], strange_router_key(folder, tmp_path)
    with pytest.raises(ConfigError, match=r"probably not the one in .*strange.key"):
        ask_status(endpoint, timeout_s=0.5, keys=strange)
    client = Client(endpoint, connect_timeout_s=0.5, keys=strange)
    with pytest.raises(UnansweredError, match=r"probably not the one in .*strange.key"):
        client.connect()
    with pytest.raises(ConfigError, match="it asks for keys"):
        ask_status(endpoint, timeout_s=0.5, keys="")
    with pytest.raises(ConfigError, match=r"does not admit the key of .*gpu-1.key"):
        ask_status(endpoint, timeout_s=0.5, keys=folder / "workers" / "gpu-1.key")


def test_a_client_with_keys_is_told_of_a_router_without(folder: Path) -> None:
    """It does not look like a router that is down."""
    with processes.start("router", ["-m", "router"]) as router:
        processes.wait_ready(router, WAIT_S)
        with pytest.raises(ConfigError, match="does not speak with keys"):
            ask_status(router.ready["client"], timeout_s=0.5, keys=folder / "operator.key")


def test_a_key_that_is_listed_later_gets_in(router: RoleProcess, folder: Path) -> None:
    """A client that was refused tries again by itself: ZeroMQ would not."""
    listed = folder / "clients" / "web.pub"
    aside = folder / "web.aside"
    listed.rename(aside)
    poll(lambda: "web" not in listed_clients(router, folder))
    client = Client(router.ready["client"], connect_timeout_s=WAIT_S, keys=folder / "clients" / "web.key")
    future = client.submit(b"x", slo_ms=60_000)
    poll(lambda: counts(router, folder)["handshake_failures"] > 0)
    aside.rename(listed)
    client.connect()
    assert not future.done()
    client.close()


# --- revoked while connected --------------------------------------------------------------


def refusal(peer: Peer) -> dict[str, Any]:
    """Return the next REFUSED that a peer receives."""
    return peer.control(Kind.REFUSED)


def test_a_revoked_client_is_cut_off_mid_load_and_the_others_are_not(
    router: RoleProcess, folder: Path, net: Net
) -> None:
    """It gets REFUSED, and its further messages are never decoded; each query of the other is answered."""
    worker = ["-m", "gpu_worker", "--connect", router.ready["worker"], "--emulate", "cnn-8gpu-modelled"]
    with processes.start("worker", [*worker, "--keys", str(folder / "workers" / "gpu-1.key")]) as process:
        processes.wait_ready(process, WAIT_S)
        web = KeyedPeer(net, router.ready["client"], folder / "clients" / "web.key")
        web.hello()
        batch = KeyedPeer(net, router.ready["client"], folder / "clients" / "batch.key")
        batch.hello(8)
        keys.revoke(folder, "web")
        n_sent = 0

        def is_told() -> bool:
            nonlocal n_sent
            n_sent += 1
            web.send(queries(n_sent))
            batch.send(queries(n_sent))
            return bool(web.socket.poll(1, zmq.POLLIN)) and refused_as(web) == "revoked"

        poll(is_told)
        before = counts(router, folder)["revoked_frames"]
        for _ in range(50):
            web.send_frames([b"whatever it says"])
        poll(lambda: counts(router, folder)["revoked_frames"] >= before + 50)
        assert counts(router, folder).get("malformed", 0) == 0  # or the decoder would have seen them
        ends: dict[int, Status] = {}
        while len(ends) < n_sent:
            ends |= batch.results()
        assert set(ends.values()) == {Status.OK}
        assert listed_clients(router, folder) == ("batch",)


def refused_as(peer: Peer) -> str | None:
    """Return the code of the REFUSED that has come, if one has."""
    message = peer.next()
    return str(message.body["code"]) if isinstance(message, Control) and "code" in message.body else None


def test_a_revoked_worker_is_lost_and_its_batches_go_to_others(
    router: RoleProcess, folder: Path, net: Net
) -> None:
    """The router takes nothing more of it, and the worker that is still listed stays."""
    first, second = (
        KeyedPeer(net, router.ready["worker"], folder / "workers" / f"gpu-{i}.key") for i in (1, 2)
    )
    first.join(name="first")
    second.join(name="second")
    assert len(status(router, folder).workers) == 2
    keys.revoke(folder, "gpu-1")
    assert refusal(first)["code"] == "revoked"
    first.send(Control(Kind.HELLO, worker_hello(name="first")))
    poll(lambda: counts(router, folder)["revoked_frames"] >= 1)
    second.send(Control(Kind.STATUS))
    found = second.control(Kind.STATUS)
    assert [worker["name"] for worker in found["workers"]] == ["second"]
    assert found["counts"]["workers_lost"] == 1


def test_a_routing_id_that_another_key_takes_over_starts_anew(folder: Path) -> None:
    """What was of the one that had it before is forgotten: the new one has to say HELLO."""
    server = RouterServer(ServerSettings(keys=folder))
    server.open()
    gate = server._serving.gate
    assert gate is not None
    door = gate.clients
    hello = wire.encode_control(Control(Kind.HELLO, {"role": "client", "session": 1}))
    gate.workers.user = "worker"
    server.workers.admit(b"w", WorkerHello.from_body(worker_hello(), "w"), wire.HIGHEST, 1)
    door.user = "one"
    server.clients._take_known(b"id", list(hello), 1)
    server.clients._take_known(b"id", list(wire.encode_queries(queries(1))), 2)
    assert server.core.held_bytes == 4
    door.user = "another"
    server.clients._take_known(b"id", list(wire.encode_queries(queries(2))), 3)
    assert server.clients.connections == {}
    assert server.core.received == 1
    assert server.core.held_bytes == 0
    server.stop()
    server.run()


# --- who may do what ----------------------------------------------------------------------


def test_only_an_operator_drains(router: RoleProcess, folder: Path, net: Net) -> None:
    """A client's DRAIN is refused; with an operator's key the same message drains the router."""
    web = KeyedPeer(net, router.ready["client"], folder / "clients" / "web.key")
    web.hello()
    web.send(Control(Kind.DRAIN, {}))
    assert refusal(web)["code"] == "not-an-operator"
    assert not status(router, folder).router.draining
    operator = KeyedPeer(net, router.ready["client"], folder / "operator.key")
    operator.send(Control(Kind.DRAIN, {}))
    poll(lambda: status(router, folder).router.draining)


def test_a_worker_process_with_a_listed_key_serves(router: RoleProcess, folder: Path) -> None:
    """Keys go all the way: a client's query is answered; a revoked worker ends, and says why."""
    args = ["--connect", router.ready["worker"], "--emulate", "cnn-8gpu-modelled"]
    with processes.start(
        "worker", ["-m", "gpu_worker", *args, "--keys", str(folder / "workers" / "gpu-1.key")]
    ) as worker:
        processes.wait_ready(worker, WAIT_S)
        with Client(router.ready["client"], keys=folder / "clients" / "web.key") as client:
            assert client.infer(b"1234", slo_ms=10_000).batch_size == 1
        keys.revoke(folder, "gpu-1")
        poll(lambda: worker.poll() is not None)
        assert "revoked: the router does not list this key any more" in worker.tail()


# --- noise, and where it may listen -------------------------------------------------------


def test_random_bytes_at_a_port_with_keys_leave_it_serving(
    router: RoleProcess, folder: Path, net: Net
) -> None:
    """Half of them behind a true ZMTP greeting, on both ports: none of it reaches the decoder."""
    rng = random.Random(SEED)
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x01CURVE" + bytes(15 + 1 + 31)
    for i in range(200):
        port = int(router.ready["client" if i % 4 < 2 else "worker"].rpartition(":")[2])
        with os_socket.create_connection(("127.0.0.1", port)) as raw:
            raw.sendall((greeting if i % 2 else b"") + rng.randbytes(rng.randrange(1, 400)))
    web = KeyedPeer(net, router.ready["client"], folder / "clients" / "web.key")
    web.hello()
    after = status(router, folder)
    assert after.counts["worker_messages"] == 0
    assert after.counts.get("malformed", 0) == 0
    assert after.counts["unauthenticated_frames"] == after.counts["revoked_frames"] == 0


@pytest.mark.parametrize(
    "endpoint", ["tcp://0.0.0.0:*", "tcp://*:*", "tcp://[::]:*", "tcp://eth0:5555", "tcp://10.1.2.3:5555"]
)
def test_without_keys_nothing_binds_beyond_loopback(endpoint: str) -> None:
    """The error names the option, and both ways out."""
    for settings in (ServerSettings(client_endpoint=endpoint), ServerSettings(worker_endpoint=endpoint)):
        with pytest.raises(ConfigError, match=r"-endpoint tcp.*--keys FOLDER.*--security none"):
            RouterServer(settings).open()


@pytest.mark.parametrize(
    "endpoint", ["tcp://127.0.0.1:*", "tcp://localhost:*", "ipc://@superserve-test-gate", "inproc://gate"]
)
def test_this_machine_needs_no_keys(endpoint: str) -> None:
    """What other machines cannot reach binds as it always did."""
    server = RouterServer(ServerSettings(client_endpoint=endpoint))
    server.open()
    server.stop()
    server.run()


@pytest.mark.parametrize("has_keys", [True, False])
def test_beyond_loopback_with_keys_or_when_asked(folder: Path, *, has_keys: bool) -> None:
    """Either way out leads out."""
    settings = ServerSettings(
        client_endpoint="tcp://0.0.0.0:*", keys=folder if has_keys else None, is_open=not has_keys
    )
    server = RouterServer(settings)
    server.open()
    server.stop()
    server.run()


def test_a_folder_that_lists_nonsense_is_refused_at_the_start_and_left_out_later(
    router: RoleProcess, folder: Path
) -> None:
    """At the start it is an error for the operator; later the other peers must go on."""
    (folder / "clients" / "new.pub").write_text("nonsense")
    poll(lambda: "left out" in router.tail())
    assert listed_clients(router, folder) == ("batch", "web")
    with pytest.raises(ConfigError, match=r"new.pub:1: expected"):
        RouterServer(ServerSettings(keys=folder)).open()
