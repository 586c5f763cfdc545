"""What the senders share that make a call for each query."""

from __future__ import annotations

import abc
import time
from typing import TYPE_CHECKING

from loadgen.live.sender import SenderTarget
from superserve.clock import MS

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


class SingleTarget(SenderTarget):
    """What the targets share that send each query by its own call."""

    at_once = 128
    idle_ns = MS

    @abc.abstractmethod
    def send_one(self, i: int, slack_ns: int) -> bool:
        """Send query `i`; False if it was refused."""

    @abc.abstractmethod
    def answered_ns(self) -> list[int]:
        """Return when each query's answer came; -1 where none did."""

    def send(self, lo: int, slacks_ns: npt.NDArray[np.int64], now_ns: int) -> int:
        """Send the queries one by one; return how many were taken."""
        taken = [i for i, slack_ns in enumerate(slacks_ns.tolist(), lo) if self.send_one(i, slack_ns)]
        self.records.sent_ns[taken] = now_ns
        return len(taken)

    def settle(self) -> None:
        """Enter the instants of the answers: these rows use nothing else of them."""
        self.records.answered_ns[:] = self.answered_ns()

    def wait(self, duration_ns: int) -> None:
        """Sleep; a sender that wakes for each query also wakes for answers."""
        if self.plan.least_sleep_ns:
            time.sleep(duration_ns / 1e9)
        else:
            self.wait_for_answers(duration_ns)

    def wait_for_answers(self, duration_ns: int) -> None:
        """Wait until an answer has come; sleep if another thread receives them."""
        time.sleep(duration_ns / 1e9)
