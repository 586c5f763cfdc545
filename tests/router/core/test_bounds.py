"""The bounds on what the router holds: exact, and given back by whatever ends."""

from __future__ import annotations

from router.policies import Choice, QueueView, WorkerView
from superserve.wire import Status
from tests.router.core.books import books_of, numbers, sent
from tests.router.core.harness import CNN, World


class OneByOne:
    """A policy of batches so short that many could be on their way to a worker at once."""

    name = "one-by-one"

    def choose(self, queue: QueueView, worker: WorkerView, now_ns: int) -> Choice:  # noqa: ARG002  the same
        """Return the shortest batch there is."""
        return Choice(0, 1)


OK, OVERLOADED = Status.OK, Status.OVERLOADED


def test_what_is_in_flight_counts_against_the_bound() -> None:
    """Sixteen on the worker and four in the queue are twenty; once they are answered there is room again."""
    world = World(numbers(max_queries=20))
    world.join("w0", CNN)
    flying = world.submit(*[100.0] * 16)
    assert books_of(world).in_flight == 16
    ids = world.submit(*[100.0] * 10)

    assert world.statuses(ids) == [None] * 4 + [OVERLOADED] * 6
    world.run(100)
    assert world.statuses(flying + ids[:4]) == [OK] * 20
    assert OVERLOADED not in world.statuses(world.submit(*[100.0] * 20))


def test_a_message_that_just_fits_is_taken() -> None:
    """The bound itself is allowed, of bytes and of queries."""
    world = World(numbers(max_queries=4, max_bytes=40))
    ids = world.submit(50, 50, payload=b"x" * 10) + world.submit(50, 50, payload=b"y" * 10)

    assert world.statuses(ids) == [None] * 4
    assert books_of(world).held_bytes == 40
    assert world.statuses(world.submit(50, payload=b"")) == [OVERLOADED]


def test_every_end_gives_its_bytes_back() -> None:
    """Answered, expired, cancelled, refused or left behind: a message's bytes go with its last query."""
    world = World(numbers(max_bytes=100))
    world.submit(50, 5, payload=b"x" * 10)
    world.run(10)  # one of two has expired: the message is still held
    assert books_of(world).held_bytes == 20
    cancelled = world.submit(50, payload=b"x" * 10)
    world.cancel(*cancelled)
    assert books_of(world).held_bytes == 20
    world.submit(50, payload=b"x" * 30, client="gone")
    assert books_of(world).held_bytes == 50
    world.leave("gone")
    assert books_of(world).held_bytes == 20
    world.submit(-5, -5, payload=b"x" * 10)
    assert books_of(world).held_bytes == 20
    world.join("w0", CNN)
    world.run(50)

    assert books_of(world).held_bytes == 0


def test_a_worker_is_sent_no_more_than_it_asked_for() -> None:
    """It takes two batches; the third waits for a report, though the GPU will be free before it comes."""
    world = World(make_policy=lambda _profile: OneByOne())
    world.join("w0", CNN)
    ids = world.submit(*[60.0] * 12)
    world.run(1.4)  # both are short, and the first report is not here yet
    assert [batch.n for batch in sent(world)] == [1, 1]
    world.run(60)

    assert world.statuses(ids) == [OK] * 12
    assert len(world.dispatches()) == 12
