"""QueryFuture is a concurrent.futures.Future in all that others may do with one, from many threads."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import os
import random
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest

from superserve.client.futures import QueryFuture, settle
from superserve.client.reply import Answers, Reply
from superserve.errors import ExpiredError, QueryError, UsageError
from superserve.wire import Status
from tests.superserve.client.fakes import WAIT_S, group

if TYPE_CHECKING:
    from collections.abc import Iterator


N = 300  # futures of a race: enough for some of each outcome, within a second


class FakeOwner:
    """A client whose queries end when a test orders it; a lock decides which thread ends one."""

    def __init__(self) -> None:
        self.guard: contextlib.AbstractContextManager[Any] = threading.RLock()
        self.pid = os.getpid()
        self.thread: threading.Thread | None = None
        self.left: set[QueryFuture] = set()

    def future(self) -> QueryFuture:
        """Return the future of a new query."""
        future = QueryFuture(self, b"payload", 7, 0, 36_000_000, 0.0, 0)
        self.left.add(future)
        return future

    def take(self, future: QueryFuture) -> bool:
        """Claim the end of this query; False if another thread was first."""
        with self.guard:
            is_mine = future in self.left
            self.left.discard(future)
        return is_mine

    def cancel_query(self, future: QueryFuture) -> bool:
        """End a query for its own cancel()."""
        is_mine = self.take(future)
        future._is_cancelled |= is_mine
        return is_mine

    def answer(self, futures: list[QueryFuture], status: Status = Status.OK, text: bytes = b"out!") -> None:
        """Settle what has not ended yet, as a client does with a group of answers."""
        whole = group(bytes(8 * len(futures)), status, text)
        mine = [future if self.take(future) else None for future in futures]
        settle(self.guard, mine, Answers(whole, "large", None, 5_000_000))


@pytest.fixture
def owner() -> FakeOwner:
    """Return an owner."""
    return FakeOwner()


@pytest.fixture
def _switching() -> Iterator[None]:
    """Have threads take turns so often that they meet everywhere."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_a_future_that_nobody_waits_for_makes_no_condition(owner: FakeOwner) -> None:
    """That is what makes it cheap; the reply is made once, when asked for."""
    future = owner.future()
    owner.answer([future])

    assert future.done()
    assert future.__dict__ == {}
    assert future.result() is future.result()
    assert future.exception() is None
    assert future.__dict__ == {}


def test_a_refusal_is_raised_each_time_and_returned_as_it_is(owner: FakeOwner) -> None:
    """Every call and every thread gets the same error."""
    future = owner.future()
    owner.answer([future], Status.EXPIRED, b"too late")

    with pytest.raises(ExpiredError, match="too late") as first:
        future.result()
    assert future.exception() is first.value


def test_a_wait_that_is_too_short_ends_in_a_timeout(owner: FakeOwner) -> None:
    """And the query goes on."""
    future = owner.future()
    for timeout in (0, 0.001):
        with pytest.raises(concurrent.futures.TimeoutError):
            future.result(timeout)
    assert not future.done()
    assert not future.running()
    owner.answer([future])
    assert future.result(0).output == b"out!"


def test_a_cancelled_future_is_done_for_everybody(owner: FakeOwner) -> None:
    """For wait() too, which takes some cancelled futures of the standard library for pending."""
    future, other = owner.future(), owner.future()
    assert future.cancel()
    assert future.cancel(), "a second time as well"
    assert future.cancelled()

    done, pending = concurrent.futures.wait([future, other], timeout=0)
    assert (done, pending) == ({future}, {other})
    with pytest.raises(concurrent.futures.CancelledError):
        future.result()
    owner.answer([future, other])
    assert future.cancelled()
    assert not other.cancel()


