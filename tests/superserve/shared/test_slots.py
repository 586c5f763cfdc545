"""The slots of a memory: no two overlap, and what is given back is used again."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from superserve.shared.slots import FIRST_OFFSET, HEAD_BYTES, PayloadSlots, room_of
from tests.effort import examples

MEMORY_BYTES = 1 << 20
SIZES = st.integers(0, 300_000)


class SlotsMachine(RuleBasedStateMachine):
    """Takes and frees slots of all sizes in any order; a plain list of extents is the model."""

    def __init__(self) -> None:
        super().__init__()
        self.slots = PayloadSlots(MEMORY_BYTES)
        self.taken: dict[int, int] = {}
        self.stamped: set[int] = set()

    @rule(size=SIZES)
    def take(self, size: int) -> None:
        """A slot lies in the memory and beside every other; none is refused while one of its size is free."""
        offset = self.slots.take(size)
        if offset is not None:
            assert offset not in self.taken
            self.taken[offset] = size
            self.stamped.add(offset)

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        """The slot that was freed last is the next one of its size."""
        offset = data.draw(st.sampled_from(sorted(self.taken)))
        size = self.taken.pop(offset)
        self.slots.give_back(offset)
        again = self.slots.take(size)
        assert again == offset
        self.slots.give_back(offset)

    @precondition(lambda self: not self.taken)
    @rule()
    def clear(self) -> None:
        """It reports every slot that ever had a stamp, and then the whole memory is free for any size."""
        assert self.stamped <= set(self.slots.clear())
        self.stamped.clear()
        offset = self.slots.take(MEMORY_BYTES - FIRST_OFFSET - HEAD_BYTES - 300_000)
        assert offset == FIRST_OFFSET
        self.slots.give_back(offset)
        self.stamped.add(offset)

    @invariant()
    def they_lie_apart(self) -> None:
        """Head and payload of each lie in the memory, behind its first page and before the next slot."""
        end = FIRST_OFFSET
        for offset, size in sorted(self.taken.items()):
            assert offset >= end
            end = offset + HEAD_BYTES + size
        assert end <= MEMORY_BYTES
        assert self.slots.n_used == len(self.taken)


SlotsMachine.TestCase.settings = settings(max_examples=examples(60), stateful_step_count=40, deadline=None)
TestSlots = SlotsMachine.TestCase


def test_a_full_memory_gives_no_slot_until_one_is_back() -> None:
    """As many slots of one size as fit, then none, then again the one that came back."""
    slots = PayloadSlots(MEMORY_BYTES)
    offsets = []
    while (offset := slots.take(100_000)) is not None:
        offsets.append(offset)

    assert len(offsets) == (MEMORY_BYTES - FIRST_OFFSET) // room_of(100_000)
    slots.give_back(offsets[3])
    assert slots.take(100_000) == offsets[3]
    assert slots.take(100_000) is None


def test_less_than_a_quarter_of_a_slot_is_wasted() -> None:
    """From the size on at which payloads are shared, and beside the head and one page."""
    for size in range(32_768, 3_000_000, 9_973):
        assert size + HEAD_BYTES <= room_of(size) < 1.25 * (size + HEAD_BYTES) + 4_096
