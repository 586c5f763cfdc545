"""Faults of a simulation: what goes wrong, where, when and for how long; from a seed or a file.

A fault file is JSON, instants and durations in milliseconds from the start of the trace:

    {"schema": 1, "faults": [
        {"kind": "slow", "at_ms": 500, "peer": "worker:0", "slot": 1, "factor": 1.3, "for_ms": 2000},
        {"kind": "kill", "at_ms": 800, "peer": "worker:1"},
        {"kind": "loss", "at_ms": 900, "peer": "client:0", "share": 0.1, "for_ms": 50}
    ]}

    kind       meaning                                                      fields besides at_ms and peer
    kill       a worker process ends; the router's next send to it fails
    vanish     the same, but no send fails: a host that lost its power
    drain      a worker process gets no more work, and ends when it holds none
    revive     a worker process that has ended starts again, under its old name
    freeze     a worker process stops; its GPUs continue with what they hold   for_ms
    slow       GPUs take `factor` times what their profile says             factor, for_ms?, slot?
    delay      messages take `delay_ms` more                                delay_ms, for_ms
    jitter     messages take up to `jitter_ms` more, each its own           jitter_ms, for_ms
    loss       this share of the messages is lost                           share, for_ms
    duplicate  this share of the messages arrives twice                     share, for_ms
    partition  nothing arrives; what was sent does when it ends             for_ms

A peer is `worker:<process>` or `client:<number>`, from 0. Trouble on the way concerns both
directions. Within one direction of one connection messages keep their order, because TCP does.
Delays of one peer make its messages arrive after later ones of another; there is no other
reordering.
"""

from __future__ import annotations

import difflib
import math
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson

from loadgen.simulator.links import FAR_NS, Trouble
from superserve.clock import MS
from superserve.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from loadgen.simulator.world import Simulation

SCHEMA = 1
"""Version of the fault file."""

MAX_FAULTS = 100_000
"""Most faults in one file."""

# The fields of each kind besides `at_ms` and `peer`; "?" marks optional ones.
_FIELDS: dict[str, tuple[str, ...]] = {
    "kill": (),
    "vanish": (),
    "drain": (),
    "revive": (),
    "freeze": ("for_ms",),
    "slow": ("factor", "for_ms?", "slot?"),
    "delay": ("delay_ms", "for_ms"),
    "jitter": ("jitter_ms", "for_ms"),
    "loss": ("share", "for_ms"),
    "duplicate": ("share", "for_ms"),
    "partition": ("for_ms",),
}

# Least and most of each number.
_RANGES: dict[str, tuple[float, float]] = {
    "at_ms": (0, 86_400_000),
    "for_ms": (0.001, 86_400_000),
    "delay_ms": (0, 60_000),
    "jitter_ms": (0, 60_000),
    "share": (0, 1),
    "factor": (0.01, 1_000),
    "slot": (0, 4_095),
}