def test_callbacks_run_once_each_in_their_order(owner: FakeOwner) -> None:
    """Before the end, and at once after it."""
    future, called = owner.future(), []
    future.add_done_callback(lambda f: called.append((1, f.result().output)))
    future.add_done_callback(lambda _: called.append((2, None)))
    owner.answer([future])
    future.add_done_callback(lambda _: called.append((3, None)))

    assert called == [(1, b"out!"), (2, None), (3, None)]


def test_a_callback_that_raises_is_logged_and_harms_nobody(
    owner: FakeOwner, caplog: pytest.LogCaptureFixture
) -> None:
    """The callbacks and futures behind it have their turn."""
    first, second, called = owner.future(), owner.future(), []
    first.add_done_callback(lambda _: 1 / 0)
    first.add_done_callback(lambda _: called.append(1))
    second.add_done_callback(lambda _: called.append(2))
    with caplog.at_level(logging.ERROR, "superserve"):
        owner.answer([first, second])

    assert called == [1, 2]
    assert "a callback of <QueryFuture 0 finished> failed" in caplog.text
    assert "ZeroDivisionError" in caplog.text


def test_asyncio_can_await_one(owner: FakeOwner) -> None:
    """asyncio.wrap_future takes reply, refusal and cancel across; a cancel goes back."""

    async def main() -> None:
        futures = [owner.future() for _ in range(4)]
        wrapped = [asyncio.wrap_future(future) for future in futures]
        await asyncio.to_thread(owner.answer, futures[:1])
        await asyncio.to_thread(owner.answer, futures[1:2], Status.EXPIRED, b"too late")
        assert (await wrapped[0]).output == b"out!"
        with pytest.raises(ExpiredError, match="too late"):
            await wrapped[1]
        assert await asyncio.to_thread(futures[2].cancel)
        with pytest.raises(asyncio.CancelledError):
            await wrapped[2]
        wrapped[3].cancel()
        while not futures[3].cancelled():
            await asyncio.sleep(0)

    asyncio.run(main())


@pytest.mark.parametrize("what", ["result", "exception"])
def test_blocking_on_a_running_loop_is_refused(owner: FakeOwner, what: str) -> None:
    """The error says what to use there; what is done already, and polling, are fine."""
    future = owner.future()

    async def main() -> None:
        with pytest.raises(
            UsageError, match=rf"QueryFuture.{what}\(\) would block the event loop .* AsyncCl"
        ):
            getattr(future, what)()
        with pytest.raises(concurrent.futures.TimeoutError):
            future.result(timeout=0)
        owner.answer([future])
        assert future.result().output == b"out!"

    asyncio.run(main())


def test_waiting_on_the_thread_that_would_end_it_is_refused(owner: FakeOwner) -> None:
    """A callback that waits for another query would wait for ever."""
    owner.thread = threading.current_thread()
    with pytest.raises(UsageError, match=r"QueryFuture.result\(\) would wait for itself: callbacks run on"):
        owner.future().result()


def test_waiting_after_a_fork_is_refused(owner: FakeOwner) -> None:
    """No answer will come in the child."""
    owner.pid = os.getppid()
    with pytest.raises(UsageError, match="Client was made before a fork"):
        owner.future().result()


# --- races ----------------------------------------------------------------------------------


def ends(future: QueryFuture) -> str:
    """Return how a future ended, waiting for it in one of the ways there are."""
    try:
        way = random.randrange(4)
        if way == 0:
            return "reply" if isinstance(future.result(WAIT_S), Reply) else "?"
        if way == 1:
            error = future.exception(WAIT_S)
            return "reply" if error is None else "error"
        if way == 2:
            done, _ = concurrent.futures.wait([future], WAIT_S)
            assert done == {future}
        else:
            assert list(concurrent.futures.as_completed([future], WAIT_S)) == [future]
        return "reply" if future.exception(0) is None else "error"
    except concurrent.futures.CancelledError:
        return "cancelled"
    except QueryError:
        return "error"


