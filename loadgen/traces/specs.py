"""Trace specs: one line that names an arrival process and its parameters.

    constant:rate=..                    equal gaps
    poisson:rate=..                     exponential gaps
    gamma:rate=..,cv2=..                gamma gaps
    bursty:base=..,variant=..,cv2=..    constant base plus gamma variant
    accel:from=..,to=..,tau=..,cv2=..   a rate that ramps by tau q/s every second, then stays
    spikes:size=..,every=..             `size` queries at once, every `every` seconds
        width=..                        each spread over `width` seconds
        base=..                         over a Poisson base
    onoff:high=..,low=..,on=..,off=..   one rate for `on` seconds, another for `off` seconds
        cv2=..                          with gamma gaps instead of exponential ones
    ramp-crash:from=..,to=..,ramp=..,rest=..   a rate that ramps for `ramp` seconds, falls back, and rests
        cv2=..                          with gamma gaps instead of exponential ones
    pareto:rate=..,alpha=..             batches at once: a share k^-alpha of them has k queries or more
        most=..                         but none has more than this, by default 1,000
    maf-like:rate=..                    synthetic, similar to Azure Functions 2019

Indented keys may be left out. Rates are in queries a second, `tau` in queries a second per second, times
in seconds. `loadgen.traces.arrivals` has the processes themselves.
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
    "spikes": ("size", "every"),
    "onoff": ("high", "low", "on", "off"),
    "ramp-crash": ("from", "to", "ramp", "rest"),
    "pareto": ("rate", "alpha"),
    "maf-like": ("rate",),
}
"""The processes that a spec can name, and the keys that each requires."""

OPTIONAL: dict[str, dict[str, float]] = {
    "spikes": {"width": 0.0, "base": 0.0},
    "onoff": {"cv2": 1.0},
    "ramp-crash": {"cv2": 1.0},
    "pareto": {"most": 1000.0},
}
"""The keys that a process can do without, and what they are then."""

# Every other key is a rate, a rate's growth, or a number of queries, and grows with the load.
_SHAPES = frozenset({"cv2", "every", "width", "on", "off", "ramp", "rest", "alpha", "most"})

# These may be 0: no base, silence between bursts, no rest, no width.
_MAY_BE_0 = frozenset({("spikes", "width"), ("spikes", "base"), ("onoff", "low"), ("ramp-crash", "rest")})

_MOST = {
    "size": arrivals.MAX_BATCH,
    "most": arrivals.MAX_BATCH,
    "alpha": arrivals.MAX_ALPHA,
    **dict.fromkeys(("every", "width", "on", "off", "ramp", "rest"), arrivals.MAX_DURATION_S),
}
"""The largest value of a key that is no rate."""

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")


@dataclass(frozen=True, slots=True)
class Spec:
    """A process of `KEYS` and a value for each of its keys."""

    process: str
    values: dict[str, float]

    def __str__(self) -> str:
        """Return the spec's text."""
        left_out = OPTIONAL.get(self.process, {})
        pairs = (f"{key}={value:.12g}" for key, value in self.values.items() if left_out.get(key) != value)
        return f"{self.process}:{','.join(pairs)}"

    def implied_s(self) -> float | None:
        """Return the duration that the values imply, in seconds: the ramp of `accel`, otherwise None."""
        return arrivals.ramp_s(**self._ramp()) or None if self.process == "accel" else None

    def mean_qps(self, duration_s: float) -> float:
        """Return the expected mean rate over `duration_s`."""
        value = self.values
        match self.process:
            case "accel":
                return arrivals.accelerating_count(**self._ramp(), duration_s=duration_s) / duration_s
            case "spikes":
                return value["size"] / value["every"] + value["base"]
            case "onoff":
                return arrivals.on_off_count(**self._on_off(), duration_s=duration_s) / duration_s
            case "ramp-crash":
                return arrivals.ramp_crash_count(**self._ramp_crash(), duration_s=duration_s) / duration_s
        return sum(rate for key, rate in value.items() if key not in _SHAPES)

    def at_mean(self, rate_qps: float, duration_s: float) -> Spec:
        """Return the spec with every rate, `tau` and `size` times the factor that gives this mean rate.

        The ratios of the rates, all times and the CV² stay the same.
        """
        factor = rate_qps / self.mean_qps(duration_s)
        values = {key: value if key in _SHAPES else value * factor for key, value in self.values.items()}
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
            case "spikes":
                return arrivals.spikes(
                    size=value["size"], every_s=value["every"], width_s=value["width"],
                    base_qps=value["base"], duration_s=duration_s, seed=seed,
                )  # fmt: skip
            case "onoff":
                return arrivals.on_off(**self._on_off(), cv2=value["cv2"], duration_s=duration_s, seed=seed)
            case "ramp-crash":
                return arrivals.ramp_crash(
                    **self._ramp_crash(), cv2=value["cv2"], duration_s=duration_s, seed=seed
                )
            case "pareto":
                return arrivals.pareto_batches(
                    rate_qps=value["rate"], alpha=value["alpha"], most=value["most"],
                    duration_s=duration_s, seed=seed,
                )  # fmt: skip
            case "maf-like":
                return arrivals.maf_like(rate_qps=value["rate"], duration_s=duration_s, seed=seed)
        raise AssertionError(f"no process {self.process}")

    def _ramp(self) -> dict[str, float]:
        """Return the ramp's arguments under their names in `arrivals`."""
        value = self.values
        return {"from_qps": value["from"], "to_qps": value["to"], "tau_qps_per_s": value["tau"]}

    def _on_off(self) -> dict[str, float]:
        """Return the rates and times of `onoff` under the names that `arrivals` gives them."""
        value = self.values
        return {
            "high_qps": value["high"], "low_qps": value["low"], "on_s": value["on"], "off_s": value["off"],
        }  # fmt: skip

    def _ramp_crash(self) -> dict[str, float]:
        """Return the rates and times of `ramp-crash` under the names that `arrivals` gives them."""
        value = self.values
        return {
            "from_qps": value["from"], "to_qps": value["to"], "ramp_s": value["ramp"],
            "rest_s": value["rest"],
        }  # fmt: skip


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
        text: `name:key=value,...` with each of the name's keys once, in any order; those of `OPTIONAL`
            may be left out.
        rate_qps: Used for a missing `rate`; other keys have no default.

    Raises:
        TraceError: The name or a key is unknown, a key is missing or repeated, or a value is not
            a finite number in its range.
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
    values = OPTIONAL.get(name, {}) | values
    if values.get("width", 0.0) > values.get("every", 0.0):
        raise TraceError(
            f"trace {text!r}: width: expected at most every, {values['every']:g} s, got {values['width']:g}"
        )
    return Spec(name, {key: values[key] for key in _known(name)})


