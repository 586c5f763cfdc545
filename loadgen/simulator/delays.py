"""What a machine did to a live run's messages, so that a simulation can reproduce it.

A run of `loadgen run --emulate ... --logs FOLDER` leaves the router's event log and those of the
emulated GPUs. All processes of such a run share this machine's monotonic clock, so the logs show for
each message when it was sent and when it was read. `loadgen simulate --like FOLDER` then delays every
message like its neighbours at that moment of the live run, and makes the router's passes at the same
moments, including stalls. So the remaining difference is the simulator's model, not the machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson

from gpu_worker.serve.eventlog import read_log
from loadgen.simulator.links import SimLink, Way
from router.serve.recording import SCHEMA
from superserve.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import numpy.typing as npt

    from loadgen.simulator.links import Trouble
    from loadgen.traces.trace import Trace

    Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Series:
    """How long messages took, by the instant of sending from the start of the trace, shape (n,) each."""

    at_ns: Ints
    way_ns: Ints

    def link(self, start_ns: int, troubles: tuple[Trouble, ...]) -> SimLink:
        """Return a link whose messages take these times, for a trace that begins at `start_ns`."""
        return _PlayedLink(self, start_ns, troubles)


class _PlayedLink(SimLink):
    """A link that takes as long as a live one took at that moment."""

    __slots__ = ("_at_ns", "_place", "_ways_ns")

    def __init__(self, series: Series, start_ns: int, troubles: tuple[Trouble, ...]) -> None:
        super().__init__(Way(0, 0), "", troubles)
        self._at_ns = (series.at_ns + start_ns).tolist()
        self._ways_ns = series.way_ns.tolist()
        self._place = 0

    def way_ns(self, sent_ns: int) -> int:
        at_ns, place = self._at_ns, self._place
        while place + 1 < len(at_ns) and at_ns[place + 1] <= sent_ns:
            place += 1
        self._place = place  # instants of sending never decrease
        ways_ns = self._ways_ns
        # A message that was held up behind another arrives with it; otherwise use its quicker neighbour.
        usual_ns: int = min(ways_ns[place : place + 2])
        held_ns: int = at_ns[place] + ways_ns[place] - sent_ns if at_ns[place] <= sent_ns else 0
        return max(usual_ns, held_ns)


@dataclass(frozen=True, slots=True, eq=False)
class MachineDelays:
    """How long a live run's messages took; instants count from the start of the trace.

    Attributes:
        to_workers: DIRECTIVEs, from the router's decision until a worker's loop read them.
        from_workers: DONEs, from the end of a batch until the router read its report.
        to_clients: RESULTS: as long as QUERIES took at that moment, because no log has them.
        sent_ns: When each query was sent, shape (n,).
        read_ns: When the router read it, shape (n,); -1 if it did not.
        passes_ns: When the router's loop made a pass, ascending.
    """

    to_workers: Series
    from_workers: Series
    to_clients: Series
    sent_ns: Ints
    read_ns: Ints
    passes_ns: Ints


def load_machine(folder: Path, trace: Trace) -> MachineDelays:
    """Read the delays of a live run of `trace`, with one sender, from its folder of logs.

    Raises:
        ConfigError: The logs are missing, malformed, or belong to another run.
    """
    path = folder / "router.jsonl"
    queries, dispatched, finished, passes = _router_log(path)
    if not queries or not finished:
        raise ConfigError(f"{path}: expected the log of a run in which queries were answered")
    sent = np.array([entry[0] for entry in queries], np.int64)
    read = np.array([entry[1] for entry in queries], np.int64)
    firsts = np.array([entry[2] for entry in queries], np.int64)
    counts = np.array([entry[3] for entry in queries], np.int64)
    if int(counts.sum()) > trace.n or int((firsts + counts).max()) > trace.n:
        raise ConfigError(
            f"{path}: expected at most the {trace.n} queries of {trace.name}, from one sender, "
            f"got {int(counts.sum())}"
        )
    # The sender is never early, and sometimes on time: that gives the start of the trace.
    start_ns = int((sent - trace.due_ns[firsts]).min())
    sent_ns, read_ns = np.full(trace.n, -1, np.int64), np.full(trace.n, -1, np.int64)
    places = np.repeat(firsts - np.cumsum(counts) + counts, counts) + np.arange(int(counts.sum()))
    sent_ns[places] = np.repeat(sent, counts) - start_ns
    read_ns[places] = np.repeat(read, counts) - start_ns
    ends = _gpu_logs(folder)
    there, back = _worker_ways(dispatched, finished, ends)
    return MachineDelays(
        _series(there, start_ns), _series(back, start_ns),
        _series(np.stack([sent, read - sent], axis=1), start_ns), sent_ns, read_ns,
        np.array(passes, np.int64) - start_ns,
    )  # fmt: skip


def _series(pairs: Ints, start_ns: int) -> Series:
    ordered = pairs[np.argsort(pairs[:, 0], kind="stable")]
    return Series(ordered[:, 0] - start_ns, np.maximum(0, ordered[:, 1]))


def _router_log(
    path: Path,
) -> tuple[list[tuple[int, int, int, int]], dict[int, int], dict[int, tuple[int, int]], list[int]]:
    """Return the contents of the router's log.

    Messages (sent, read, first id, n), dispatches by batch, reports (read, waited) by batch, and passes.
    """
    passes: list[int] = []
    queries: list[tuple[int, int, int, int]] = []
    dispatched: dict[int, int] = {}
    finished: dict[int, tuple[int, int]] = {}
    try:
        for now_ns, name, body in _lines(path):
            if name == "advance":
                passes.append(now_ns)
                dispatched |= {batch[0]: now_ns for batch in body}
            elif name == "Finished":
                finished |= {row["batch_id"]: (now_ns, row["waited_ns"]) for row in body["message"]["rows"]}
            elif name == "QueriesArrived":
                message = body["queries"]
                first = int.from_bytes(bytes.fromhex(message["ids"][:16]), "little")
                queries.append((message["sent_ns"], now_ns, first, message["n"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: expected a router's event log: {error!r}") from error
    return queries, dispatched, finished, passes


def _lines(path: Path) -> Iterator[tuple[int, str, Any]]:
    try:
        with path.open("rb") as file:
            header = orjson.loads(next(file, b"null"))
            if not isinstance(header, dict) or header.get("schema") != SCHEMA:
                raise ConfigError(f"{path}: expected a router's event log of schema {SCHEMA}")
            for line in file:
                now_ns, name, body = orjson.loads(line)
                yield now_ns, name, body
    except OSError as error:
        raise ConfigError(f"{path}: expected a readable event log: {error.strerror}") from error


def _gpu_logs(folder: Path) -> dict[int, tuple[int, int]]:
    """Return when each batch started and ended, from the logs of all emulated GPUs."""
    found: dict[int, tuple[int, int]] = {}
    for path in sorted(folder.glob("gpus-*.log")):
        _, records = read_log(path)
        starts, ends = records["started_ns"].tolist(), records["ended_ns"].tolist()
        found |= dict(zip(records["batch_id"].tolist(), zip(starts, ends, strict=True), strict=True))
    if not found:
        raise ConfigError(f"{folder}: expected event logs of emulated GPUs, gpus-*.log, with batches")
    return found


def _worker_ways(
    dispatched: dict[int, int], finished: dict[int, tuple[int, int]], ends: dict[int, tuple[int, int]]
) -> tuple[Ints, Ints]:
    """Return (sent, taken) of each DIRECTIVE and of each DONE, shape (n, 2) each."""
    known = [batch for batch in finished if batch in dispatched and batch in ends]
    if not known:
        raise ConfigError("the logs of the router and of the GPUs have no batch in common")
    there, back = [], []
    for batch in known:
        read_ns, waited_ns = finished[batch]
        started_ns, ended_ns = ends[batch]
        there.append((dispatched[batch], started_ns - waited_ns - dispatched[batch]))
        back.append((ended_ns, read_ns - ended_ns))
    return np.array(there, np.int64), np.array(back, np.int64)
