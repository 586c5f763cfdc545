"""How much of the queue is due by when: work in buckets of deadlines, counted as queries come and go.

A heap knows its head, and a policy that plans must know what is behind it. These counts cost one or two
dictionary entries a message, however long the queue is:

    fine      buckets of 2.1 ms, read for the first 17 to 50 ms from the head's deadline on
    coarse    buckets of 33.6 ms, read after those, for 1.3 s

What is due later counts as due at the end of that. Work is counted in queries that any subnet may serve:
one with an accuracy floor weighs as much more as its subnet takes longer.
"""

from __future__ import annotations

from typing import Protocol

UNIT = 16
"""What a query without a floor weighs. Weights are integers, so that a bucket that empties is exactly 0."""

_FINE, _COARSE = 21, 25
"""Widths as powers of two of nanoseconds. Buckets of 1 ms change no figure, and take twice as long to read;
one of 34 ms in the far part is on average half as wide as what is due there can still wait."""

_HALF_FINE, _HALF_COARSE = 1 << (_FINE - 1), 1 << (_COARSE - 1)

_NEAR = 8
"""Fine buckets read at least."""

_FAR = 40
"""Coarse buckets read at most: a decision must not cost more because a client set an SLO of an hour."""


class Message(Protocol):
    """The queries of one message, as far as they are counted here: `router.core.edf.Cohort` in the router.

    Attributes:
        deadlines_ns: Instants, length n.
        floors: The smallest row allowed for each; None if any row will do.
    """

    deadlines_ns: list[int]
    floors: list[int] | None


class GpuTime(Protocol):
    """What GPU time there is until a deadline, in times of one GPU's profile.

    Attributes:
        begin_ns: The instant at which that GPU can begin.
        slowdown: What the clock's time is divided by.
        others: How many such GPUs the other ones are worth.
        taken_ns: Their time that is taken.
        lost_ns: That, and what they waste before any deadline.
        unit_ns: What a query costs.
        enough_ns: A deadline is met whatever this GPU does first if the time until it, less what the queries
            left to this GPU cost, is at least that.
        lost_at_ns: A deadline is lost whatever this GPU does if the time until it, less what the queries left
            to this GPU cost, is below that; and if all GPUs together are too slow, no later one matters.
        patience_ns: How long a query can wait and run.
    """

    begin_ns: int
    slowdown: float
    others: float
    taken_ns: float
    lost_ns: float
    unit_ns: float
    enough_ns: float
    lost_at_ns: float
    patience_ns: float


_LESS = 0.9999 * UNIT
"""A little less, so that rounding decides nothing."""

Tight = list[tuple[float, float]] | None
"""Time until a deadline, and how many queries due by then the other GPUs cannot serve, if more than one; both
ascend. None if deadlines are missed whatever is done."""


