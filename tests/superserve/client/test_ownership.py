"""What an application may do to ZeroMQ, to its descriptors, and to a client that it forgets."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from superserve.client.aio import AsyncClient
from superserve.client.client import Client
from superserve.errors import UnansweredError
from superserve.net.context import client_context
from superserve.wire import Queries
from tests.superserve.client.fakes import WAIT_S, FakeRouter, poll
from tests.superserve.client.test_aio import expect, turns
from tests.superserve.client.test_embedding import run_script

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.e2e

SLO_MS = 20_000.0


@pytest.fixture
def router() -> Iterator[FakeRouter]:
    """Yield a router that the test plays."""
    fake = FakeRouter()
    yield fake
    fake.close()


def connected(router: FakeRouter) -> Client:
    """Return a client that the router has welcomed."""
    client = Client(router.endpoint)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        connecting = pool.submit(client.connect)
        router.serve(connecting.done)
    connecting.result()
    return client


# --- ZeroMQ ---------------------------------------------------------------------------------


THREADED = """
import sys, zmq
from superserve import Client
client = Client(sys.argv[1])
client.connect()
ABUSE
print(type(client.submit(b"image", slo_ms=50).exception()).__name__)
with Client(sys.argv[1]):
    print("another")
client.close()
"""
ON_A_LOOP = """
import asyncio, sys, zmq
from superserve import AsyncClient, UnansweredError
async def main():
    async with AsyncClient(sys.argv[1]) as client:
        ABUSE
        try:
            await client.infer(b"image", slo_ms=50)
        except UnansweredError as error:
            print(type(error).__name__)
        async with AsyncClient(sys.argv[1]):
            print("another")
asyncio.run(main())
"""


@pytest.mark.parametrize("script", [THREADED, ON_A_LOOP], ids=["threads", "asyncio"])
@pytest.mark.parametrize(
    "abuse",
    [
        "zmq.Context.instance().term()",
        "zmq.Context.instance().destroy(linger=0)",
        "zmq.Context.instance().setsockopt(zmq.IDENTITY, b'me')",
        "zmq.Context.instance().set(zmq.MAX_SOCKETS, 1)",
    ],
)
def test_pyzmqs_shared_context_is_the_applications(router: FakeRouter, script: str, abuse: str) -> None:
    """Whatever it does to that, queries end, and another client finds the router."""
    assert run_script(router, script.replace("ABUSE", abuse)) == "UnansweredError\nanother\n"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_queries_end_even_if_their_context_is_terminated(router: FakeRouter) -> None:
    """The socket is of no use then, not even to say BYE; and the next client makes a context again."""
    client = connected(router)
    future = client.submit(b"image", slo_ms=SLO_MS)
    client_context().term()

    with pytest.raises(UnansweredError, match="I/O thread failed"):
        future.result(WAIT_S)
    client.close()
    connected(router).close()


# --- descriptors ----------------------------------------------------------------------------


DESCRIPTORS = """
import asyncio, os, resource, sys
from superserve import AsyncClient, Client, SuperServeError
resource.setrlimit(resource.RLIMIT_NOFILE, (256, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))

def threaded():
    with Client(sys.argv[1]):
        print("connected")

async def on_a_loop():
    async with AsyncClient(sys.argv[1]):
        print("connected")

def attempt(connect, n_left):
    taken = []
    try:
        while True:
            taken.append(os.dup(2))
    except OSError:
        pass
    for fd in taken[:n_left]:
        os.close(fd)
    try:
        connect()
    except SuperServeError as error:
        print(error)
    finally:
        for fd in taken[n_left:]:
            os.close(fd)

loop = asyncio.new_event_loop()
for connect in (threaded, lambda: loop.run_until_complete(on_a_loop())):
    for n_left in range(18):
        attempt(connect, n_left)
loop.close()
"""


def test_too_few_descriptors_are_an_error_that_names_the_limit(router: FakeRouter) -> None:
    """However few are left: neither ZeroMQ's abort, nor an error that blames host and port."""
    lines = run_script(router, DESCRIPTORS).splitlines()
    expected = (
        "a client: needs 16 file descriptors, and fewer are left: this process may open 256 (RLIMIT_NOFILE;"
    )

    assert len(lines) == 36
    for half in (lines[:18], lines[18:]):
        assert half[16:] == ["connected"] * 2
        assert [line for line in half[:16] if not line.startswith(expected)] == []


# --- clients that nobody closes -------------------------------------------------------------


def held() -> tuple[int, int]:
    """Return how many threads of clients and how many descriptors this process has."""
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("superserve ")]
    return len(threads), len(list(Path("/proc/self/fd").iterdir()))


def test_a_dropped_client_takes_its_thread_and_descriptors_along(router: FakeRouter) -> None:
    """With a warning that names it, as for a file."""
    connected(router).close()  # ZeroMQ's own threads stay from here on
    before = held()
    client = connected(router)
    future = client.submit(b"image", slo_ms=SLO_MS)
    router.answer(router.expect(Queries))
    assert future.result(WAIT_S).output == b"out!"
    del future
    assert held() > before

    with pytest.warns(ResourceWarning, match=r"Client\('tcp://127.0.0.1:\d+'\) was not closed"):
        del client
    router.serve(lambda: held() <= before)


def test_a_query_that_waits_keeps_its_client(router: FakeRouter) -> None:
    """`Client(...).submit(...)` in one line is answered; then the client goes."""
    client = connected(router)
    future = client.submit(b"image", slo_ms=SLO_MS)
    thread = client.thread
    assert thread is not None
    del client
    gc.collect()
    router.answer(router.expect(Queries))

    assert future.result(WAIT_S).output == b"out!"
    with pytest.warns(ResourceWarning, match="was not closed"):
        del future
    poll(lambda: not thread.is_alive())


def test_a_closed_client_is_dropped_in_silence(router: FakeRouter) -> None:
    """As is one that never connected. Warnings are errors here."""
    client = connected(router)
    client.close()
    del client
    Client(router.endpoint)
    AsyncClient(router.endpoint)
    gc.collect()


def test_a_dropped_asyncio_client_takes_its_descriptors_along(router: FakeRouter) -> None:
    """While its loop goes on; one whose query waits is kept until the answer has come."""

    async def greeted() -> AsyncClient:
        client = AsyncClient(router.endpoint)
        connecting = asyncio.ensure_future(client.connect())
        await turns(router, connecting.done)
        await connecting
        return client

    async def main() -> None:
        await (await greeted()).close()
        await asyncio.sleep(0)
        before = held()
        client = await greeted()
        future = client.submit(b"image", slo_ms=SLO_MS)
        del client
        gc.collect()
        router.answer(await expect(router, Queries))
        assert (await future).output == b"out!"
        await asyncio.sleep(0)  # until then the loop itself refers to the future that woke it
        with pytest.warns(ResourceWarning, match="AsyncClient.* was not closed"):
            del future
        await turns(router, lambda: held() <= before)

    asyncio.run(asyncio.wait_for(main(), WAIT_S))
