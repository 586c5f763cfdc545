"""Several generators: dealt out, started at one instant, merged exactly; a lost one is a marked gap."""

from __future__ import annotations

import contextlib
import signal
import struct
import subprocess
import sys
import threading
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import orjson
import pytest
import zmq
from click.testing import CliRunner

from loadgen.cli import cli
from loadgen.live.agent import Agent
from loadgen.live.hosts import Head
from loadgen.live.run import RunSettings
from loadgen.live.sink import sink_server
from loadgen.results.result import OUTCOMES
from loadgen.traces.trace import load_trace
from superserve import wire
from superserve.errors import ConfigError
from superserve.net.sockets import bind_router, connect_dealer, send
from superserve.wire import Control, Kind, Ping, Pong, RunFailed, RunShare
from tests.superserve.client.fakes import next_message, poll

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from superserve.wire import Buffer

MS = 1_000_000
SLO_NS = 500 * MS


@contextlib.contextmanager
def agents(n: int) -> Iterator[list[tuple[subprocess.Popen[str], str]]]:
    """Run agents on loopback; yields each one's process and HOST:PORT."""
    with contextlib.ExitStack() as stack:
        found = []
        for _ in range(n):
            process = subprocess.Popen(
                [sys.executable, "-m", "loadgen", "agent"], stdout=subprocess.PIPE, text=True
            )
            stack.callback(process.wait, 20)
            stack.callback(process.kill)
            found.append(process)
        named = []
        for process in found:
            assert process.stdout is not None
            stack.callback(process.stdout.close)
            named.append((process, process.stdout.readline().removeprefix("listening at ").strip()))
        yield named


