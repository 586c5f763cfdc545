"""Threads that take jobs from a queue and share one client: the shape of a queue's consumer.

    cluster up
    python examples/threaded_worker.py
    cluster down

It takes the cluster of this machine, or the router at an ENDPOINT such as tcp://10.0.0.1:5555.
"""

from __future__ import annotations

import queue
import sys
import threading
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

import superserve
from gpu_worker.models.digits import held_out  # stands in for wherever your jobs come from
from superserve.roles.local import running

if TYPE_CHECKING:
    import numpy.typing as npt

N_THREADS = 8
N_JOBS = 400
SLO_MS = 500


class Job(NamedTuple):
    """An image, float32 (1, 20, 20), and the digit that it shows."""

    image: npt.NDArray[Any]
    digit: int


def work(jobs: queue.Queue[Job | None], ends: queue.SimpleQueue[str], client: superserve.Client) -> None:
    """Serve jobs until there is a None, and say how each ended."""
    while (job := jobs.get()) is not None:
        ends.put(serve(client, job))


def serve(client: superserve.Client, job: Job) -> str:
    """Return "right", "wrong", or why the job has no answer."""
    try:
        reply = client.infer(job.image, slo_ms=SLO_MS)  # other threads' queries travel meanwhile
    except superserve.QueryError as error:
        # Its deadline has passed or cannot be met: to try again at once would help nobody. A job
        # that may wait goes back with jobs.put(job), unless it is an InvalidQueryError: that stays one.
        return type(error).__name__
    return "right" if reply.output.argmax() == job.digit else "wrong"


def main(endpoint: str) -> None:
    """Serve all jobs and print how they ended."""
    jobs: queue.Queue[Job | None] = queue.Queue(maxsize=100)  # bounded: a slow cluster slows its feeder
    ends: queue.SimpleQueue[str] = queue.SimpleQueue()
    images = held_out()
    # One client for all threads: what they have submitted meanwhile goes out as one message.
    with superserve.Client(endpoint) as client:
        threads = [threading.Thread(target=work, args=(jobs, ends, client)) for _ in range(N_THREADS)]
        for thread in threads:
            thread.start()
        for pixels, label in zip(images.pixels[:N_JOBS], images.labels[:N_JOBS], strict=True):
            jobs.put(Job(pixels, int(label)))
        for _ in threads:
            jobs.put(None)  # one each: a thread takes no more after it
        for thread in threads:
            thread.join()
    counts = Counter(ends.get() for _ in range(N_JOBS))
    print(f"{N_JOBS} jobs:", ", ".join(f"{n} {end}" for end, n in counts.most_common()))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else running().client_endpoint)
