"""A real worker process keeps the protocol with a router that this test plays."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pytest
import zmq
from click.testing import CliRunner

from gpu_worker.cli import cli
from gpu_worker.core.link import TRANSITIONS, LinkEvent, LinkState
from gpu_worker.core.queue import CAPACITY
from gpu_worker.serve.eventlog import check_logs
from profiles.table import Profile, load_profile
from superserve.clock import SECOND
from superserve.net import sockets
from superserve.roles import processes
from superserve.wire import (
    Buffer,
    Control,
    Directive,
    Done,
    Kind,
    Message,
    Ping,
    Pong,
    Pull,
    Segment,
    Status,
    decode,
    encode,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


WAIT_S = 60.0  # reached only when something is broken
PROFILE = "cnn-8gpu-modelled"
EPOCH = 7
M = TypeVar("M", bound=Message)


class FakeRouter:
    """A ROUTER that says what the test says, and answers PINGs in between."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self.socket, self.endpoint = sockets.bind_router(context, "tcp://127.0.0.1:*")
        self.peer: Buffer | None = None
        self.n_pings = 0

    def send(self, message: Message) -> None:
        """Send to the worker last heard."""
        assert self.peer is not None
        assert sockets.send(self.socket, [self.peer, *encode(message)])

    def expect(self, kind: type[M], where: Callable[[M], bool] = lambda _message: True) -> M:
        """Return the next message of `kind` that is as wanted; what comes before it is dropped."""
        until = time.monotonic() + WAIT_S
        while time.monotonic() < until:
            sockets.wait([self.socket], SECOND)
            while (frames := sockets.receive(self.socket)) is not None:
                self.peer = frames[0]
                message = decode(frames[1:])
                if isinstance(message, Ping):
                    self.n_pings += 1
                    self.send(Pong(message.stamp_ns, 0))
                if isinstance(message, kind) and where(message):
                    return message
        raise AssertionError(f"no {kind.__name__} within {WAIT_S} s")

    def control(self, kind: Kind) -> dict[str, Any]:
        """Return the body of the next control message of `kind`."""
        return self.expect(Control, lambda message: message.kind is kind).body

    def welcome(self, epoch: int = EPOCH) -> Pull:
        """Welcome the worker and return the PULL that answers."""
        self.send(Control(Kind.WELCOME, {"epoch": epoch}))
        return self.expect(Pull, lambda pull: pull.epoch == epoch)


@pytest.fixture
def router() -> Iterator[FakeRouter]:
    """Return a router bound to a port that the system picked."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    fake = FakeRouter(context)
    yield fake
    fake.socket.close(0)
    context.term()


def worker(router: FakeRouter, *options: str) -> processes.RoleProcess:
    """Start a worker process; the caller stops it."""
    return processes.start("worker", ["-m", "gpu_worker", "--connect", router.endpoint, *options])


def directive(
    batch_id: int, *, slot: int = 0, subnet: int = 0, payloads: list[bytes], slack_ns: int = 10 * SECOND
) -> Directive:
    """Return a directive of one segment, a frame a query."""
    n = len(payloads)
    ids = np.arange(n, dtype="<u8").tobytes()
    slacks = np.full(n, slack_ns, dtype="<i8").tobytes()
    segment = Segment(n, len(payloads[0]), False, 0, ids, slacks, payloads)
    return Directive(EPOCH, batch_id, slot, subnet, n, [segment])


@pytest.mark.e2e
def test_an_emulated_worker_serves_from_hello_to_bye(router: FakeRouter, tmp_path: Path) -> None:
    """HELLO, WELCOME, PULL, DIRECTIVE, DONE, PING and PONG, and a drain; the log proves it honest."""
    log = tmp_path / "events.log"
    with worker(
        router, "--name", "w", "--emulate", PROFILE, "--gpus", "3", "--event-log", str(log)
    ) as process:
        hello = router.control(Kind.HELLO)
        assert (hello["role"], hello["name"], hello["n_slots"], hello["wire"]) == ("worker", "w", 3, [2, 2])
        assert [Profile.from_dict(data) for data in hello["profiles"]] == [load_profile(PROFILE)]
        assert hello["input"] is None
        assert hello["output"] == {"dtype": "int32", "shape": []}
        pull = router.welcome()
        assert [(row.slot, row.credit, row.running_batch) for row in pull.rows] == [
            (slot, CAPACITY, 0) for slot in range(3)
        ]
        assert processes.wait_ready(process, WAIT_S) == {"name": "w", "n_slots": 3}

        router.send(directive(1, slot=2, subnet=4, payloads=[b"x", b"y", b"z"]))
        router.send(directive(2, slot=2, subnet=1, payloads=[b"x"], slack_ns=0))
        first, second = _rows(router, 2)
        assert (first.batch_id, first.slot, first.n, first.statuses) == (1, 2, 3, None)
        assert np.frombuffer(first.output, "<i4").tolist() == [4, 4, 4]
        assert first.executing_ns == load_profile(PROFILE).latency_ns(4, 3)
        assert (second.batch_id, second.credit, second.running_batch) == (2, CAPACITY, 0)
        assert second.statuses == bytes([Status.EXPIRED])
        assert second.executing_ns == 0

        router.send(Ping(12345))
        assert router.expect(Pong).stamp_ns == 12345

        process._popen.terminate()
        assert router.control(Kind.DRAIN) == {"worker": "w"}
        router.send(Control(Kind.BYE))
        assert router.control(Kind.BYE) == {"worker": "w"}
        assert process._popen.wait(WAIT_S) == 0
    report = check_logs([log])
    assert (report.n_batches, report.n_queries, report.violations) == (1, 3, ())
    assert router.n_pings > 0


def _rows(router: FakeRouter, n: int) -> list[Any]:
    """Return the rows of the next DONE messages, `n` in all."""
    rows: list[Any] = []
    while len(rows) < n:
        rows += router.expect(Done).rows
    return rows


@pytest.mark.e2e
def test_a_fenced_worker_says_hello_again_and_counts_anew(router: FakeRouter) -> None:
    """After say-hello nothing is told of the old epoch's batches, and old directives are ignored."""
    with worker(router, "--emulate", PROFILE):
        router.control(Kind.HELLO)
        router.welcome()
        router.send(directive(41, payloads=[b"x"]))
        router.expect(Done)
        router.send(directive(42, subnet=5, payloads=[b"x"] * 16))
        router.send(directive(43, subnet=5, payloads=[b"x"] * 16))
        router.send(Control(Kind.REFUSED, {"code": "say-hello", "reason": "over"}))
        router.control(Kind.HELLO)
        assert router.welcome(EPOCH + 1).rows[0].last_batch == 0
        router.send(directive(44, payloads=[b"x"]))
        router.send(dataclasses.replace(directive(1, subnet=2, payloads=[b"x"]), epoch=EPOCH + 1))
        done = router.expect(Done)
        assert done.epoch == EPOCH + 1
        assert [row.batch_id for row in done.rows] == [1]