class Due:
    """The work queued, by deadline.

    Args:
        weights: What a query weighs whose floor is each row, in `UNIT`; see `weights_of`. A row beyond the
            last weighs as much as that.

    Attributes:
        total: All work, in `UNIT`.
        floors: How many queries have each row as their floor; row 0 is left out.
    """

    __slots__ = ("_coarse", "_fine", "_weights", "floors", "total")

    def __init__(self, weights: tuple[int, ...] = (UNIT,)) -> None:
        self._weights = weights
        self._fine: dict[int, int] = {}
        self._coarse: dict[int, int] = {}
        self.total = 0
        self.floors: dict[int, int] = {}

    def add(self, cohort: Message, lo: int, hi: int) -> None:
        """Count queries lo to hi of `cohort`."""
        self._count(cohort, lo, hi, 1)

    def remove(self, cohort: Message, lo: int, hi: int) -> None:
        """Deduct queries lo to hi of `cohort`, which were counted."""
        self._count(cohort, lo, hi, -1)

    def steps(self, head_ns: int) -> list[tuple[int, int]]:
        """Return (instant, work due by then in `UNIT`), ascending, until all is counted.

        Args:
            head_ns: The earliest deadline queued.
        """
        found: list[tuple[int, int]] = []
        total = left = self.total
        bucket = head_ns >> _FINE
        # Up to where a coarse bucket begins, so that none is counted twice.
        end = (((bucket + _NEAR) >> (_COARSE - _FINE)) + 1) << (_COARSE - _FINE)
        get = self._fine.get
        while left and bucket < end:
            work = get(bucket)
            if work is not None:
                left -= work
                # On average what is in a bucket is due in its middle; in the first one the head is known.
                # With the middle there too, 1 in 100 queues of one message had a query that came too late.
                found.append(((bucket << _FINE) + _HALF_FINE if found else head_ns, total - left))
            bucket += 1
        if left:
            self._add_far(found, end >> (_COARSE - _FINE), left)
        return found

    def ask(self, head_ns: int, time: GpuTime, harmless: float) -> tuple[float, Tight, int]:
        """Return what the `steps` ask of the GPUs, without reading those that change nothing.

        Args:
            head_ns: The earliest deadline queued.
            time: What GPU time there is.
            harmless: Up to here the third figure may be too small.

        Returns:
            The greatest work over the GPU time until it is due, in `UNIT` a nanosecond; the deadlines that
            ask something of this GPU; the work due within a patience.
        """
        coarse, total = self._coarse, self.total
        first = head_ns >> _COARSE
        far = (((head_ns >> _FINE) + _NEAR) >> (_COARSE - _FINE)) + 1
        near = coarse.get(first, 0)
        if far - first > 1:
            near += coarse.get(first + 1, 0)
        intensity, soon = 0.0, 0
        after: Tight = []
        is_exact = total > harmless and self._by(time, near, far) > harmless
        if near < total:
            # The far part first: where all have time the near one asks for less, and need not be read.
            region = (coarse, _COARSE, far, far + _FAR, near, total)
            intensity, after, soon = _scan(region, -1, time, 0.0, is_exact)
            if after is None:
                return intensity, None, 0
            if soon or not is_exact:
                until_ns = (head_ns - time.begin_ns) / time.slowdown
                time_ns = until_ns * (time.others + 1.0) - time.taken_ns
                room_ns = time.others * until_ns - time.lost_ns
                if near <= intensity * time_ns and near * time.unit_ns < _LESS * room_ns:
                    return intensity, after, soon
        region = (self._fine, _FINE, head_ns >> _FINE, far << (_COARSE - _FINE), 0, near)
        intensity, tight, at_least = _scan(region, head_ns, time, intensity, is_exact)
        if tight is None:
            return intensity, None, 0
        if after:
            # What is due later and leaves no more is met if that is.
            most = tight[-1][1] if tight else 0.0
            tight += [one for one in after if one[1] > most]
        return intensity, tight, soon or at_least

    def _by(self, time: GpuTime, work: int, far: int) -> int:
        """Return at least the work due within a patience, from that before a coarse bucket on."""
        end = int(time.begin_ns + time.patience_ns * time.slowdown) >> _COARSE
        if end >= far + _FAR:
            return self.total
        for bucket in range(far, end + 1):
            work += self._coarse.get(bucket, 0)
        return work

    def _add_far(self, found: list[tuple[int, int]], bucket: int, left: int) -> None:
        """Add the steps from a coarse bucket on; what lies beyond `_FAR` of them counts as due then."""
        get, total, end = self._coarse.get, self.total, bucket + _FAR
        while left and bucket < end:
            work = get(bucket)
            if work is not None:
                left -= work
                found.append(((bucket << _COARSE) + _HALF_COARSE, total - left))
            bucket += 1
        if left:
            found.append(((end << _COARSE) + _HALF_COARSE, total))

    def _count(self, cohort: Message, lo: int, hi: int, sign: int) -> None:
        deadlines_ns, floors = cohort.deadlines_ns, cohort.floors
        if floors is None:
            if hi - lo == 1:
                self._note(deadlines_ns[lo], sign * UNIT)
                return
            stretch = deadlines_ns[lo:hi]
            # A message's queries are usually due within the same millisecond: min and max run in C.
            first_ns = min(stretch)
            if first_ns >> _FINE == max(stretch) >> _FINE:
                self._note(first_ns, sign * UNIT * (hi - lo))
            else:
                for due_ns in stretch:
                    self._note(due_ns, sign * UNIT)
            return
        weights, of_floor = self._weights, self.floors
        for i in range(lo, hi):
            floor = floors[i]
            self._note(deadlines_ns[i], sign * weights[floor if floor < len(weights) else -1])
            if floor:
                of_floor[floor] = of_floor.get(floor, 0) + sign

    def until(self, head_ns: int, end_ns: int) -> int:
        """Return the work due by an instant, to about a bucket, in `UNIT`.

        Args:
            head_ns: The earliest deadline queued.
            end_ns: The instant.
        """
        buckets, width = self._fine, _FINE
        if end_ns - head_ns > 3 * _NEAR << _FINE:
            buckets, width = self._coarse, _COARSE
        first, last = head_ns >> width, end_ns >> width
        return self.total if last - first > _FAR else sum([buckets.get(i, 0) for i in range(first, last + 1)])

    def floored(self, above: int, up_to: int) -> int:
        """Return how many queries have a floor above one row and up to another."""
        return sum([n for floor, n in self.floors.items() if above < floor <= up_to])

    def _note(self, due_ns: int, work: int) -> None:
        self.total += work
        for buckets, bucket in ((self._fine, due_ns >> _FINE), (self._coarse, due_ns >> _COARSE)):
            left = buckets.get(bucket, 0) + work
            if left:
                buckets[bucket] = left
            else:
                del buckets[bucket]