def _known(name: str) -> tuple[str, ...]:
    """Return the keys of a process, in the order in which they are printed."""
    return (*KEYS[name], *OPTIONAL.get(name, {}))


def _values(name: str, body: str) -> dict[str, float]:
    """Return the numbers of `key=value,...`, each checked."""
    values: dict[str, float] = {}
    for pair in body.split(",") if body else ():
        key, equals, number = (part.strip() for part in pair.partition("="))
        if not equals:
            raise TraceError(f"trace {name}: expected key=value, got {pair!r}")
        known = _known(name)
        if key not in known:
            raise TraceError(
                f"trace {name}: no key {key!r}: expected {', '.join(known)}{nearest(key, known)}"
            )
        if key in values:
            raise TraceError(f"trace {name}: {key} is given twice: expected it once")
        values[key] = _number(name, key, number)
    return values


def _number(name: str, key: str, text: str) -> float:
    """Return the value of a process's key, in its range."""
    field = f"trace {name}: {key}"
    try:
        value = float(text)
    except ValueError:
        raise TraceError(f"{field}: expected a number, got {text!r}") from None
    if key == "cv2":
        return arrivals.check_cv2(value, field=field)
    if value == 0.0 and (name, key) in _MAY_BE_0:
        return 0.0
    value = arrivals.check_positive(field, value, at_most=_MOST.get(key, arrivals.MAX_RATE_QPS))
    if key == "most" and value != int(value):
        raise TraceError(f"{field}: expected a whole number, got {text!r}")
    return value