@pytest.mark.e2e
def test_a_router_that_breaks_the_rules_is_told_and_the_worker_lives(router: FakeRouter) -> None:
    """Unknown subnets are FAILED, batches beyond any credit OVERLOADED, mangled frames dropped."""
    with worker(router, "--emulate", PROFILE):
        router.control(Kind.HELLO)
        router.welcome()
        assert router.peer is not None
        assert sockets.send(router.socket, [router.peer, b"nonsense"])
        router.send(directive(1, slot=9, payloads=[b"x"]))
        router.send(directive(2, subnet=99, payloads=[b"x"]))
        (row,) = _rows(router, 1)
        assert (row.batch_id, row.statuses) == (2, bytes([Status.FAILED]))
        assert b"subnet: expected 0 to 5" in bytes(row.output)
        for batch_id in range(3, 103):
            router.send(directive(batch_id, subnet=5, payloads=[b"x"] * 16))
        rows = _rows(router, 100)
        overloaded = [row for row in rows if row.statuses == bytes([Status.OVERLOADED]) * 16]
        assert sorted(row.batch_id for row in rows) == list(range(3, 103))
        assert overloaded
        assert all(0 <= row.credit <= CAPACITY for row in rows)


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("refused", "theirs"),
    [
        (Control(Kind.REFUSED, {"code": "malformed", "reason": "version: expected 1, got 2"}, 1), "1"),
        (Control(Kind.REFUSED, {"code": "version", "reason": "no", "wire": [3, 4]}), "3 to 4"),
    ],
    ids=["older", "newer"],
)
def test_a_worker_whose_router_speaks_other_wire_versions_names_both(
    router: FakeRouter, refused: Control, theirs: str
) -> None:
    """One line and exit code 1, also where the router is of the first release."""
    with worker(router, "--emulate", PROFILE) as process:
        router.control(Kind.HELLO)
        router.send(refused)
        assert process._popen.wait(WAIT_S) == 1
        last_line = process.tail().splitlines()[-1]
        assert last_line.startswith(
            f"Error: the router refused this worker: wire version: expected 2, got {theirs}: "
        )


@pytest.mark.e2e
def test_a_refused_worker_ends_with_one_clear_line(router: FakeRouter) -> None:
    """REFUSED for any other reason than an old epoch ends the worker with exit code 1."""
    with worker(router, "--emulate", PROFILE) as process:
        router.control(Kind.HELLO)
        router.send(Control(Kind.REFUSED, {"code": "profile", "reason": "other subnets"}))
        assert process._popen.wait(WAIT_S) == 1
        last_line = process.tail().splitlines()[-1]
        assert last_line == "Error: the router refused this worker: profile: other subnets"


