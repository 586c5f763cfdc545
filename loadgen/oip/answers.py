"""What an answer of the protocol says, entered in the records of a sender."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import orjson

from loadgen.oip.model import DTYPES
from superserve.wire import Status

if TYPE_CHECKING:
    from loadgen.live.records import Records

OF_HTTP = {
    400: Status.INVALID, 404: Status.INVALID, 408: Status.EXPIRED, 413: Status.INVALID,
    429: Status.OVERLOADED,
    499: Status.CANCELLED, 500: Status.FAILED, 502: Status.WORKER_LOST, 503: Status.OVERLOADED,
    504: Status.EXPIRED,
}  # fmt: skip
"""How a query ended, by HTTP's status; any other is FAILED."""
OF_GRPC = {
    "INVALID_ARGUMENT": Status.INVALID, "NOT_FOUND": Status.INVALID, "DEADLINE_EXCEEDED": Status.EXPIRED,
    "UNAVAILABLE": Status.OVERLOADED, "RESOURCE_EXHAUSTED": Status.OVERLOADED, "CANCELLED": Status.CANCELLED,
}  # fmt: skip
"""How a query ended, by gRPC's code; any other is FAILED."""


class AnswerBook:
    """Enters answers in the records; one for each query.

    Args:
        records: The sender's.
        subnets: Those known before the run; others are added as they are seen.
        keep_outputs: Whether outputs are kept.
    """

    def __init__(
        self, records: Records, subnets: tuple[tuple[str, float], ...], *, keep_outputs: bool
    ) -> None:
        self.records = records
        self.subnets = list(subnets)
        self._rows = {name: row for row, (name, _) in enumerate(self.subnets)}
        self._keep_outputs = keep_outputs

    def failed(self, i: int, status: Status, reason: str, now_ns: int) -> None:
        """Enter an answer without an output."""
        if not self._is_first(i, status, now_ns):
            return
        self.records.reasons.setdefault(status.name, reason[:500])

    def lost(self, i: int, reason: str) -> None:
        """Note why a query has no answer; it stays unanswered in the records."""
        self.records.n_answered += 1  # nothing more is awaited
        self.records.reasons.setdefault("UNANSWERED", reason[:500])
        del i

    def answered(self, i: int, parameters: dict[str, Any], output: Any, now_ns: int) -> None:
        """Enter an answer with its output.

        Args:
            i: The query.
            parameters: How it was served, if the target reports it.
            output: Raw bytes.
            now_ns: When the answer was complete.
        """
        if not self._is_first(i, Status.OK, now_ns):
            return
        records = self.records
        accuracy = parameters.get("accuracy")
        records.accuracy[i] = float("nan") if accuracy is None else float(accuracy)
        records.subnet[i] = self._row(str(parameters.get("subnet", "")), records.accuracy[i])
        records.batch_size[i] = int(parameters.get("batch_size", 1))
        records.queued_ns[i] = 1_000 * int(parameters.get("queued_us", 0))
        records.executing_ns[i] = 1_000 * int(parameters.get("executing_us", 0))
        if self._keep_outputs:
            row = np.frombuffer(output, np.uint8)
            if records.outputs is None:
                records.outputs = np.zeros((len(records.status), len(row)), np.uint8)
            records.outputs[i] = row

    def _is_first(self, i: int, status: Status, now_ns: int) -> bool:
        records = self.records
        if records.answered_ns[i] >= 0:
            records.n_duplicates += 1
            return False
        records.n_answered += 1
        records.answered_ns[i] = now_ns
        records.status[i] = status
        return True

    def _row(self, name: str, accuracy: float) -> int:
        row = self._rows.get(name)
        if row is None:
            row = self._rows[name] = len(self.subnets)
            self.subnets.append((name, 0.0 if accuracy != accuracy else accuracy))
        return row


def read_http(status: int, headers: dict[str, str], body: bytes) -> tuple[dict[str, Any], Any, str]:
    """Return an HTTP answer's parameters, its first output's raw bytes, and its error."""
    if status != 200:
        try:
            return {}, b"", str(orjson.loads(body)["error"])
        except (orjson.JSONDecodeError, KeyError, TypeError):
            return {}, b"", f"HTTP {status}: {body[:200]!r}"
    length = headers.get("inference-header-content-length")
    split = len(body) if length is None else int(length)
    document = orjson.loads(body[:split])
    output = document["outputs"][0]
    raw: Any = body[split:]
    if "data" in output:
        raw = np.asarray(output["data"], DTYPES.get(output["datatype"], "uint8")).tobytes()
    return document.get("parameters") or {}, raw, ""
