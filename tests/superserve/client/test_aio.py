"""AsyncClient ends every future, in one event loop: against a router that the test plays in that loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pytest

from superserve.client.aio import AsyncClient
from superserve.errors import (
    CancelledQueryError,
    ConfigError,
    DrainingError,
    ExpiredError,
    InvalidQueryError,
    OverloadedError,
    UnansweredError,
    UsageError,
)
from superserve.wire import Cancel, Control, Kind, Message, Queries, Results, Status
from tests.superserve.client.fakes import WAIT_S, FakeRouter, group, ids_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Iterator


SLO_MS = 20_000.0  # no answer of these tests is late on its own account
M = TypeVar("M", bound=Message)


@pytest.fixture
def router() -> Iterator[FakeRouter]:
    """Yield a router that the test plays."""
    fake = FakeRouter()
    yield fake
    fake.close()


def run(main: Coroutine[Any, Any, None]) -> None:
    """Run a test's coroutine; an error that the loop only logs fails the test."""
    logged: list[dict[str, Any]] = []

    async def watched() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: logged.append(context))
        await asyncio.wait_for(main, WAIT_S)

    asyncio.run(watched())
    assert not logged, logged


async def turns(router: FakeRouter, until: Callable[[], bool]) -> None:
    """Play the router's part until `until`; what clients say is greeted or dropped."""
    while not until():
        if router._next(0) is None:
            await asyncio.sleep(0.001)


async def expect(router: FakeRouter, kind: type[M], where: Callable[[M], bool] = lambda _message: True) -> M:
    """Return the next message of `kind` that is as wanted; what comes before it is dropped."""
    while True:
        message = router._next(0)
        if isinstance(message, kind) and where(message):
            return message
        if message is None:
            await asyncio.sleep(0.001)


@contextlib.asynccontextmanager
async def connected(router: FakeRouter, **options: Any) -> AsyncIterator[AsyncClient]:
    """Yield a client that the router has welcomed."""
    client = AsyncClient(router.endpoint, **options)
    connecting = asyncio.ensure_future(client.connect())
    await turns(router, connecting.done)
    await connecting
    async with client:
        yield client


# --- replies --------------------------------------------------------------------------------


def test_a_reply_and_a_refusal_are_awaited(router: FakeRouter) -> None:
    """Awaiting gives the reply, or raises the error of its status with the router's words."""

    async def main() -> None:
        async with connected(router) as client:
            first = asyncio.ensure_future(client.infer(b"image", slo_ms=SLO_MS, min_accuracy=70, priority=3))
            queries = await expect(router, Queries)
            assert queries.priority == b"\x03"
            router.answer(queries)
            reply = await first
            assert (reply.output, reply.subnet, reply.batch_size) == (b"out!", "large", 4)
            assert 0 < reply.latency_ms < WAIT_S * 1000
            second = client.submit(b"image", slo_ms=SLO_MS)
            router.answer(await expect(router, Queries), Status.EXPIRED, b"because I say so")
            with pytest.raises(ExpiredError, match="because I say so"):
                await second
            assert client.outstanding == client.held_bytes == 0

    run(main())


def test_what_tasks_submit_in_one_round_is_one_message(router: FakeRouter) -> None:
    """A hundred tasks cost one message, not a hundred; each gets its own answer."""

    async def main() -> None:
        async with connected(router) as client:
            tasks = [asyncio.ensure_future(client.infer(bytes([i]), slo_ms=SLO_MS)) for i in range(100)]
            queries = await expect(router, Queries)
            assert queries.n == 100
            packed = bytes(queries.payloads[0])
            groups = [
                group(query_id.to_bytes(8, "little"), Status.OK, packed[i : i + 1])
                for i, query_id in enumerate(ids_of(queries))
            ]
            router.send(Results(router.epoch, groups[::-1]))
            replies = await asyncio.gather(*tasks)
            assert [reply.output for reply in replies] == [bytes([i]) for i in range(100)]

    run(main())


def test_while_answers_are_awaited_messages_keep_their_distance(router: FakeRouter) -> None:
    """What is submitted meanwhile goes together, and all of it arrives."""

    async def main() -> None:
        async with connected(router) as client:
            futures = []
            for _ in range(50):
                futures.append(client.submit(b"image", slo_ms=SLO_MS))
                await asyncio.sleep(0)
            n_messages = n_queries = 0
            while n_queries < 50:
                queries = await expect(router, Queries)
                router.answer(queries)
                n_messages, n_queries = n_messages + 1, n_queries + queries.n
            await asyncio.gather(*futures)
            assert n_messages < 50

    run(main())


