"""A program that offers queries until SIGINT, and prints how all of them ended, as JSON.

    python -m tests.e2e.steady tcp://10.77.0.1:5555 [SLO_MS]

`loadgen run` measures; this only counts, and so it need not wait for a quiet machine before it begins.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections import Counter

import superserve

RATE_QPS = 100
SLO_MS = "10000"  # no noise takes that long: what fails then has failed


def main(endpoint: str, slo_ms: str = SLO_MS) -> None:
    """Say "begun" after the first answer; then offer `RATE_QPS`."""
    stop = threading.Event()
    signal.signal(signal.SIGINT, lambda *_: stop.set())
    payload = bytes(64)
    with superserve.Client(endpoint) as client:
        client.infer(payload, slo_ms=float(SLO_MS))
        sys.stdout.write("begun\n")
        sys.stdout.flush()
        futures = []
        while not stop.wait(1 / RATE_QPS):
            futures.append(client.submit(payload, slo_ms=float(slo_ms)))
        ends = Counter(ok=1)
        for future in futures:
            try:
                future.result()
                ends["ok"] += 1
            except superserve.QueryError as error:
                ends[f"{type(error).__name__}: {error}"] += 1
    sys.stdout.write(json.dumps(ends) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