@pytest.mark.e2e
@pytest.mark.timeout(90)
def test_two_generators_give_the_result_of_one() -> None:
    """Every query of the trace is sent and answered once, in the trace's order, by two at one instant."""
    trace = load_trace("poisson:rate=300", duration_s=1.0, seed=5)
    with agents(2) as both, sink_server() as endpoint:
        names = [name for _, name in both]
        run = Head(names, threading.Event()).run(trace, RunSettings(SLO_NS), endpoint)
        again = Head(names, threading.Event()).run(trace, RunSettings(SLO_NS), endpoint)

    for result in (run.result, again.result):
        assert result.queries["total"] == trace.n
        assert sum(result.queries[outcome] for outcome in OUTCOMES) == trace.n
        assert (result.queries["unsent"], result.queries["unanswered"]) == (0, 0)
        assert result.gaps is None
        assert [one["queries"] for one in result.generators or ()] == [-(-trace.n // 2), trace.n // 2]
    assert (run.columns["sent_ns"] >= run.columns["due_ns"]).all(), "nobody starts before the instant"
    assert np.array_equal(run.columns["due_ns"], trace.due_ns)


@pytest.mark.e2e
@pytest.mark.timeout(90)
def test_a_generator_that_is_killed_leaves_a_marked_gap() -> None:
    """What the others saw counts; the lost one's queries are unsent, named, and spoil the run."""
    trace = load_trace("poisson:rate=100", duration_s=4.0, seed=6)
    with agents(2) as both, sink_server() as endpoint:
        (victim, lost), (_, kept) = both

        def kill(progress: dict[str, int]) -> None:
            if progress["sent"] > trace.n // 8:
                victim.send_signal(signal.SIGKILL)

        run = Head([lost, kept], threading.Event()).run(trace, RunSettings(SLO_NS), endpoint, kill)

    result = run.result
    n_lost = -(-trace.n // 2)
    assert result.gaps is not None
    assert [(gap["generator"], gap["queries"]) for gap in result.gaps] == [(lost, n_lost)]
    assert result.queries["unsent"] == n_lost
    assert result.queries["ok"] + result.queries["late"] == trace.n - n_lost
    assert not result.valid
    assert f"generator {lost} was lost: {n_lost} queries are a gap" in result.invalid_because


@pytest.mark.e2e
@pytest.mark.timeout(90)
def test_a_run_across_hosts_that_is_stopped_is_reported_up_to_there() -> None:
    """All stop; the result is partial, and every query before the end is accounted for."""
    trace = load_trace("poisson:rate=100", duration_s=60.0, seed=7)
    stop = threading.Event()
    with agents(2) as both, sink_server() as endpoint:
        run = Head([name for _, name in both], stop).run(
            trace, RunSettings(SLO_NS), endpoint, lambda total: stop.set() if total["sent"] > 50 else None
        )

    assert run.result.partial
    assert run.result.duration_s < 30.0
    assert 0 < run.result.queries["total"] < trace.n


@pytest.mark.e2e
def test_a_generator_that_cannot_begin_is_named_with_the_reason() -> None:
    """The agent checks its orders, reports what is wrong, and goes on."""
    trace = load_trace("poisson:rate=100", duration_s=1.0, seed=8)
    with agents(1) as only, sink_server() as endpoint:
        name = only[0][1]
        nowhere = RunSettings(SLO_NS, n_senders=0)
        with pytest.raises(ConfigError, match=f"generator {name}: prepare: n_senders: expected 1 at least"):
            Head([name], threading.Event()).run(trace, nowhere, endpoint)


def test_nobody_there_is_an_error_that_names_the_generator() -> None:
    """It says what to start, where."""
    trace = load_trace("poisson:rate=100", duration_s=1.0)
    with sink_server() as endpoint, pytest.raises(ConfigError, match="no `loadgen agent` answers there"):
        Head(["127.0.0.1:9"], threading.Event()).run(trace, RunSettings(SLO_NS), endpoint)


@pytest.mark.parametrize("names", [[], ["a:1", "a:1"]])
def test_each_generator_is_named_once(names: list[str]) -> None:
    """None, or one twice, is refused."""
    with pytest.raises(ConfigError, match="expected each HOST:PORT once"):
        Head(names, threading.Event())


@pytest.mark.parametrize(
    ("listen", "message"),
    [
        ("127.0.0.1", "expected ADDRESS:PORT"),
        ("host:70", "expected an address of this host"),
        ("0.0.0.0:7000", "add --insecure"),
        ("127.0.0.1:70000", "expected ADDRESS:PORT"),
    ],
)
def test_an_agent_listens_on_loopback_unless_told_otherwise(listen: str, message: str) -> None:
    """A wrong or an open address is one clear line."""
    result = CliRunner().invoke(cli, ["agent", "--listen", listen])

    assert result.exit_code == 1
    assert message in result.output


@contextlib.contextmanager
def asking(endpoint: str) -> Iterator[Callable[[Sequence[Buffer]], list[Buffer]]]:
    """Yield what sends frames to an agent and returns its answer."""
    with zmq.Context() as context:
        socket = connect_dealer(context, endpoint)

        def ask(frames: Sequence[Buffer]) -> list[Buffer]:
            poll(lambda: send(socket, frames))
            return next_message(socket)

        try:
            yield ask
        finally:
            socket.close(0)


@pytest.fixture
def agent() -> Iterator[Agent]:
    """Yield an agent that serves in a thread."""
    with Agent("tcp://127.0.0.1:*") as agent:
        thread = threading.Thread(target=agent.run)
        thread.start()
        yield agent
        agent.stop()
        thread.join(20)
        assert not thread.is_alive()


def test_an_agent_answers_its_own_messages_alone(agent: Agent) -> None:
    """A PING comes back; what is no message between load generators is dropped, and the agent lives."""
    wrong: list[list[Buffer]] = [[b"x"], [b""], wire.encode_control(Control(Kind.STATUS)), [b"SS\x02\x0f"]]
    with asking(agent.endpoint) as ask:
        assert wire.decode_run(ask(wire.encode_ping(Ping(1)))).kind is Kind.PONG
        for frames in wrong:
            with zmq.Context() as context:
                stranger = connect_dealer(context, agent.endpoint)
                poll(partial(send, stranger, frames))
                stranger.close(100)
        assert wire.decode_run(ask(wire.encode_ping(Ping(2)))).kind is Kind.PONG


def test_an_agent_refuses_another_wire_version_by_name(agent: Agent) -> None:
    """An older coordinator asked in STATUS, version 1: it is answered in that version."""
    with asking(agent.endpoint) as ask:
        first, body = ask([struct.pack("<2sBBI", b"SS", 1, Kind.STATUS, 0), b'{"do":"ping","stamp":1}'])

    assert bytes(first) == struct.pack("<2sBBI", b"SS", 1, Kind.REFUSED, 0)
    assert orjson.loads(body)["reason"].startswith("wire version: expected 2, got 1: ")


@pytest.mark.parametrize(
    ("frames", "says"),
    [
        ([struct.pack("<2sBBI", b"SS", 1, Kind.STATUS, 0), b'{"says":"pong"}'], "expected 2, got 1"),
        (wire.encode_control(Control(Kind.REFUSED, {"code": "version", "wire": [3, 4]})), "got 3 to 4"),
        ([b"noise"], "prelude"),
    ],
    ids=["older", "newer", "noise"],
)
def test_an_agent_of_another_wire_version_is_named_with_both_versions(
    frames: list[Buffer], says: str
) -> None:
    """The run does not begin, and the error says which generator it is."""
    with zmq.Context() as context:
        socket, endpoint = bind_router(context, "tcp://127.0.0.1:*")
        name = endpoint.removeprefix("tcp://")

        def answer() -> None:
            assert socket.poll(20_000)
            key, *_ = socket.recv_multipart()
            socket.send_multipart([key, *map(bytes, frames)])

        thread = threading.Thread(target=answer)
        thread.start()
        trace = load_trace("poisson:rate=100", duration_s=1.0)
        try:
            with sink_server() as router, pytest.raises(ConfigError, match=f"generator {name}: .*{says}"):
                Head([name], threading.Event()).run(trace, RunSettings(SLO_NS), router)
        finally:
            thread.join(20)
            socket.close(0)


def test_agents_are_pinged_while_they_prepare(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy host that takes longer than an agent waits for a coordinator that it does not hear."""
    monkeypatch.setattr("loadgen.live.hosts._PING_EVERY_S", 0.01)
    monkeypatch.setattr("loadgen.live.hosts._PREPARE_S", 20.0)
    with zmq.Context() as context:
        socket, endpoint = bind_router(context, "tcp://127.0.0.1:*")

        def answer() -> None:
            """Be ready for nothing until two PINGs have come after the share."""
            n_after: int | None = None
            while n_after is None or n_after < 2:
                assert socket.poll(30_000)
                key, *frames = socket.recv_multipart()
                message = wire.decode_run(frames)
                if isinstance(message, Ping):
                    n_after = None if n_after is None else n_after + 1
                    send(socket, [key, *wire.encode_pong(Pong(message.stamp_ns, 0))])
                elif isinstance(message, RunShare):
                    n_after = 0
            send(socket, [key, *wire.encode_run(RunFailed("heard it"))])

        thread = threading.Thread(target=answer)
        thread.start()
        trace = load_trace("poisson:rate=100", duration_s=1.0)
        name = endpoint.removeprefix("tcp://")
        try:
            with sink_server() as router, pytest.raises(ConfigError, match=f"generator {name}: heard it"):
                Head([name], threading.Event()).run(trace, RunSettings(SLO_NS), router)
        finally:
            thread.join(40)
            socket.close(0)


def test_keys_are_refused_rather_than_left_out() -> None:
    """Agents are sent none: a run that has one to show says so, and starts nothing."""
    options = ["--trace", "poisson:rate=10", "--duration", "1", "--connect", "127.0.0.1:9"]

    result = CliRunner().invoke(cli, ["run", *options, "--generators", "a:1", "--keys", "web.key"])

    assert result.exit_code == 1
    assert "--generators: agents are sent no keys" in result.output
