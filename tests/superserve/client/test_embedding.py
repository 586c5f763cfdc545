"""A client in another program: forks, loops, callbacks, many files, and no call of close()."""

from __future__ import annotations

import asyncio
import concurrent.futures
import fcntl
import gc
import logging
import os
import resource
import subprocess
import sys
import threading
import time
import types
from typing import TYPE_CHECKING

import pytest

from superserve.client.client import Client
from superserve.client.iothread import Sleeper
from superserve.errors import CancelledQueryError, DrainingError, UnansweredError, UsageError
from superserve.wire import Cancel, Queries, Status
from tests.paths import ROOT
from tests.superserve.client.fakes import WAIT_S, FakeRouter, group, poll

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from superserve.client.futures import QueryFuture

pytestmark = pytest.mark.e2e

SLO_MS = 20_000.0


@pytest.fixture
def router() -> Iterator[FakeRouter]:
    """Yield a router that the test plays."""
    fake = FakeRouter()
    yield fake
    fake.close()


@pytest.fixture
def client(router: FakeRouter) -> Iterator[Client]:
    """Yield a client that the router has welcomed."""
    client = Client(router.endpoint)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        connected = pool.submit(client.connect)
        router.serve(connected.done)
    connected.result()
    yield client
    client.close()


# --- event loops ----------------------------------------------------------------------------


def test_blocking_calls_on_a_running_loop_say_what_to_use(client: Client, router: FakeRouter) -> None:
    """They would stop every task of the loop; submit and wrap_future do not."""

    async def main() -> None:
        with pytest.raises(
            UsageError, match=r"Client.infer\(\) would block the event loop .* use AsyncClient"
        ):
            client.infer(b"image", slo_ms=36)
        with pytest.raises(UsageError, match=r"Client.connect\(\) would block the event loop"):
            client.connect()
        assert client.outstanding == 0
        future = client.submit(b"image", slo_ms=SLO_MS)
        router.answer(router.expect(Queries))
        assert (await asyncio.wrap_future(future)).output == b"out!"

    asyncio.run(main())


def test_cells_of_a_notebook_may_block(
    client: Client, router: FakeRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They run on their kernel's loop, which waits for them as it does for any other code."""
    monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))

    async def cell() -> None:
        client.connect()
        future = client.submit(b"image", slo_ms=SLO_MS)
        router.answer(router.expect(Queries))
        assert future.result(WAIT_S).output == b"out!"

    asyncio.run(cell())


# --- callbacks on the client's thread -------------------------------------------------------


def test_a_callback_may_submit_and_one_that_fails_is_logged(
    client: Client, router: FakeRouter, caplog: pytest.LogCaptureFixture
) -> None:
    """The thread lives on, and serves what the callback has submitted."""
    submitted: list[QueryFuture] = []
    future = client.submit(b"image", slo_ms=SLO_MS)
    future.add_done_callback(lambda _: 1 / 0)
    future.add_done_callback(lambda _: submitted.append(client.submit(b"again", slo_ms=SLO_MS)))
    with caplog.at_level(logging.ERROR, "superserve"):
        router.answer(router.expect(Queries))
        router.answer(router.expect(Queries))
        poll(lambda: bool(submitted))

    assert submitted[0].result(WAIT_S).output == b"out!"
    assert "ZeroDivisionError" in caplog.text


def test_a_callback_that_would_wait_for_itself_is_told(client: Client, router: FakeRouter) -> None:
    """It runs on the only thread that could end its waiting."""
    errors: list[BaseException] = []

    def callback(_: object) -> None:
        try:
            client.infer(b"image", slo_ms=SLO_MS)
        except UsageError as error:
            errors.append(error)

    client.submit(b"image", slo_ms=SLO_MS).add_done_callback(callback)
    router.answer(router.expect(Queries))
    poll(lambda: bool(errors))

    assert "would wait for itself: callbacks run on the client's own thread" in str(errors[0])
    poll(lambda: client.outstanding == 0)  # the query that nobody could await was cancelled


def test_a_callback_may_close_the_client(client: Client, router: FakeRouter) -> None:
    """The thread ends after it; so does everything that waits."""
    first, second = [client.submit(b"image", slo_ms=SLO_MS) for _ in range(2)]
    first.add_done_callback(lambda _: client.close())
    router.expect(Queries)
    router.send_results(group(first.query_id.to_bytes(8, "little"), Status.OK, b"out!"))

    with pytest.raises(CancelledQueryError):
        second.result(WAIT_S)
    with pytest.raises(DrainingError):
        client.submit(b"image", slo_ms=SLO_MS)
    client.close()
    assert client.thread is not None
    assert not client.thread.is_alive()


