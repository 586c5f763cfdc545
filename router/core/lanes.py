"""The global queue in lanes, one for each priority class and floor, for policies that see demand.

The order is earliest deadline first across all lanes, and of queries due together the higher class first: a
spike has one deadline. What lanes add: a batch can skip queries whose floor lies above its subnet, and a
class can give way. With one lane, if clients use neither, it is an `EdfQueue` behind one look-up.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from router.core.edf import EdfQueue
from router.policies.due import UNIT, Due

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from router.core.edf import Cohort, Stretch

Lane = tuple[int, int]
"""Priority class and floor."""


class LaneQueue(EdfQueue):
    """Queries by ascending deadline across lanes. `len()` counts queries.

    Args:
        earlier: A queue whose queries it takes over.
        weights: What a query weighs whose floor is each row: see `router.policies.due.weights_of`.

    Attributes:
        due: How much of it is due by when.
    """

    __slots__ = ("_lanes", "due")

    def __init__(self, earlier: EdfQueue | None = None, weights: tuple[int, ...] = (UNIT,)) -> None:
        """Move everything from an earlier queue, whose cohorts have their floors by now."""
        super().__init__()
        self._lanes: dict[Lane, EdfQueue] = {}
        self.due = Due(weights)
        if earlier is not None:
            for cohort, lo, hi in earlier.take_before(1 << 63):
                self.push(cohort, lo, hi)

    def push(self, cohort: Cohort, lo: int, hi: int) -> None:
        """Add queries lo to hi of `cohort`, whose states must be QUEUED."""
        self._length += hi - lo
        self.due.add(cohort, lo, hi)
        for lane, start, end in _lanes_of(cohort, lo, hi):
            queue = self._lanes.get(lane)
            if queue is None:
                queue = self._lanes[lane] = EdfQueue()
            queue.push(cohort, start, end)

    def forget(self, cohort: Cohort, lo: int, hi: int) -> None:
        """Deduct queries lo to hi, which leave QUEUED from outside; their heap entries go when reached."""
        self._length -= hi - lo
        self.due.remove(cohort, lo, hi)
        for lane, start, end in _lanes_of(cohort, lo, hi):
            self._lanes[lane].forget(cohort, start, end)

    def head(self) -> tuple[int, Cohort, int] | None:
        """Return (deadline, cohort, index) of the earliest query, or None if there is none."""
        if len(self._lanes) == 1:
            [only] = self._lanes.values()
            return only.head()
        heads = self.heads()
        return min(heads, key=_order)[0] if heads else None

    def heads(self) -> list[tuple[tuple[int, Cohort, int], Lane]]:
        """Return the head of each lane, with its lane."""
        return self._heads(self._lanes)

    def head_class(self) -> tuple[int, int]:
        """Return the priority class of the head, and the lowest class queued; there must be a head."""
        heads = self.heads()
        _, lane = min(heads, key=_order)
        return lane[0], min(one[0] for _, one in heads)

    def outranks(self) -> bool:
        """Return whether queries of a lower class than the head's are queued; there must be a head."""
        if len(self._lanes) == 1:
            return False
        head_class, lowest = self.head_class()
        return lowest < head_class

    def take(self, k: int, subnet: int, until_ns: int | None = None) -> tuple[list[Stretch], int]:
        """Remove at most `k` earliest queries, skipping those whose floor lies above `subnet`.

        Args:
            k: How many at most.
            subnet: The row that will serve them.
            until_ns: Take none that is due later; None for no limit.

        Returns:
            The stretches in order of deadline, and the number of their queries.
            Their states are still QUEUED: the caller changes them.
        """
        if len(self._lanes) == 1:
            [only] = self._lanes.values()
            taken, n = only.take(k, subnet, until_ns)  # stops at once if the lane's floor is above
            self._length -= n
            self._deduct(taken)
            return taken, n
        # A query of a higher floor stays in its lane, where it keeps its place in the order.
        allowed = [lane for lane in self._lanes if lane[1] <= subnet]
        return self._take(k, allowed, until_ns)

    def take_packed(self, k: int, subnet: int, first_above: int) -> tuple[list[Stretch], int]:
        """Remove at most `k` queries, those first whose floor lies above row `first_above`.

        Args:
            k: How many at most.
            subnet: The row that is to serve them; queries of a floor above it stay.
            first_above: Queries whose floor is at most this row get the places that are left.

        Returns:
            The stretches, each group in order of deadline, and the number of their queries.
        """
        allowed = [lane for lane in self._lanes if lane[1] <= subnet]
        taken, n = self._take(k, [lane for lane in allowed if lane[1] > first_above], None)
        more, n_more = self._take(k - n, [lane for lane in allowed if lane[1] <= first_above], None)
        return taken + more, n + n_more

    def take_before(self, limit_ns: int) -> list[Stretch]:
        """Remove every query whose deadline lies before `limit_ns`; states stay QUEUED."""
        taken: list[Stretch] = []
        for queue in self._lanes.values():
            taken += queue.take_before(limit_ns)
        self._length -= sum(hi - lo for _, lo, hi in taken)
        self._deduct(taken)
        return taken

    def shed(self, before_ns: int, n: int) -> list[Stretch]:
        """Remove what a `router.policies.Shed` describes, at least one query; states stay QUEUED."""
        head_class, lowest = self.head_class()
        lanes = [lane for lane in self._lanes if lane[0] == lowest]
        if head_class != lowest:
            return self._take(n, lanes, None)[0]
        taken = [stretch for lane in lanes for stretch in self._lanes[lane].take_before(before_ns)]
        self._length -= sum(hi - lo for _, lo, hi in taken)
        self._deduct(taken)
        return taken

    def _take(self, k: int, lanes: Iterable[Lane], until_ns: int | None) -> tuple[list[Stretch], int]:
        """Remove at most `k` earliest queries of these lanes that are due by `until_ns`."""
        taken: list[Stretch] = []
        n = 0
        while n < k:
            heads = self._heads(lanes)
            if not heads:
                break
            heads.sort(key=_order)
            head, lane = heads[0]
            limit_ns = until_ns
            if len(heads) > 1:
                (next_ns, _, _), next_lane = heads[1]
                limit_ns = next_ns - (next_lane[0] > lane[0])  # those due with a higher class wait for it
            if until_ns is not None and limit_ns is not None:
                if head[0] > until_ns:
                    break
                limit_ns = min(limit_ns, until_ns)
            # From this lane up to the head of the next one: the order stays that of deadlines across lanes.
            stretches, more = self._lanes[lane].take(k - n, lane[1], limit_ns)
            taken += stretches
            n += more
        self._length -= n
        self._deduct(taken)
        return taken, n

    def _deduct(self, taken: list[Stretch]) -> None:
        for cohort, lo, hi in taken:
            self.due.remove(cohort, lo, hi)

    def _heads(self, lanes: Iterable[Lane]) -> list[tuple[tuple[int, Cohort, int], Lane]]:
        """Return the heads of these lanes; empty lanes are removed."""
        heads = []
        for lane in tuple(lanes):
            queue = self._lanes.get(lane)
            head = None if queue is None else queue.head()
            if head is not None:
                heads.append((head, lane))
            elif queue is not None:
                del self._lanes[lane]
        return heads


def _order(head: tuple[tuple[int, Cohort, int], Lane]) -> tuple[int, int, int]:
    """Earliest deadline first; of equal ones the higher class, then by arrival."""
    (deadline_ns, cohort, _), lane = head
    return deadline_ns, -lane[0], cohort.serial


def _lanes_of(cohort: Cohort, lo: int, hi: int) -> Iterator[tuple[Lane, int, int]]:
    """Yield the maximal stretches of queries that belong to one lane."""
    classes, floors = cohort.classes, cohort.floors
    if classes is None and floors is None:
        yield (0, 0), lo, hi
        return
    start = lo
    while start < hi:
        lane = _lane_of(cohort, start)
        end = start + 1
        while end < hi and _lane_of(cohort, end) == lane:
            end += 1
        yield lane, start, end
        start = end


def _lane_of(cohort: Cohort, i: int) -> Lane:
    return 0 if cohort.classes is None else cohort.classes[i], 0 if cohort.floors is None else cohort.floors[
        i
    ]
