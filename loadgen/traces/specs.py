"""Trace specs: one line that names an arrival process and its parameters.

    constant:rate=..                    equal gaps
    poisson:rate=..                     exponential gaps
    gamma:rate=..,cv2=..                gamma gaps
    bursty:base=..,variant=..,cv2=..    constant base plus gamma variant
    accel:from=..,to=..,tau=..,cv2=..   a rate that ramps by tau q/s every second, then stays
    maf-like:rate=..                    synthetic, similar to Azure Functions 2019

Rates are in queries a second, `tau` in queries a second per second. `loadgen.traces.arrivals` has the
processes themselves.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loadgen.traces import arrivals
from superserve.errors import TraceError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

KEYS: dict[str, tuple[str, ...]] = {
    "constant": ("rate",),
    "poisson": ("rate",),
    "gamma": ("rate", "cv2"),
    "bursty": ("base", "variant", "cv2"),
    "accel": ("from", "to", "tau", "cv2"),
    "maf-like": ("rate",),
}
"""The processes that a spec can name, and the keys that each requires."""

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")


@dataclass(frozen=True, slots=True)
class Spec:
    """A process of `KEYS` and a value for each of its keys."""

    process: str
    values: dict[str, float]

    def __str__(self) -> str:
        """Return the spec's text."""
        pairs = (f"{key}={value:.12g}" for key, value in self.values.items())
        return f"{self.process}:{','.join(pairs)}"

    def implied_s(self) -> float | None:
        """Return the duration that the values imply, in seconds: the ramp of `accel`, otherwise None."""
        return arrivals.ramp_s(**self._ramp()) or None if self.process == "accel" else None

    def mean_qps(self, duration_s: float) -> float:
        """Return the expected mean rate over `duration_s`."""
        if self.process == "accel":
            return arrivals.accelerating_count(**self._ramp(), duration_s=duration_s) / duration_s
        return sum(value for key, value in self.values.items() if key != "cv2")

    def at_mean(self, rate_qps: float, duration_s: float) -> Spec:
        """Return the spec with every rate, and `tau`, multiplied by the factor that gives this mean rate.

        The ratios of the rates, the length of a ramp and the CV² stay the same.
        """
        factor = rate_qps / self.mean_qps(duration_s)
        values = {key: value if key == "cv2" else value * factor for key, value in self.values.items()}
        return Spec(self.process, values)

    def draw(self, *, duration_s: float, seed: int) -> npt.NDArray[np.int64]:
        """Return the arrivals: ascending nanoseconds, shape (n_queries,)."""
        value = self.values
        match self.process:
            case "constant":
                return arrivals.constant(rate_qps=value["rate"], duration_s=duration_s)
            case "poisson":
                return arrivals.poisson(rate_qps=value["rate"], duration_s=duration_s, seed=seed)
            case "gamma":
                return arrivals.gamma(
                    rate_qps=value["rate"], cv2=value["cv2"], duration_s=duration_s, seed=seed
                )
            case "bursty":
                return arrivals.bursty(
                    base_qps=value["base"],
                    variant_qps=value["variant"],
                    cv2=value["cv2"],
                    duration_s=duration_s,
                    seed=seed,
                )
            case "accel":
                return arrivals.accelerating(
                    **self._ramp(), cv2=value["cv2"], duration_s=duration_s, seed=seed
                )
            case "maf-like":
                return arrivals.maf_like(rate_qps=value["rate"], duration_s=duration_s, seed=seed)
        raise AssertionError(f"no process {self.process}")

    def _ramp(self) -> dict[str, float]:
        """Return the ramp's arguments under their names in `arrivals`."""
        value = self.values
        return {"from_qps": value["from"], "to_qps": value["to"], "tau_qps_per_s": value["tau"]}


def is_spec(text: str) -> bool:
    """Return whether `text` is written like a spec, valid or not, and not like a path.

    Write a path with a colon in its first part as ./a:b.
    """
    name, colon, _ = text.partition(":")
    return name in KEYS or (bool(colon) and _NAME.fullmatch(name) is not None)


def nearest(word: str, words: tuple[str, ...]) -> str:
    """Return a question that suggests the intended word, or nothing if none is near."""
    near = difflib.get_close_matches(word.lower(), words, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def parse_spec(text: str, *, rate_qps: float | None) -> Spec:
    """Return the spec that `text` describes.

    Args:
        text: `name:key=value,...` with each of the name's keys once, in any order.
        rate_qps: Used for a missing `rate`; other keys have no default.

    Raises:
        TraceError: The name or a key is unknown, a key is missing or repeated, or a value is not
            a finite number above 0 (of `cv2`, at least 0).
    """
    name, _, body = text.partition(":")
    if name not in KEYS:
        raise TraceError(
            f"trace {text!r}: no process {name!r}: expected one of {', '.join(KEYS)}"
            f"{nearest(name, tuple(KEYS))}"
        )
    values = _values(name, body)
    if rate_qps is not None and "rate" in KEYS[name]:
        values.setdefault("rate", rate_qps)
    missing = [key for key in KEYS[name] if key not in values]
    if missing:
        usage = ",".join(f"{key}=.." for key in KEYS[name])
        raise TraceError(f"trace {text!r}: {missing[0]} is missing: expected {name}:{usage}")
    return Spec(name, {key: values[key] for key in KEYS[name]})


def _values(name: str, body: str) -> dict[str, float]:
    """Return the numbers of `key=value,...`, each checked."""
    values: dict[str, float] = {}
    for pair in body.split(",") if body else ():
        key, equals, number = (part.strip() for part in pair.partition("="))
        if not equals:
            raise TraceError(f"trace {name}: expected key=value, got {pair!r}")
        if key not in KEYS[name]:
            raise TraceError(
                f"trace {name}: no key {key!r}: expected {', '.join(KEYS[name])}{nearest(key, KEYS[name])}"
            )
        if key in values:
            raise TraceError(f"trace {name}: {key} is given twice: expected it once")
        values[key] = _number(f"trace {name}: {key}", key, number)
    return values


def _number(field: str, key: str, text: str) -> float:
    """Return the value of a key, in its range."""
    try:
        value = float(text)
    except ValueError:
        raise TraceError(f"{field}: expected a number, got {text!r}") from None
    if key == "cv2":
        return arrivals.check_cv2(value, field=field)
    return arrivals.check_positive(field, value, at_most=arrivals.MAX_RATE_QPS)
