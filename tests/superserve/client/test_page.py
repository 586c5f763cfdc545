"""docs/client.md says what the code says: every message, every number, and snippets that run."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import superserve
from loadgen.live.run import Emulation, emulated
from superserve.client import checks, outgoing, session
from superserve.client.aio import AsyncClient
from superserve.client.client import Client
from superserve.errors import QueryError, SuperServeError, UsageError
from superserve.net import connection
from superserve.subnet import TensorSpec
from tests.paths import ROOT
from tests.superserve.client.test_futures import FakeOwner
from tests.superserve.client.test_session import World

if TYPE_CHECKING:
    from collections.abc import Callable

PAGE = (ROOT / "docs" / "client.md").read_text(encoding="utf-8")
ENDPOINT = "tcp://127.0.0.1:5555"
TAKES = TensorSpec("float32", (1, 20, 20))
MS = 1_000_000


def blocks(language: str) -> list[str]:
    """Return the page's fenced blocks in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def printed(error: BaseException) -> str:
    """Return an error as the last line of a traceback shows it."""
    return f"{type(error).__module__}.{type(error).__qualname__}: {error}"


def raised(use: Callable[[], Any]) -> str:
    """Return what a misuse raises, as a traceback shows it."""
    with pytest.raises(SuperServeError) as caught:
        use()
    return printed(caught.value)


def on_a_loop(use: Callable[[], Any]) -> str:
    """Return what a misuse raises inside a running event loop."""

    async def main() -> str:
        return raised(use)

    return asyncio.run(main())


def from_two_loops() -> None:
    """Use one AsyncClient in two calls of asyncio.run."""
    client = AsyncClient("tcp://127.0.0.1:9")

    async def use() -> None:
        client.submit(b"image", slo_ms=36)

    asyncio.run(use())
    try:
        asyncio.run(use())
    finally:
        asyncio.run(client.close())  # its own loop is closed, so any may do it


def before_a_fork(client: Client | AsyncClient) -> None:
    """Use a client as the child of a fork does."""
    if isinstance(client, Client):
        client.pid = os.getppid()
        client.submit(b"image", slo_ms=36)
    else:
        client._pid = os.getppid()
        client.submit(b"image", slo_ms=36)


def waiting_in_a_callback() -> None:
    """Wait on the thread that settles futures."""
    owner = FakeOwner()
    owner.thread = threading.current_thread()
    owner.future().result()


def checked(payload: Any) -> None:
    """Check a payload against what the digits supernet takes."""
    world = World()
    world.session.learn(TAKES, None, ())
    world.session.checked(payload)


def ended(*, is_there: bool, heard: bool) -> str:
    """Return the error of a query that got no answer, by a router that is there, or heard."""
    world = World()
    world.session.no_router = connection.no_router(ENDPOINT)
    if is_there:
        world.session.welcomed(1)
    query = world.submit()
    quiet_ns = session.QUIET_NS
    for past_ns in (-36 * MS, quiet_ns, quiet_ns + session.PROBE_NS, session.GRACE_NS):
        if not query.ends:
            world.now_ns = 36 * MS + past_ns
            world.heard_ns = world.now_ns if heard else 0
            world.turn()
    (error,) = query.ends
    assert isinstance(error, QueryError)
    return printed(error)


def overloaded(n_bytes: int, **bounds: Any) -> None:
    """Submit two queries to a client with these bounds."""
    client = Client(ENDPOINT, **bounds)
    client._io.is_closing = True  # it starts no thread
    for _ in range(2):
        client.submit(bytes(n_bytes), slo_ms=36)


def closed_future() -> None:
    """Await a query whose client was closed."""
    client = Client(ENDPOINT)
    client._io.is_closing = True
    future = client.submit(b"image", slo_ms=36)
    client.close()
    future.result()


def closed() -> None:
    """Use a client that was closed."""
    client = Client(ENDPOINT)
    client.close()
    client.submit(b"image", slo_ms=36)


