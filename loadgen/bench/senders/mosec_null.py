"""The other reference: mosec, serving a model that gives every query back, in batches of up to 16.

Run by a Python that has mosec, which this project does not depend on; so it imports nothing of this project.
"""

from __future__ import annotations

import ctypes
import signal

from mosec import Server, Worker  # type: ignore[import-not-found]  # see above


class Null(Worker):  # type: ignore[misc]  # see above
    """Gives back what it gets."""

    def deserialize(self, data: bytes) -> bytes:
        """Return the query as it is."""
        return data

    def serialize(self, data: bytes) -> bytes:
        """Return the answer as it is."""
        return data

    def forward(self, data: list[bytes]) -> list[bytes]:
        """Return the batch as it is."""
        return data


_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>

if __name__ == "__main__":
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)  # end with the process that started it
    server = Server()
    server.append_worker(Null, num=1, max_batch_size=16, max_wait_time=1)
    server.run()
