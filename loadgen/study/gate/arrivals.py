"""Families of arrivals: the paper's grid, spikes, on and off, ramps that crash, batches, gamma gaps."""

from __future__ import annotations

from dataclasses import replace

from loadgen.study.compare import paper_cells
from loadgen.study.gate.draft import (
    CNN,
    CNN_8,
    QUERIES,
    TRANSFORMER_8,
    TRANSFORMER_SLO_MS,
    GateCell,
    at_load,
    draft,
)

# The ramps of the paper's slowest accelerations take 21 s; their first 10 s are played.
_ACCEL_S = 10.0

_SURPRISING = 150
"""With a CV² of 200 and seed 1 the largest surge is 621 queries in 20 ms: it fills eight GPUs."""

_HEAVY = 1.3
"""Batches of such an alpha bring surges that are beyond all before them, again and again: with 1.1 and seed 2
there are 425 queries within 4 ms, after at most 193, and 648 within 36 ms, more than eight GPUs serve."""


def paper_family() -> list[GateCell]:
    """Return the paper's grid: MAF, nine bursty and nine accelerating cells, and MAF on the transformer."""
    found = []
    for cell in paper_cells(CNN, 8, None):
        kind = cell.trace.partition(":")[0]
        if "," in cell.slo_ms or "," in cell.cluster or cell.floor is not None:
            continue  # what the paper left open has families
        if kind == "accel":
            seconds = 4.0 if "tau=5000" in cell.trace else _ACCEL_S
            found.append(draft("paper", cell.name, cell.trace, seconds=seconds, is_strict=True))
        else:
            found.append(draft("paper", cell.name, cell.trace, is_strict=True))
    found.append(
        draft("paper", "transformer maf-like", "maf-like:rate=1150", cluster=TRANSFORMER_8,
              slo_ms=TRANSFORMER_SLO_MS, seconds=QUERIES / 1150, is_strict=True)
    )  # fmt: skip
    return [
        replace(one, cell=replace(one.cell, duration_s=round(one.cell.duration_s or 0, 2))) for one in found
    ]


def spikes_family() -> list[GateCell]:
    """Return spikes: those without a base find the GPUs idle, and leave no excuse."""
    slow = {"cluster": TRANSFORMER_8, "slo_ms": TRANSFORMER_SLO_MS}
    cells: list[tuple[str, str, dict[str, str]]] = [
        ("200 each 0.2 s", "size=200,every=0.2", {}),
        ("400 each 0.2 s", "size=400,every=0.2", {}),
        (
            "20 each 63 ms, 2 GPUs, 14.85 ms",
            "size=20,every=0.063",
            {"cluster": f"{CNN}:2", "slo_ms": "14.85"},
        ),
        ("100 each 0.1 s", "size=100,every=0.1", {}),
        ("300 each 1 s", "size=300,every=1", {}),
        ("600 each 0.2 s", "size=600,every=0.2", {}),
        ("200 each 0.2 s over 10 ms", "size=200,every=0.2,width=0.01", {}),
        ("400 each 0.2 s over 20 ms", "size=400,every=0.2,width=0.02", {}),
        ("16 each 40 ms, 1 GPU, 20 ms", "size=16,every=0.04", {"cluster": f"{CNN}:1", "slo_ms": "20"}),
        ("48 each 100 ms, 1 GPU", "size=48,every=0.1", {"cluster": f"{CNN}:1"}),
        ("1600 each 0.2 s, 64 GPUs", "size=1600,every=0.2", {"cluster": f"{CNN}:64"}),
        ("transformer 100 each 0.5 s", "size=100,every=0.5", slow),
        ("transformer 350 each 0.5 s", "size=350,every=0.5", slow),
        ("200 each 0.2 s on 4000 q/s", "size=200,every=0.2,base=4000", {}),
        ("300 each 0.1 s on 2000 q/s", "size=300,every=0.1,base=2000", {}),
        ("100 each 50 ms on 8000 q/s", "size=100,every=0.05,base=8000", {}),
    ]
    return [
        draft("spikes", name, f"spikes:{keys}", is_strict="base" not in keys, **terms)  # type: ignore[arg-type]  # all are strings
        for name, keys, terms in cells
    ]