def messages() -> set[str]:
    """Return every message that the page shows, as the code says it."""
    no_router = superserve.UnansweredError(connection.no_router(ENDPOINT))
    return {
        ended(is_there=False, heard=False),
        ended(is_there=True, heard=False),
        ended(is_there=True, heard=True),
        printed(no_router),
        on_a_loop(lambda: Client(ENDPOINT).infer(b"image", slo_ms=36)),
        raised(lambda: AsyncClient(ENDPOINT).submit(b"image", slo_ms=36)),
        raised(from_two_loops),
        raised(lambda: checked(np.zeros((1, 20, 20)))),
        raised(lambda: checked(np.zeros((8, 1, 20, 20), np.float32))),
        raised(lambda: checked(bytes(400))),
        raised(lambda: before_a_fork(Client(ENDPOINT))),
        raised(lambda: before_a_fork(AsyncClient(ENDPOINT))),
        raised(waiting_in_a_callback),
        raised(closed_future),
        raised(closed),
        raised(lambda: overloaded(1, max_outstanding=1)),
        raised(lambda: overloaded(101, max_bytes=100)),
    }


def test_every_message_on_the_page_is_what_the_code_says() -> None:
    """To the letter, so that a search for what was printed finds the page; and none is left out."""
    shown = {line for block in blocks("text") for line in block.splitlines()}

    assert shown == messages()


def test_every_error_has_its_row() -> None:
    """What a query or its user may meet is in the table, and nothing else is."""
    table = PAGE.partition("## When there is no Reply")[2].partition("##")[0]
    rows = set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE))

    assert rows == {kind.__name__ for kind in (*QueryError.__subclasses__(), UsageError)}


@pytest.mark.parametrize(
    ("pattern", "value"),
    [
        (r"until (\d+) ms before their deadline", session.HOPELESS_NS / MS),
        (r"sent to at most (\d+)\s+routers", session.MAX_SENDS),
        (r"nothing has come (\d+) ms after", session.QUIET_NS / MS),
        (r"nothing at all is\s+heard for (\d+) ms", session.PROBE_NS / MS),
        (r"until\s+(\d+) ms after the deadline", session.GRACE_NS / MS),
        (r"repeats it after (\d+) ms", connection.HELLO_EVERY_NS / MS),
        (r"up to every (\d+) ms", connection.HELLO_EVERY_AT_MOST_NS / MS),
        (r"one message every ([\d.]+) ms", session.SPACING_NS / MS),
        (r"\(([\d,]+) queries without an answer", Client(ENDPOINT)._session.max_outstanding),
        (r"\((\d+) GiB of payloads", Client(ENDPOINT)._session.max_bytes / (1 << 30)),
        (r"below (\d+) KiB", outgoing.FRAMED_BYTES / 1024),
        (r"longer than (\d+) MiB", checks.MAX_PAYLOAD_BYTES / (1 << 20)),
    ],
)
def test_every_number_on_the_page_is_the_codes(pattern: str, value: float) -> None:
    """A constant that changes takes the page along."""
    (number,) = re.findall(pattern, " ".join(PAGE.split()))  # wherever its lines end

    assert float(number.replace(",", "")) == value


@pytest.mark.e2e
def test_the_snippets_run() -> None:
    """As they stand, against a real router; every query is answered."""
    snippets = blocks("python")
    with emulated(Emulation("cnn-8gpu-modelled", 2)) as cluster:
        outputs = [
            subprocess.run(
                [sys.executable, "-W", "error", "-c", snippet.replace(ENDPOINT, cluster.client_endpoint)],
                cwd=ROOT, capture_output=True, text=True, timeout=30, check=True,
            ).stdout.splitlines()
            for snippet in snippets
        ]  # fmt: skip

    assert [len(lines) for lines in outputs] == [33, 2]
    assert outputs[1][1] == "32 answered"
