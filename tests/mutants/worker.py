"""Mutants of the worker's core: what a GPU runs, when, and what the router hears of it."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

_WORKER = "gpu_worker/serve"

_GPUS = ("tests/gpu_worker/serve/test_emulated.py",)
_ENDS = ("tests/gpu_worker/serve/test_ends.py",)

WORKER = (
    # --- running -----------------------------------------------------------------------------
    Mutant(
        "a batch that waited starts when it was received",
        _WORKER,
        "started_ns = max(received_ns, free_ns)",
        "started_ns = received_ns",
        _GPUS,
    ),
    Mutant(
        "a batch starts when the loop looks",
        _WORKER,
        "self._start_next(batch.ended_ns)",
        "self._start_next(now_ns)",
        _GPUS,
    ),
    Mutant(
        "a batch is reported before it ends",
        _WORKER,
        "(batch := self._running) is not None and batch.ended_ns <= now_ns:",
        "(batch := self._running) is not None and batch.ended_ns <= now_ns + 1:",
        _ENDS,
    ),
    Mutant(
        "a batch takes the time of its full size",
        _WORKER,
        "self._profile.latency_ns(directive.subnet, n_run) if n_run else 0",
        "self._profile.latency_ns(directive.subnet, directive.n) if n_run else 0",
        _GPUS,
    ),
    Mutant(
        "the last that came runs first",
        _WORKER,
        "directive, received_ns = self._held.popleft()",
        "directive, received_ns = self._held.pop()",
        _ENDS,
    ),
    Mutant(
        "an idle GPU does not start",
        _WORKER,
        ("        if self._running is None:\n            self._start_next(received_ns)\n"),
        "",
        _GPUS,
    ),
    Mutant(
        "one GPU's end hides another's",
        _WORKER,
        "while self._due and self._due[0][0] <= now_ns:",
        "if self._due and self._due[0][0] <= now_ns:",
        _ENDS,
    ),
    Mutant(
        "a GPU that goes on is not looked at again",
        _WORKER,
        (
            "            reports += gpu.finish_due(now_ns)\n"
            "            if (due_ns := gpu.next_event_ns) is not None:"
        ),
        (
            "            reports += gpu.finish_due(now_ns)\n"
            "            if (due_ns := gpu.next_event_ns) is not None and now_ns < 0:"
        ),
        _GPUS,
    ),
    Mutant(
        "the output names the wrong subnet",
        _WORKER,
        "output = _ROW.pack(directive.subnet)",
        "output = _ROW.pack(0)",
        _ENDS,
    ),
    # --- what the router hears ---------------------------------------------------------------
    Mutant(
        "a running batch takes no credit",
        _WORKER,
        "QueueState(max(0, CAPACITY - 1 - n_held), n_held, 1,",
        "QueueState(max(0, CAPACITY - n_held), n_held, 1,",
        _ENDS,
    ),
    Mutant(
        "a batch that was refused is forgotten",
        _WORKER,
        (
            "self.last_batch = max(self.last_batch, directive.batch_id)\n"
            "        if len(self._held) + 1 >= MAX_OUTSTANDING:\n"
            "            return False\n"
        ),
        (
            "if len(self._held) + 1 >= MAX_OUTSTANDING:\n"
            "            return False\n"
            "        self.last_batch = max(self.last_batch, directive.batch_id)\n"
        ),
        _ENDS,
    ),
    Mutant(
        "a new epoch keeps the old count",
        _WORKER,
        "self._held.clear()\n        self.last_batch = 0",
        "self._held.clear()",
        _GPUS,
    ),
    Mutant(
        "a new epoch keeps what was held",
        _WORKER,
        "self._held.clear()\n        self.last_batch",
        "self.last_batch",
        _GPUS,
    ),
    Mutant(
        "any number of batches is taken",
        _WORKER,
        "if len(self._held) + 1 >= MAX_OUTSTANDING:",
        "if len(self._held) + 1 >= 99 * MAX_OUTSTANDING:",
        _GPUS,
    ),
    Mutant(
        "what waits takes no time",
        _WORKER,
        "return max(0, first_ends_ns - now_ns) + waiting_ns",
        "return max(0, first_ends_ns - now_ns)",
        _GPUS,
    ),
    Mutant(
        "a query whose slack is just used up is run",
        _WORKER,
        "return directive.slack_left_ns() > waited_ns",
        "return directive.slack_left_ns() >= waited_ns",
        _ENDS,
    ),
    Mutant(
        "one expired query is not noticed",
        _WORKER,
        "if directive.least_slack_left_ns() > waited_ns:",
        "if directive.least_slack_left_ns() > -waited_ns:",
        _GPUS,
    ),
    Mutant(
        "a report counts the wait as execution",
        _WORKER,
        "executing_ns=ended_ns - started_ns",
        "executing_ns=ended_ns - received_ns",
        _GPUS,
    ),
    Mutant(
        "a report is of no epoch",
        _WORKER,
        "return EndedBatch(directive.epoch, row,",
        "return EndedBatch(0, row,",
        _ENDS,
    ),
)