_OF_WORKERS = ("kill", "vanish", "drain", "revive", "freeze", "slow")
"""Kinds that affect a process, not a connection."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong; see the module's docstring for what each kind means.

    Attributes:
        kind: One of the table's.
        at_ns: When, from the start of the trace.
        peer: The peer that it affects: `worker:<process>` or `client:<number>`.
        for_ns: How long; None until the end.
        amount: The kind's number: ns of delay or jitter, a share, or a factor.
        slot: Which GPU of the process is slow; None means all of them.

    Raises:
        ConfigError: A field is not what its kind needs.
    """

    kind: str
    at_ns: int
    peer: str
    for_ns: int | None = None
    amount: float = 0.0
    slot: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in _FIELDS:
            raise ConfigError(f"kind: expected one of {', '.join(_FIELDS)}, got {self.kind!r}")
        role, _, number = self.peer.partition(":")
        if role not in ("worker", "client") or not (number.isascii() and number.isdecimal()):
            raise ConfigError(f"peer: expected worker:<number> or client:<number>, got {self.peer!r}")
        if role == "client" and self.kind in _OF_WORKERS:
            raise ConfigError(f"peer: {self.kind} befalls worker processes, got {self.peer!r}")
        if self.for_ns is None and "for_ms" in _FIELDS[self.kind]:
            raise ConfigError(f"for_ms: {self.kind} ends some time: expected a duration")

    @property
    def number(self) -> int:
        """The number of the process or client that it affects."""
        return int(self.peer.partition(":")[2])

    def check(self, n_gpus: Sequence[int], n_clients: int) -> None:
        """Raise ConfigError unless its peer, and its GPU there, exists.

        Args:
            n_gpus: Of each worker process.
            n_clients: How many clients there are.
        """
        where = f"fault {self.kind} at {self.at_ns / MS:g} ms"
        role = self.peer.partition(":")[0]
        n = len(n_gpus) if role == "worker" else n_clients
        if self.number >= n:
            raise ConfigError(f"{where}: peer: expected {role}:0 to {role}:{n - 1}, got {self.peer}")
        if self.slot is not None and self.slot >= n_gpus[self.number]:
            raise ConfigError(
                f"{where}: slot: {self.peer} has slots 0 to {n_gpus[self.number] - 1}, got {self.slot}"
            )

    def trouble(self, start_ns: int) -> Trouble | None:
        """Return its window of trouble for a connection; None if it affects a process."""
        make = _TROUBLES.get(self.kind)
        if make is None:
            return None
        from_ns = start_ns + self.at_ns
        return make(from_ns, FAR_NS if self.for_ns is None else from_ns + self.for_ns, self.amount)

    def strike(self, simulation: Simulation, now_ns: int) -> None:
        """Apply it to a process."""
        _STRIKES[self.kind](self, simulation, now_ns)

    def to_dict(self) -> dict[str, Any]:
        """Return the fault in the form of its file."""
        found: dict[str, Any] = {"kind": self.kind, "at_ms": self.at_ns / MS, "peer": self.peer}
        for field in _FIELDS[self.kind]:
            name = field.removesuffix("?")
            value = self._field(name)
            if value is not None:
                found[name] = value
        return found

    def _field(self, name: str) -> float | None:
        if name == "for_ms":
            return None if self.for_ns is None else self.for_ns / MS
        if name == "slot":
            return self.slot
        return self.amount / MS if name.endswith("_ms") else self.amount


_TROUBLES: dict[str, Callable[[int, int, float], Trouble]] = {
    "delay": lambda lo, hi, amount: Trouble(lo, hi, delay_ns=int(amount)),
    "jitter": lambda lo, hi, amount: Trouble(lo, hi, jitter_ns=int(amount)),
    "loss": lambda lo, hi, amount: Trouble(lo, hi, loss=amount),
    "duplicate": lambda lo, hi, amount: Trouble(lo, hi, doubled=amount),
    "partition": lambda lo, hi, _: Trouble(lo, hi, is_cut=True),
}


def _slow(fault: Fault, simulation: Simulation, now_ns: int) -> None:
    simulation.slow(fault.number, fault.amount, fault.slot)
    if fault.for_ns is not None:
        ends_ns = now_ns + fault.for_ns
        simulation.later(ends_ns, lambda _: simulation.slow(fault.number, 1.0, fault.slot))


def _freeze(fault: Fault, simulation: Simulation, now_ns: int) -> None:
    assert fault.for_ns is not None, "a freeze without an end was refused"
    simulation.freeze(fault.number, now_ns, fault.for_ns)


_STRIKES: dict[str, Callable[[Fault, Simulation, int], None]] = {
    "kill": lambda fault, simulation, now_ns: simulation.kill(fault.number, now_ns, silently=False),
    "vanish": lambda fault, simulation, now_ns: simulation.kill(fault.number, now_ns, silently=True),
    "drain": lambda fault, simulation, now_ns: simulation.drain(fault.number, now_ns),
    "revive": lambda fault, simulation, now_ns: simulation.revive(fault.number, now_ns),
    "freeze": _freeze,
    "slow": _slow,
}


# --- files ------------------------------------------------------------------------------------


def load_faults(path: Path) -> tuple[Fault, ...]:
    """Read a fault file.

    Raises:
        ConfigError: It is malformed; the error names the file, the fault and the field.
    """
    try:
        data = orjson.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: expected a readable fault file: {error.strerror}") from error
    except orjson.JSONDecodeError as error:
        raise ConfigError(f"{path}: expected JSON: {error}") from error
    if not isinstance(data, dict) or data.get("schema") != SCHEMA or isinstance(data["schema"], bool):
        raise ConfigError(f'{path}: expected an object with "schema": {SCHEMA} and "faults"')
    found = data.get("faults")
    if not isinstance(found, list) or len(found) > MAX_FAULTS:
        raise ConfigError(f"{path}: faults: expected a list of at most {MAX_FAULTS}")
    if unknown := sorted(set(data) - {"schema", "faults"}):
        raise ConfigError(f"{path}: unknown key {unknown[0]!r}: expected schema and faults")
    return tuple(_fault(one, f"{path}: faults[{i}]") for i, one in enumerate(found))