@pytest.mark.e2e
def test_the_digits_supernet_is_served(router: FakeRouter) -> None:
    """A real worker runs images through the resident supernet and refuses wrong payloads."""
    with worker(router, "--name", "d", "--supernet", "digits", "--profile", "digits-cpu") as process:
        hello = router.control(Kind.HELLO)
        assert hello["input"] == {"dtype": "float32", "shape": [1, 20, 20]}
        assert hello["output"] == {"dtype": "float32", "shape": [10]}
        router.welcome()
        router.send(directive(1, subnet=3, payloads=[bytes(1600)] * 3))
        (good,) = _rows(router, 1)
        logits = np.frombuffer(good.output, "<f4").reshape(3, 10)
        assert np.isfinite(logits).all()
        assert good.executing_ns > 0
        router.send(directive(2, subnet=3, payloads=[b"short"]))
        (bad,) = _rows(router, 1)
        assert bad.statuses == bytes([Status.INVALID])
        process._popen.terminate()
        router.control(Kind.DRAIN)
        router.send(Control(Kind.BYE))
        assert process._popen.wait(WAIT_S) == 0


@pytest.mark.e2e
def test_a_drain_and_the_bye_right_behind_it_end_in_a_bye(router: FakeRouter) -> None:
    """A router without batches on a worker sends both at once; the worker was drained, not lost."""
    with worker(router, "--name", "w", "--emulate", PROFILE) as process:
        router.control(Kind.HELLO)
        router.welcome()
        router.send(Control(Kind.DRAIN, {"worker": "w"}))
        router.send(Control(Kind.BYE))

        assert router.control(Kind.BYE) == {"worker": "w"}
        assert process._popen.wait(WAIT_S) == 0


def test_every_pair_of_link_and_event_is_known_or_cannot_happen() -> None:
    """A stopped worker hears nothing more; over is only what drains; all else has its row."""
    missing = {(link, event) for link in LinkState for event in LinkEvent} - set(TRANSITIONS)

    stopped = {(LinkState.STOPPED, event) for event in LinkEvent}
    over = {(LinkState.JOINING, LinkEvent.OVER), (LinkState.SERVING, LinkEvent.OVER)}
    move = {(state, LinkEvent.MOVE) for state in LinkState if state is not LinkState.SERVING}
    assert missing == stopped | over | move


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "expected one of --emulate, --supernet and --family"),
        (
            ["--emulate", PROFILE, "--supernet", "digits"],
            "expected one of --emulate, --supernet and --family",
        ),
        (["--supernet", "digits", "--gpus", "2"], "--gpus goes with --emulate"),
        (["--supernet", "digits", "--speed", "2"], "--speed goes with --emulate"),
        (["--supernet", "digits", "--drift", "0"], "--drift goes with --emulate"),
        (["--emulate", PROFILE, "--threads", "2"], "--threads goes with --supernet or --family"),
        (
            ["--family", "f.yaml", "--supernet", "digits"],
            "expected one of --emulate, --supernet and --family",
        ),
        (["--family", "f.yaml", "--weights", "w.pt"], "--weights goes with --supernet"),
        (["--family", "none.yaml"], "none.yaml: expected a family file: No such file or directory"),
        (["--emulate", "cnn-8gpu-modeled"], "did you mean 'cnn-8gpu-modelled'?"),
        (["--supernet", "digit"], "expected one of digits, ofa-resnet50, dynabert"),
        (["--supernet", "digits", "--profile", PROFILE], "expected one of digits, got one of ofa-resnet50"),
        (["--supernet", "dynabert"], "--profile: dynabert comes without one"),
        (
            ["--supernet", "digits", "--cores", "0-x"],
            "--cores: expected numbers such as 0,2 or 0-3, got '0-x'",
        ),
        (["--supernet", "digits", "--cores", "99999"], "--cores: expected some of"),
        (["--supernet", "digits", "--weights", "no.pt"], "no.pt: expected a safetensors or .pt file"),
        (["--connect", "nowhere", "--emulate", PROFILE], "expected tcp://HOST:PORT"),
    ],
)
def test_wrong_options_are_named_in_one_line(options: list[str], says: str) -> None:
    """Each mistake ends with exit code 1 and a line that names the option and what was expected."""
    result = CliRunner().invoke(cli, ["--connect", "tcp://127.0.0.1:1", *options])

    assert result.exit_code == 1
    assert says in result.output
    assert result.output.count("\n") == 1


def test_a_worker_that_cannot_begin_leaves_no_log(tmp_path: Path) -> None:
    """A header alone is no log."""
    path = tmp_path / "gpus.log"
    result = CliRunner().invoke(
        cli, ["--connect", "nowhere", "--emulate", "cnn-8gpu-modelled", "--event-log", str(path)]
    )
    assert result.exit_code == 1
    assert "expected tcp://HOST:PORT" in result.output
    assert not path.exists()