def on_off_family() -> list[GateCell]:
    """Return rates that jump up and down, as shares of the GPUs' most."""
    cells = [
        (0.5, 0.0, 0.1, 0.1, 1), (0.9, 0.1, 0.05, 0.15, 1), (0.9, 0.0, 0.2, 0.2, 1), (1.2, 0.2, 0.05, 0.1, 1),
        (1.5, 0.1, 0.02, 0.08, 1), (0.8, 0.4, 1.0, 1.0, 1), (0.95, 0.3, 0.5, 0.5, 1), (0.9, 0.1, 0.2, 0.3, 8),
    ]  # fmt: skip
    return [
        draft(
            "onoff", f"{high:.0%} for {on:g} s, {low:.0%} for {off:g} s{_bursts(cv2)}",
            f"onoff:high={at_load(high, CNN_8):g},low={low and at_load(low, CNN_8):g},"
            f"on={on},off={off},cv2={cv2}",
        )
        for high, low, on, off, cv2 in cells
    ]  # fmt: skip


def _bursts(cv2: int) -> str:
    return f", cv2 {cv2}" if cv2 > 1 else ""


def ramps_family() -> list[GateCell]:
    """Return rates that ramp and crash, and one that jumps and decays."""
    cells = [
        (0.05, 0.9, 0.2, 0.1, 1), (0.05, 1.0, 1.0, 0.5, 1), (0.05, 0.9, 0.05, 0.05, 1),
        (0.9, 0.1, 0.3, 0.0, 1), (0.05, 1.1, 0.5, 0.2, 1), (0.1, 0.8, 0.4, 0.2, 8),
    ]  # fmt: skip
    return [
        draft(
            "ramps", f"{low:.0%} to {high:.0%} in {ramp:g} s, rest {rest:g} s{_bursts(cv2)}",
            f"ramp-crash:from={at_load(low, CNN_8):g},to={at_load(high, CNN_8):g},"
            f"ramp={ramp},rest={rest},cv2={cv2}",
        )
        for low, high, ramp, rest, cv2 in cells
    ]  # fmt: skip


def pareto_family() -> list[GateCell]:
    """Return Pareto batches at three loads and tails."""
    found = [
        draft(
            "pareto", f"{alpha:g} at {load:.0%}",
            f"pareto:rate={at_load(load, CNN_8):g},alpha={alpha},most=200",
            is_surprise=alpha <= _HEAVY,
        )
        for alpha in (1.1, 1.5, 2.5)
        for load in (0.3, 0.6, 0.85)
    ]  # fmt: skip
    spec = f"pareto:rate={at_load(0.4, CNN_8):g},alpha=1.3"
    found.append(draft("pareto", "1.3 to 1000 at 40%", spec, is_surprise=True))
    return found


def gamma_family() -> list[GateCell]:
    """Return gamma gaps from Poisson's CV² to the burstiest recorded."""
    found = [
        draft("gamma", f"cv2 {cv2} at 2000 q/s", f"gamma:rate=2000,cv2={cv2}", is_surprise=cv2 >= _SURPRISING)
        for cv2 in (1, 2, 8, 32, 100, 150, 200)
    ]
    for load, cv2s in ((0.5, (8, 50, 150)), (0.9, (1, 4, 16))):
        rate = at_load(load, CNN_8)
        found += [
            draft(
                "gamma",
                f"cv2 {cv2} at {load:.0%}",
                f"gamma:rate={rate:g},cv2={cv2}",
                is_surprise=cv2 >= _SURPRISING,
            )
            for cv2 in cv2s
        ]
    return found
