"""A program that offers queries at a steady rate, watches the fleet, and prints how all of it went, as JSON.

    python -m tests.cluster.upgrades.load tcp://10.77.0.1:5555 --rate 900 --n 100000

It says "begun" after the first answer. It ends after N queries, but not before SIGINT: what happens to the
fleet meanwhile decides how long it takes.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
import time
from collections import Counter, deque
from typing import Any

import superserve
from superserve.errors import SuperServeError
from superserve.net.connection import ask_status

SLO_MS = 1_000.0
_TICK_S = 0.01
_LOOK_S = 0.1
_SHOWN = 5  # failures, of the first and of the last
_FIRST_SLO_MS = 60_000.0


class Fleet:
    """What the router says about the fleet, several times a second, in a thread of its own.

    Args:
        endpoint: The router's.

    Attributes:
        changes: When the number of workers that take work changed, and to what: [unix seconds, n].
    """

    def __init__(self, endpoint: str) -> None:
        self.changes: list[list[float]] = []
        self._endpoint = endpoint
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._is_over.set()
        self._thread.join()

    def _watch(self) -> None:
        last = -1
        while not self._is_over.wait(_LOOK_S):
            try:
                n = ask_status(self._endpoint, 2.0).workers_ready
            except SuperServeError:
                n = 0
            if n != last:
                last = n
                self.changes.append([time.time(), n])


def offer(client: superserve.Client, rate: float, n: int, stop: threading.Event) -> dict[str, Any]:
    """Offer queries; return how many ended how, and the latencies of those that were answered."""
    futures: deque[Any] = deque()
    ends: Counter[str] = Counter()
    took_ms: list[float] = []
    failures: list[list[Any]] = []

    def harvest(*, everything: bool) -> None:
        while futures and (everything or futures[0].done()):
            future = futures.popleft()
            try:
                reply = future.result()
                ends["late" if reply.is_late else "ok"] += 1
                took_ms.append(reply.latency_ms)
            except superserve.QueryError as error:
                ends[type(error).__name__] += 1
                failures.append([round(time.time(), 1), str(error)])

    payload = bytes(64)
    began_s = time.monotonic()
    sent = 0
    while sent < n or not stop.is_set():
        due = int((time.monotonic() - began_s) * rate)
        for _ in range(min(due - sent, 2_000)):
            futures.append(client.submit(payload, slo_ms=SLO_MS))
            sent += 1
        harvest(everything=False)
        time.sleep(_TICK_S)
    harvest(everything=True)
    took_ms.sort()
    quantiles = {f"p{q}": round(took_ms[min(len(took_ms) - 1, len(took_ms) * q // 100)], 1) for q in (50, 99)}
    return {
        "sent": sent,
        "ends": dict(ends),
        "seconds": round(time.monotonic() - began_s, 1),
        "ms": quantiles,
        "failures": failures[:_SHOWN] + failures[_SHOWN:][-_SHOWN:],
    }


def main() -> None:
    """Parse the command line, offer, and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("endpoint")
    parser.add_argument("--rate", type=float, required=True)
    parser.add_argument("--n", type=int, required=True)
    asked = parser.parse_args()
    stop = threading.Event()
    signal.signal(signal.SIGINT, lambda *_: stop.set())
    with superserve.Client(asked.endpoint) as client:
        client.infer(bytes(64), slo_ms=_FIRST_SLO_MS)
        sys.stdout.write("begun\n")
        sys.stdout.flush()
        fleet = Fleet(asked.endpoint)
        found = offer(client, asked.rate, asked.n, stop)
        fleet.stop()
    sys.stdout.write(json.dumps({**found, "fleet": fleet.changes}) + "\n")


if __name__ == "__main__":
    main()
