"""Mutants of lending: the worker's credits that move to other routers, and what routers make of them."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

_LENDING = "gpu_worker/core/lending.py"
_QUEUE = "gpu_worker/core/queue.py"
_FLEET = "router/core/fleet.py"
_WORKERS = "router/core/workers.py"
_PRICE = "router/core/price.py"

_LENT = ("tests/gpu_worker/test_lending.py",)
_PRICED = ("tests/router/core/test_price.py",)

LENDING = (
    Mutant(
        "any PONG answers a recall",
        _LENDING,
        "if credit.state is _RECALLING and credit.stamp_ns == pong.stamp_ns:",
        "if credit.state is _RECALLING:",
        _LENT,
    ),
    Mutant(
        "a recalled credit is still offered",
        _LENDING,
        "return self._credits[slot].state is not _OWN",
        "return False",
        _LENT,
    ),
    Mutant(
        "a guest says HELLO as one of the router's own", _LENDING, '"guest": True}', '"guest": False}', _LENT
    ),
    Mutant(
        "a lent batch is never reported",
        _LENDING,
        "self._said.append((visit.router, Done(batch.epoch, [row])))",
        "pass",
        _LENT,
    ),
    Mutant(
        "a lent batch is reported to the own router",
        _LENDING,
        "self._said.append((visit.router, Done(batch.epoch, [row])))",
        "self._said.append((self._own or 0, Done(batch.epoch, [row])))",
        _LENT,
    ),
    Mutant(
        "an unused credit stays where it is",
        _LENDING,
        "elif waited_ns >= UNUSED_NS + 2 * visit.way_ns or is_too_many:",
        "elif is_too_many and waited_ns < 0:",
        _LENT,
    ),
    Mutant(
        "a withdrawn credit comes back at once",
        _LENDING,
        "self._ask(visit, slot, 0, credit, now_ns)",
        "self._give_back(slot, credit, now_ns)",
        _LENT,
    ),
    Mutant(
        "a batch without credit is run",
        _LENDING,
        "credit.visit is not visit or credit.state not in (_LENT, _WITHDRAWING):",
        "False:",
        _LENT,
    ),
    Mutant(
        "a batch of an earlier visit is run",
        _LENDING,
        "elif visit is None or visit.epoch != message.epoch:",
        "elif visit is None:",
        _LENT,
    ),
    Mutant(
        "a silent router keeps a credit",
        _LENDING,
        "elif credit.state is _WITHDRAWING and waited_ns >= ANSWER_NS:",
        "elif credit.state is _WITHDRAWING and waited_ns < 0:",
        _LENT,
    ),
    Mutant(
        "a recall waits for ever",
        _LENDING,
        "if credit.state is _RECALLING and waited_ns >= ANSWER_NS:",
        "if credit.state is _RECALLING and waited_ns < 0:",
        _LENT,
    ),
    Mutant(
        "a little more is reason enough to lend",
        _LENDING,
        "price >= max(settings.least_price, settings.dearer * own)",
        "price >= own",
        _LENT,
    ),
    Mutant(
        "everything is lent in one step", _LENDING, "visit.share + n * step))", "visit.share + n))", _LENT
    ),
    Mutant(
        "visits never end",
        _LENDING,
        "or (now_ns - visit.lent_ns > STAY_NS and not self._has_lent(visit)):",
        "or False:",
        _LENT,
    ),
    Mutant("what one router loses is dropped for both", _QUEUE, "if batch.source == source]", "]", _LENT),
    Mutant(
        "a guest's GPU counts always",
        _FLEET,
        "worker.credit > 0 or bool(worker.outstanding) if worker.peer.is_guest",
        "True if worker.peer.is_guest",
        _PRICED,
    ),
    Mutant("a GPU that is lent still counts", _FLEET, "else not worker.is_away", "else True", _PRICED),
    Mutant(
        "another router's batch is nothing to wait for",
        _WORKERS,
        "if not row.running_batch and row.running_for_ns < 0 else 0",
        "if False else 0",
        _PRICED,
    ),
    Mutant(
        "GPUs make no difference to the price", _PRICE, "need * cost_ns / n_gpus", "need * cost_ns", _PRICED
    ),
    Mutant("a router without GPUs asks for nothing", _PRICE, "return HIGHEST_PRICE", "return 0.0", _PRICED),
)