def faults_json(faults: Sequence[Fault]) -> str:
    """Return the text of a fault file."""
    body = {"schema": SCHEMA, "faults": [fault.to_dict() for fault in faults]}
    return orjson.dumps(body, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE).decode()


def _fault(data: Any, where: str) -> Fault:
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: expected an object, got {type(data).__name__}")
    kind = data.get("kind")
    if kind not in _FIELDS:
        raise ConfigError(f"{where}: kind: expected one of {', '.join(_FIELDS)}, got {kind!r}{_near(kind)}")
    own = _FIELDS[kind]
    known = ("kind", "at_ms", "peer", *(name.removesuffix("?") for name in own))
    for key in data:
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key!r}: {kind} has {', '.join(known)}")
    for name in ("at_ms", "peer", *own):
        if not name.endswith("?") and name not in data:
            raise ConfigError(f"{where}: {name}: missing")
    numbers = {name: _number(data[name], name, where) for name in known[3:] if name in data}
    slot = numbers.pop("slot", None)
    for_ms = numbers.pop("for_ms", None)
    amount = 0.0
    for name, value in numbers.items():  # the kind's own
        amount = float(round(value * MS)) if name.endswith("_ms") else value
    if slot is not None and slot != int(slot):
        raise ConfigError(f"{where}: slot: expected a whole number, got {slot}")
    peer = data["peer"]
    if not isinstance(peer, str):
        raise ConfigError(f"{where}: peer: expected a string, got {peer!r}")
    try:
        return Fault(
            kind, round(_number(data["at_ms"], "at_ms", where) * MS), peer,
            None if for_ms is None else round(for_ms * MS), amount, None if slot is None else int(slot),
        )  # fmt: skip
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _number(value: Any, name: str, where: str) -> float:
    least, most = _RANGES[name]
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or not least <= value <= most:
        raise ConfigError(f"{where}: {name}: expected a number from {least:g} to {most:g}, got {value!r}")
    return float(value)


def _near(word: Any) -> str:
    matches = difflib.get_close_matches(str(word), _FIELDS, n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""


# --- seeds ------------------------------------------------------------------------------------


def draw_faults(
    seed: int, *, n_processes: int, n_clients: int, duration_ns: int, n_faults: int | None = None
) -> tuple[Fault, ...]:
    """Return the faults of a seed: by default one to six, of any kind, within the duration.

    A process that has ended is usually revived later, sometimes with a slow connection.
    """
    rng = random.Random(f"{seed}/faults")
    faults: list[Fault] = []
    for _ in range(rng.randint(1, 6) if n_faults is None else n_faults):
        kind = rng.choice([name for name in _FIELDS if name != "revive"])
        at_ns = rng.randrange(duration_ns)
        is_worker = kind in _OF_WORKERS or rng.random() < 0.7
        peer = f"worker:{rng.randrange(n_processes)}" if is_worker else f"client:{rng.randrange(n_clients)}"
        for_ns = int(10 ** rng.uniform(0.5, 3.2) * MS)
        faults.append(_drawn(rng, kind, at_ns, peer, for_ns))
        if kind in ("kill", "vanish", "drain") and rng.random() < 0.7:
            faults.append(Fault("revive", at_ns + for_ns, peer))
            if rng.random() < 0.4:
                # With such a slow connection it sends HELLO twice before a WELCOME, and so uses an old epoch.
                slow_ns = rng.randrange(150, 450) * MS
                faults.append(Fault("delay", at_ns + for_ns, peer, 300 * MS, slow_ns))
    return tuple(sorted(faults, key=lambda fault: (fault.at_ns, fault.peer, fault.kind)))


def _drawn(rng: random.Random, kind: str, at_ns: int, peer: str, for_ns: int) -> Fault:
    match kind:
        case "kill" | "vanish" | "drain":
            return Fault(kind, at_ns, peer)
        case "slow":
            factor = rng.choice([0.7, 1.3, 3.0, 10.0, 100.0])
            return Fault(kind, at_ns, peer, rng.choice([None, for_ns]), factor, rng.choice([None, 0]))
        case "delay" | "jitter":
            return Fault(kind, at_ns, peer, for_ns, int(10 ** rng.uniform(-1, 2) * MS))
        case "loss" | "duplicate":
            return Fault(kind, at_ns, peer, for_ns, round(rng.uniform(0.02, 1.0), 3))
        case _:
            return Fault(kind, at_ns, peer, for_ns)