def test_an_interrupted_infer_cancels_its_query(
    client: Client, router: FakeRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C costs no GPU time."""

    def interrupt(*_: object) -> None:
        router.expect(Queries)
        raise KeyboardInterrupt

    monkeypatch.setattr("superserve.client.futures.QueryFuture._block", interrupt)
    with pytest.raises(KeyboardInterrupt):
        client.infer(b"image", slo_ms=SLO_MS)

    router.expect(Cancel)
    assert client.outstanding == 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_failure_of_the_thread_ends_every_query(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """No future is left waiting, whatever breaks."""
    monkeypatch.setattr(client._session, "outbound_to", lambda _: 1 / 0)
    future = client.submit(b"image", slo_ms=SLO_MS)

    with pytest.raises(UnansweredError, match="I/O thread failed: ZeroDivisionError"):
        future.result(WAIT_S)
    with pytest.raises(DrainingError):
        client.submit(b"image", slo_ms=36)


class Cyclic:
    """Garbage that only the collector finds, and that uses a client as it goes."""

    def __init__(self, use: Callable[[], object]) -> None:
        self.me = self
        self.use = use

    def __del__(self) -> None:
        self.use()


def test_a_finalizer_may_use_the_client_wherever_it_runs(client: Client) -> None:
    """The collector may run one in the middle of a submit, on the same thread: it must not hang."""
    threshold = gc.get_threshold()
    gc.set_threshold(1, 1, 1)
    futures = []
    try:
        for _ in range(200):
            Cyclic(lambda: futures.append(client.submit(b"del", slo_ms=SLO_MS)))
            futures.append(client.submit(b"image", slo_ms=SLO_MS))
            Cyclic(futures[-1].cancel)
            futures[-1].add_done_callback(lambda _: None)
    finally:
        gc.set_threshold(*threshold)
    gc.collect()
    for future in futures:
        future.cancel()

    assert client.outstanding == client.held_bytes == 0


# --- the process around it ------------------------------------------------------------------


def test_what_is_written_after_the_last_look_wakes() -> None:
    """A thread writes its wake-up late: reading it must not swallow the next thread's."""
    wake_fd, socket_fd = os.eventfd(0, os.EFD_NONBLOCK), os.eventfd(0, os.EFD_NONBLOCK)
    try:
        sleeper = Sleeper([socket_fd], wake_fd)
        sleeper.is_told = True
        sleeper.clear()
        assert sleeper.is_told, "not written yet: to be read later"
        os.eventfd_write(wake_fd, 1)
        began_s = time.monotonic()
        sleeper.sleep(time.monotonic_ns() + int(WAIT_S * 1e9))
        assert time.monotonic() - began_s < WAIT_S
        sleeper.clear()
        assert not sleeper.is_told
    finally:
        os.close(wake_fd)
        os.close(socket_fd)


@pytest.mark.parametrize("is_high", [False, True])
def test_sleeping_works_with_any_descriptor(*, is_high: bool) -> None:
    """select() takes none above 1023, and an application may have thousands of files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if is_high:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(4_096, hard), hard))
    low = os.eventfd(0, os.EFD_NONBLOCK)
    wake_fd = fcntl.fcntl(low, fcntl.F_DUPFD, 1_100) if is_high else os.dup(low)
    try:
        sleeper = Sleeper([low], wake_fd)
        began_ns = time.monotonic_ns()
        sleeper.sleep(began_ns + 2_000_000)
        assert time.monotonic_ns() - began_ns >= 2_000_000
        os.eventfd_write(wake_fd, 1)
        sleeper.sleep(began_ns + int(WAIT_S * 1e9))
        assert time.monotonic_ns() - began_ns < WAIT_S * 1e9
    finally:
        os.close(low)
        os.close(wake_fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def run_script(router: FakeRouter, script: str) -> str:
    """Run a program that is given the router's endpoint; return what it printed."""
    done: list[subprocess.CompletedProcess[str]] = []

    def run() -> None:
        command = [sys.executable, "-W", "error", "-c", script, router.endpoint]
        done.append(
            subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=WAIT_S, check=False)
        )

    thread = threading.Thread(target=run)
    thread.start()
    router.serve(lambda: not thread.is_alive())
    thread.join()
    (result,) = done
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


def test_a_script_that_forgets_to_close_ends_cleanly(router: FakeRouter) -> None:
    """With a query under way, and one that a thread waits for."""
    script = """
import sys, threading
from superserve import Client
client = Client(sys.argv[1])
client.connect()
future = client.submit(b"image", slo_ms=60_000)
threading.Thread(target=future.exception, daemon=True).start()
future.add_done_callback(lambda f: print(f.exception()))
"""
    assert run_script(router, script) == "the client was closed before the answer came\n"


def test_an_asyncio_script_that_forgets_to_close_ends_cleanly(router: FakeRouter) -> None:
    """The loop is closed by then."""
    script = """
import asyncio, sys
from superserve import AsyncClient
async def main():
    global client
    client = AsyncClient(sys.argv[1])
    await client.connect()
    client.submit(b"image", slo_ms=60_000)
    print("done")
asyncio.run(main())
"""
    assert run_script(router, script) == "done\n"


def test_a_fork_is_told_what_to_do_and_can_end(router: FakeRouter) -> None:
    """Whatever the child does with what it inherited; and a client of its own serves it."""
    script = """
import os, sys
from superserve import Client, UsageError
client = Client(sys.argv[1])
client.connect()
future = client.submit(b"image", slo_ms=60_000)
pid = os.fork()
if pid == 0:
    for use in (lambda: client.submit(b"x", slo_ms=36), client.connect, future.result, future.cancel):
        try:
            use()
        except UsageError as error:
            print(error)
    with Client(sys.argv[1]) as mine:
        print(mine.outstanding)
    sys.exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
client.close()
"""
    told = (
        "this Client was made before a fork: its connection did not come along. "
        "Make one in each process, after the fork\n"
    )
    assert run_script(router, script) == told * 4 + "0\n"