def test_a_flood_of_answers_leaves_other_tasks_their_turns(router: FakeRouter) -> None:
    """Of hundreds of messages that are there, some are taken in at a time, and all in the end."""

    async def main() -> None:
        async with connected(router) as client:
            futures = [client.submit(b"image", slo_ms=SLO_MS) for _ in range(300)]
            for query_id in ids_of(await expect(router, Queries)):
                router.send(
                    Results(router.epoch, [group(query_id.to_bytes(8, "little"), Status.OK, b"out!")])
                )
            await asyncio.gather(*futures)

    run(main())


def test_outputs_are_arrays_of_the_model(router: FakeRouter) -> None:
    """And what the model does not take is refused before it leaves."""
    router.model = {
        "input": {"dtype": "float32", "shape": [2, 3]},
        "output": {"dtype": "float32", "shape": [2]},
        "supernet": "fake",
    }

    async def main() -> None:
        async with connected(router) as client:
            with pytest.raises(InvalidQueryError, match=r"input: expected shape \(2, 3\), got \(3, 2\)"):
                client.submit(np.zeros((3, 2), np.float32), slo_ms=36)
            future = client.submit(np.zeros((2, 3), np.float32), slo_ms=SLO_MS)
            output = np.array([1.5, 2.5], np.float32)
            router.answer(await expect(router, Queries), output=output.tobytes())
            np.testing.assert_array_equal((await future).output, output)

    run(main())


def test_bounds_hold_here_too(router: FakeRouter) -> None:
    """Outstanding queries are counted exactly."""

    async def main() -> None:
        async with connected(router, max_outstanding=1) as client:
            client.submit(b"x", slo_ms=SLO_MS)
            with pytest.raises(OverloadedError, match="max_outstanding: 1 queries"):
                client.submit(b"x", slo_ms=SLO_MS)

    run(main())


# --- cancelling -----------------------------------------------------------------------------


def test_a_cancelled_task_cancels_its_query_at_the_router(router: FakeRouter) -> None:
    """By cancel(), or by asyncio.timeout; the answer that still comes does no harm."""

    async def main() -> None:
        async with connected(router) as client:
            task = asyncio.ensure_future(client.infer(b"image", slo_ms=SLO_MS))
            queries = await expect(router, Queries)
            task.cancel()
            cancel = await expect(router, Cancel)
            assert bytes(cancel.ids) == bytes(queries.ids)
            router.answer(queries)
            with pytest.raises(asyncio.CancelledError):
                await task
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.001):
                    await client.infer(b"image", slo_ms=SLO_MS)
            assert client.outstanding == client.held_bytes == 0

    run(main())


def test_a_future_cancelled_at_once_is_never_sent(router: FakeRouter) -> None:
    """Nor is a CANCEL for it; and what is done is not cancelled."""

    async def main() -> None:
        async with connected(router) as client:
            assert client.submit(b"gone", slo_ms=SLO_MS).cancel()
            kept = client.submit(b"kept", slo_ms=SLO_MS)
            queries = await expect(router, Queries)
            assert ids_of(queries) == [kept.query_id]
            router.answer(queries)
            await kept
            assert not kept.cancel()

    run(main())


# --- ends that are not answers --------------------------------------------------------------


def test_closing_leaves_nothing_pending_and_nothing_in_the_loop(router: FakeRouter) -> None:
    """Futures end, the reader is removed, the router gets BYE, and asyncio warns of no unread error."""

    async def main() -> None:
        selector = asyncio.get_running_loop()._selector  # type: ignore[attr-defined] # what it watches
        before = set(selector.get_map())
        async with connected(router) as client:
            awaited, forgotten = [client.submit(b"image", slo_ms=SLO_MS) for _ in range(2)]
            assert set(selector.get_map()) != before
        assert set(selector.get_map()) == before
        assert awaited.done()
        assert forgotten.done()
        with pytest.raises(CancelledQueryError, match="closed before the answer came"):
            await awaited
        for late in (client.submit, client.infer):
            with pytest.raises(DrainingError, match="the client is closed: make a new one"):
                await late(b"image", slo_ms=36)
        with pytest.raises(DrainingError, match="the client is closed: make a new one"):
            await client.connect()
        await client.close()  # the second time does nothing
        await expect(router, Control, lambda message: message.kind is Kind.BYE)

    run(main())


def closed_endpoint() -> str:
    """Return an endpoint at which nobody listens."""
    fake = FakeRouter()
    fake.close()
    return fake.endpoint


def test_connecting_to_nobody_says_where_and_what_to_do() -> None:
    """The error names the endpoint and the command that starts a router."""
    endpoint = closed_endpoint()

    async def main() -> None:
        with pytest.raises(UnansweredError, match=f"no router answers at {endpoint}: start one with"):
            async with AsyncClient(endpoint, connect_timeout_s=0.05):
                pass
        with pytest.raises(ConfigError, match="connect 'nonsense': expected tcp://HOST:PORT"):
            await AsyncClient("nonsense").connect()

    run(main())