@pytest.mark.usefixtures("_switching")
def test_every_waiter_sees_the_same_end(owner: FakeOwner) -> None:
    """Threads that wait, in every way, while another answers and a third cancels."""
    futures = [owner.future() for _ in range(N)]
    called: list[QueryFuture] = []
    for future in futures:
        future.add_done_callback(called.append)
    start = threading.Barrier(6)

    def wait() -> list[str]:
        start.wait(WAIT_S)
        return [ends(future) for future in futures]

    def answer() -> None:
        start.wait(WAIT_S)
        for at in range(0, N, 7):
            owner.answer(futures[at : at + 7], random.choice([Status.OK, Status.EXPIRED]))

    def cancel() -> list[bool]:
        start.wait(WAIT_S)
        return [future.cancel() for future in reversed(futures)]

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        waiting = [pool.submit(wait) for _ in range(4)]
        answering, cancelling = pool.submit(answer), pool.submit(cancel)
        first, *others = [waiter.result(WAIT_S) for waiter in waiting]
        answering.result(WAIT_S)
        cancelled = cancelling.result(WAIT_S)[::-1]

    assert others == [first] * 3
    assert "?" not in first
    assert [end == "cancelled" for end in first] == cancelled
    assert sorted(map(id, called)) == sorted(map(id, futures))


@pytest.mark.usefixtures("_switching")
def test_groups_of_futures_can_be_waited_for_while_they_end(owner: FakeOwner) -> None:
    """wait() and as_completed() over many futures: each is reported once, none is missed."""
    for _ in range(20):
        futures = [owner.future() for _ in range(40)]
        parts = [futures[i : i + 3] for i in range(0, len(futures), 3)]
        answering = threading.Thread(target=lambda: list(map(owner.answer, parts)))  # noqa: B023  joined below
        answering.start()
        reported = list(concurrent.futures.as_completed(futures, WAIT_S))
        done, pending = concurrent.futures.wait(futures, WAIT_S)
        answering.join(WAIT_S)

        assert sorted(map(id, reported)) == sorted(map(id, futures))
        assert (done, pending) == (set(futures), set())


@pytest.mark.usefixtures("_switching")
@pytest.mark.parametrize("when", [concurrent.futures.FIRST_COMPLETED, concurrent.futures.ALL_COMPLETED])
def test_waiting_begins_while_they_end(owner: FakeOwner, when: str) -> None:
    """A future that ends just as a thread begins to wait is either seen as ended or wakes that thread."""
    for _ in range(100):
        futures = [owner.future() for _ in range(3)]
        answering = threading.Thread(target=owner.answer, args=(futures,))
        answering.start()
        done, _ = concurrent.futures.wait(futures, WAIT_S, when)
        answering.join(WAIT_S)

        assert done
        assert when != concurrent.futures.ALL_COMPLETED or done == set(futures)


@pytest.mark.usefixtures("_switching")
def test_callbacks_added_while_it_ends_run_once(owner: FakeOwner) -> None:
    """By whichever thread; none is lost between pending and done."""
    for _ in range(200):
        future: QueryFuture = owner.future()
        called: list[QueryFuture] = []
        answering = threading.Thread(target=owner.answer, args=([future],))
        answering.start()
        for _ in range(5):
            future.add_done_callback(called.append)
        answering.join(WAIT_S)

        assert called == [future] * 5


def test_standard_internals_see_what_they_expect(owner: FakeOwner) -> None:
    """Later versions of asyncio read these attributes of a finished future in one go."""
    future: Any = owner.future()
    owner.answer([future])
    assert (future._state, future._result, future._exception) == ("FINISHED", future.result(), None)
    refused: Any = owner.future()
    owner.answer([refused], Status.EXPIRED, b"no")
    assert (refused._result, refused._exception) == (None, refused.exception())
    with contextlib.suppress(AttributeError):
        assert refused._get_snapshot() == (True, False, None, refused.exception())
    assert repr(owner.future()) == "<QueryFuture 0 pending>"
