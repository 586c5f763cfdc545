"""Mutants of the worker's core: what a GPU runs, when, and what the router hears of it."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

_CORE = "gpu_worker/core"
_SERVE = "gpu_worker/serve/emulated.py"

_GPUS = ("tests/gpu_worker/serve/test_emulated.py",)
_ENDS = ("tests/gpu_worker/serve/test_ends.py",)

WORKER = (
    # --- running -----------------------------------------------------------------------------
    Mutant(
        "a batch that waited starts when it was received",
        _CORE,
        "            batch.started_ns = ended_ns\n",
        "            pass\n",
        _GPUS,
    ),
    Mutant("a batch starts when the loop looks", _CORE, "queue.end(ends_ns)", "queue.end(now_ns)", _GPUS),
    Mutant(
        "a batch is reported before it ends",
        _CORE,
        "and self.ends_ns <= now_ns:",
        "and self.ends_ns <= now_ns + 1:",
        _ENDS,
    ),
    Mutant(
        "a batch takes the time of its full size",
        _CORE,
        "self.profile.latency_ns(order.subnet, outcome.n_run) *",
        "self.profile.latency_ns(order.subnet, order.n) *",
        _GPUS,
    ),
    Mutant("the last that came runs first", _CORE, "self._waiting.popleft()", "self._waiting.pop()", _ENDS),
    Mutant(
        "one GPU's end hides another's",
        _CORE,
        "while due and due[0][0] <= now_ns:",
        "if due and due[0][0] <= now_ns:",
        _ENDS,
    ),
    Mutant(
        "a GPU that goes on is not looked at again",
        _CORE,
        ("            if gpu.queue.running is not None:\n                heappush(due,"),
        ("            if gpu.queue.running is not None and now_ns < 0:\n                heappush(due,"),
        _GPUS,
    ),
    Mutant(
        "the output names the wrong subnet",
        _SERVE,
        "output = _ROW.pack(directive.subnet)",
        "output = _ROW.pack(0)",
        _ENDS,
    ),
    # --- what the router hears ---------------------------------------------------------------
    Mutant(
        "a running batch takes no credit",
        _CORE,
        "credit = max(0, CAPACITY - 1 - n_held)",
        "credit = max(0, CAPACITY - n_held)",
        _ENDS,
    ),
    Mutant(
        "a batch that was refused is forgotten",
        _CORE,
        (
            "        elif order.batch_id > self.last_batch:\n"
            "            self.last_batch = order.batch_id\n"
            "        if len(self._waiting) + 1 >= MAX_OUTSTANDING:\n"
            "            return None\n"
        ),
        (
            "        if len(self._waiting) + 1 >= MAX_OUTSTANDING:\n"
            "            return None\n"
            "        if source == OWN and order.batch_id > self.last_batch:\n"
            "            self.last_batch = order.batch_id\n"
        ),
        _ENDS,
    ),
    Mutant(
        "a new epoch keeps the old count",
        _CORE,
        "            self.last_batch = 0\n        else:",
        "            pass\n        else:",
        _GPUS,
    ),
    Mutant("a new epoch keeps what was held", _CORE, "self._waiting = deque(kept)", "pass", _GPUS),
    Mutant(
        "a batch of an old epoch is told to the new router",
        _CORE,
        "self.running.is_given_up = True",
        "self.running.is_given_up = False",
        _ENDS,
    ),
    Mutant(
        "any number of batches is taken",
        _CORE,
        "if len(self._waiting) + 1 >= MAX_OUTSTANDING:",
        "if len(self._waiting) + 1 >= 99 * MAX_OUTSTANDING:",
        _GPUS,
    ),
    Mutant(
        "a batch runs since it came",
        _CORE,
        "max(0, now_ns - running.started_ns)",
        "max(0, now_ns - running.received_ns)",
        _ENDS,
    ),
    Mutant(
        "a query whose slack is just used up is run",
        _CORE,
        "return directive.slack_left_ns() > waited_ns",
        "return directive.slack_left_ns() >= waited_ns",
        _ENDS,
    ),
    Mutant(
        "one expired query is not noticed",
        _CORE,
        "if directive.least_slack_left_ns() > waited_ns:",
        "if directive.least_slack_left_ns() > -waited_ns:",
        _GPUS,
    ),
    Mutant(
        "a report counts the wait as execution",
        _CORE,
        "        ended_ns - started_ns, report.last_batch,",
        "        ended_ns - received_ns, report.last_batch,",
        _GPUS,
    ),
    Mutant(
        "what an older epoch began is reported to the new router",
        _CORE,
        "None if batch.is_given_up else order.epoch",
        "order.epoch",
        _ENDS,
    ),
)