def test_a_query_to_nobody_ends_by_its_deadline() -> None:
    """Without connecting first; the timers of the loop count in milliseconds."""
    client = AsyncClient(closed_endpoint())

    async def main() -> None:
        started_s = time.monotonic()
        with pytest.raises(UnansweredError, match=r"query 1: no router answers at tcp://.*check host"):
            await client.infer(b"image", slo_ms=50)
        assert time.monotonic() - started_s >= 0.048
        await client.close()

    run(main())


def test_a_router_that_vanishes_ends_queries_by_their_deadline(router: FakeRouter) -> None:
    """The broken connection is seen at once, so no grace is waited for."""

    async def main() -> None:
        async with connected(router) as client:
            future = client.submit(b"image", slo_ms=200)
            await expect(router, Queries)
            router.close()
            with pytest.raises(UnansweredError, match="no router answers at"):
                await future

    run(main())


def test_a_restarted_router_is_given_what_has_slack_left() -> None:
    """Same port, new epoch: HELLO again, RESUBMITTED queries, one answer."""
    first = FakeRouter()

    async def main() -> None:
        async with connected(first) as client:
            future = client.submit(b"kept", slo_ms=SLO_MS)
            await expect(first, Queries)
            first.close()
            second = FakeRouter(first.endpoint, epoch=2)
            try:
                queries = await expect(second, Queries, lambda q: q.resubmitted)
                assert (ids_of(queries), queries.epoch) == ([future.query_id], 2)
                second.answer(queries)
                assert (await future).output == b"out!"
            finally:
                second.close()

    run(main())


def test_a_failure_of_our_own_ends_every_query(router: FakeRouter, monkeypatch: pytest.MonkeyPatch) -> None:
    """No future is left waiting, whatever breaks; the loop's handler gets the error."""

    async def main() -> None:
        told: list[dict[str, Any]] = []
        async with connected(router) as client:
            asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
            future = client.submit(b"image", slo_ms=SLO_MS)
            monkeypatch.setattr(client._session, "outbound_to", lambda _: 1 / 0)
            with pytest.raises(UnansweredError, match=r"the client failed: ZeroDivisionError"):
                await future
            with pytest.raises(DrainingError):
                client.submit(b"image", slo_ms=36)
        assert [type(context["exception"]) for context in told] == [ZeroDivisionError]

    run(main())


# --- where it may be used -------------------------------------------------------------------


def test_another_loop_is_refused(router: FakeRouter) -> None:
    """The error says what to do; the client serves its own loop as before."""

    async def main() -> None:
        async with connected(router) as client:

            async def elsewhere() -> None:
                for use in (client.connect(), client.infer(b"image", slo_ms=36), client.close()):
                    with pytest.raises(UsageError, match=r"another event loop: make one AsyncClient per eve"):
                        await use

            await asyncio.to_thread(asyncio.run, elsewhere())
            future = client.submit(b"image", slo_ms=SLO_MS)
            router.answer(await expect(router, Queries))
            await future

    run(main())


def test_a_plain_thread_is_refused(router: FakeRouter) -> None:
    """So is a program without a loop."""

    async def main() -> None:
        async with connected(router) as client:
            with pytest.raises(
                UsageError, match=r"no event loop runs in this thread: use AsyncClient in a co"
            ):
                await asyncio.to_thread(client.submit, b"image", slo_ms=36)

    run(main())
    with pytest.raises(UsageError, match="or use Client from threads"):
        AsyncClient(router.endpoint).submit(b"image", slo_ms=36)


def test_a_client_from_before_a_fork_says_so(router: FakeRouter, monkeypatch: pytest.MonkeyPatch) -> None:
    """The socket must not be shared with the parent."""

    async def main() -> None:
        async with connected(router) as client:
            monkeypatch.setattr(client, "_pid", 1)  # as the child of a fork sees it
            with pytest.raises(UsageError, match=r"AsyncClient was made before a fork.* Make one in each"):
                client.submit(b"image", slo_ms=36)
            monkeypatch.undo()

    run(main())


def test_no_thread_is_started(router: FakeRouter) -> None:
    """Everything happens in the loop."""

    async def main() -> None:
        before = threading.active_count()
        async with connected(router):
            assert threading.active_count() == before

    run(main())


def test_nothing_is_logged_in_an_ordinary_life(router: FakeRouter, caplog: pytest.LogCaptureFixture) -> None:
    """The loop in debug mode has nothing to complain of either."""

    async def main() -> None:
        asyncio.get_running_loop().set_debug(True)
        asyncio.get_running_loop().slow_callback_duration = WAIT_S
        async with connected(router) as client:
            future = client.submit(b"image", slo_ms=SLO_MS)
            router.answer(await expect(router, Queries))
            await future

    with caplog.at_level(logging.WARNING):
        run(main())
    assert not caplog.records