def _scan(
    region: tuple[dict[int, int], int, int, int, int, int],
    head_ns: int,
    time: GpuTime,
    intensity: float,
    is_exact: bool,
) -> tuple[float, Tight, int]:
    """Return what the steps of one region ask: see `Due.ask`.

    Args:
        region: Its buckets, their width, the first and the one after the last; the work due before it, and by
            its end: what is not found in the buckets is due then.
        head_ns: The head's deadline, which is known; -1 if its bucket is not in the region.
        time: What GPU time there is.
        intensity: The greatest found so far.
        is_exact: Whether all steps within a patience are to be read.
    """
    buckets, width, first, end, work, total = region
    # Each figure once: a step costs a third of a microsecond, and there may be twenty.
    begin_ns, slowdown, others, taken_ns = time.begin_ns, time.slowdown, time.others, time.taken_ns
    lost_ns, unit_ns = time.lost_ns, time.unit_ns
    lost_at_ns, enough_ns = time.lost_at_ns, time.enough_ns
    n_gpus, half_ns, each_ns = others + 1.0, 1 << (width - 1), unit_ns / _LESS
    head, get = head_ns >> width if head_ns >= 0 else -1, buckets.get
    exact_ns = time.patience_ns if is_exact else float("-inf")
    tight: list[tuple[float, float]] = []
    most, soon = 1.0, 0  # one is in the batch, whichever it is
    for bucket in range(first, end):
        more = get(bucket)
        if more is None:
            continue
        work += more
        # On average what is in a bucket is due in its middle.
        until_ns = (((bucket << width) + half_ns if bucket != head else head_ns) - begin_ns) / slowdown
        time_ns = until_ns * n_gpus - taken_ns
        if work > intensity * time_ns:
            if time_ns < 0.5 * until_ns:
                time_ns = 0.5 * until_ns
            if time_ns > 0.0 and work > intensity * time_ns:
                intensity = work / time_ns
        # What the others cannot serve by then is left to this GPU.
        room_ns = others * until_ns - lost_ns
        if work * each_ns > room_ns:
            left = work / UNIT if room_ns <= 0.0 else work / UNIT - room_ns / unit_ns
            if left > most and until_ns - left * unit_ns < enough_ns:
                most = left
                tight.append((until_ns, left))
                if until_ns - left * unit_ns < lost_at_ns and intensity * unit_ns > UNIT:
                    return intensity, None, soon
        elif until_ns > exact_ns and total <= intensity * time_ns and total * each_ns <= room_ns:
            return intensity, tight, soon
        if until_ns <= exact_ns:
            soon = work
        if work >= total:
            return intensity, tight, soon
    # What is due later counts as due in the next bucket: a decision must not read them all.
    region = ({end: total - work}, width, end, end + 1, work, total)
    intensity, last, at_least = _scan(region, -1, time, intensity, is_exact)
    if last is None:
        return intensity, None, 0
    return intensity, tight + [one for one in last if one[1] > most], at_least or soon


def weights_of(costs_ns: list[float]) -> tuple[int, ...]:
    """Return what a query weighs whose floor is each row.

    Args:
        costs_ns: What a query costs at least on each row, ascending.
    """
    return tuple(max(UNIT, round(UNIT * cost_ns / costs_ns[0])) for cost_ns in costs_ns)
