"""Families of machines and terms: jitter, slow and unequal GPUs, cluster sizes, SLOs, floors, classes."""

from __future__ import annotations

from loadgen.simulator.faults import Fault
from loadgen.study.gate.draft import CNN, CNN_8, TRANSFORMER_8, TRANSFORMER_SLO_MS, GateCell, at_load, draft

_MAF = "maf-like:rate=6400"


def _poisson(load: float, cluster: str = CNN_8) -> str:
    return f"poisson:rate={at_load(load, cluster):g}"


def _bursty(load: float, cluster: str = CNN_8, cv2: float = 4) -> str:
    return f"gamma:rate={at_load(load, cluster):g},cv2={cv2:g}"


def jitter_family() -> list[GateCell]:
    """Return messages that take up to 5 ms more, each its own."""
    found = [
        draft("jitter", f"{ms:g} ms at 6400 q/s", "poisson:rate=6400", jitter_ms=ms)
        for ms in (0.5, 1, 2, 3, 4, 5)
    ]
    found += [draft("jitter", f"{ms} ms at 85%", _poisson(0.85), jitter_ms=ms) for ms in (0, 1, 3, 5)]
    found.append(draft("jitter", "3 ms, 10 clients", _bursty(0.5), jitter_ms=3, n_clients=10))
    found.append(draft("jitter", "3 ms, spikes", "spikes:size=200,every=0.2", jitter_ms=3))
    return found


def slow_family() -> list[GateCell]:
    """Return GPUs that are slower than their profile: all of them, half of them, one process of two."""
    found = [
        draft("slow", f"{factor:g}x at 5000 q/s", "poisson:rate=5000", speed=1 / factor)
        for factor in (1.1, 1.25, 1.5, 1.75, 2, 2.5)
    ]
    found += [
        draft("slow", f"{factor:g}x at 7400 q/s", _gamma_at(7400), speed=1 / factor) for factor in (1.6, 2)
    ]
    half = tuple(Fault("slow", 0, "worker:0", None, 1.6, slot) for slot in range(4))
    found.append(draft("slow", "1.6x half of them", "poisson:rate=6400", faults=half))
    one = (Fault("slow", 0, "worker:0", None, 1.6),)
    found.append(
        draft("slow", "1.6x one process of two", "poisson:rate=12800", cluster=f"{CNN}:16", faults=one)
    )
    later = (Fault("slow", 500_000_000, "worker:0", 1_000_000_000, 2.0),)
    found.append(draft("slow", "2x for a second", "poisson:rate=6400", faults=later, is_surprise=True))
    found.append(
        draft("slow", "transformer 1.6x", _poisson(0.45, TRANSFORMER_8), cluster=TRANSFORMER_8,
              slo_ms=TRANSFORMER_SLO_MS, speed=1 / 1.6)
    )  # fmt: skip
    return found


def _gamma_at(rate_qps: float) -> str:
    return f"gamma:rate={rate_qps:g},cv2=4"


def unequal_family() -> list[GateCell]:
    """Return clusters of GPUs whose profiles differ."""
    old = f"{CNN}*1.86:4,{CNN}*4.65:12"
    halves = f"{CNN}:4,{CNN}*2.5:4"
    one_fast = f"{CNN}:1,{CNN}*3:7"
    two_fast = f"{CNN}:2,{CNN}*4:6"
    bursts = f"onoff:high={at_load(0.9, two_fast):g},low={at_load(0.1, two_fast):g},on=0.2,off=0.2"
    return [
        draft("unequal", "4 at 1.86x, 12 at 4.65x, 14.4 ms", "poisson:rate=4700", cluster=old, slo_ms="14.4"),
        draft("unequal", "halves 2.5x maf-like", "maf-like:rate=4480", cluster=halves),
        draft("unequal", "1 fast, 7 at 3x", _bursty(0.5, one_fast), cluster=one_fast),
        draft("unequal", "halves 2.5x at 85%", _poisson(0.85, halves), cluster=halves),
        draft("unequal", "2 fast, 6 at 4x, on and off", bursts, cluster=two_fast, slo_ms="60"),
    ]


def sizes_family() -> list[GateCell]:
    """Return clusters of 1 to 512 GPUs."""
    loads = {
        1: (0.3, 0.6, 0.85),
        2: (0.3, 0.6, 0.85),
        8: (0.3, 0.6, 0.85, 0.95),
        64: (0.3, 0.7, 0.95),
        512: (0.3, 0.85),
    }
    return [
        draft("sizes", f"{n} GPUs at {load:.0%}", _bursty(load, f"{CNN}:{n}"), cluster=f"{CNN}:{n}")
        for n, shares in loads.items()
        for load in shares
    ]


def slos_family() -> list[GateCell]:
    """Return SLOs from 12 to 500 ms."""
    loads = {0.4: (12, 16, 20, 28, 36, 60, 100, 200, 500), 0.8: (12, 20, 36, 100, 500)}
    return [
        draft("slos", f"{slo} ms at {load:.0%}", _bursty(load), slo_ms=str(slo))
        for load, slos in loads.items()
        for slo in slos
    ]


def mixes_family() -> list[GateCell]:
    """Return queries of several SLOs."""
    three = "29.4:7.5,381.5:3,499.8:0.36"
    ramps = "ramp-crash:from=50,to=17000,ramp=0.096,rest=0.265"
    mixes = [
        ("29/382/500 on ramps", ramps, three),
        ("29/382/500 at 50%", _poisson(0.5), three),
        ("29/382/500 at 85%", _bursty(0.85), three),
        ("even", _MAF, "18,36,100"),
        ("urgent", _MAF, "18:3,36:2,100:1"),
        ("patient", _MAF, "18:1,36:2,100:3"),
        ("few patient", _MAF, "36:9,1000:1"),
        (
            "even, on and off",
            f"onoff:high={at_load(1.1, CNN_8):g},low={at_load(0.2, CNN_8):g},on=0.1,off=0.1",
            "18,36,100",
        ),
    ]
    return [draft("mixes", name, spec, slo_ms=slos) for name, spec, slos in mixes]


def floors_family() -> list[GateCell]:
    """Return floors at each subnet, for few and for many of the queries."""
    cells = [
        (76.69, 0.05, 12000), (76.69, 0.33, 9500), (76.69, 0.6, 8000), (77.64, 0.2, 9500), (77.64, 0.6, 7000),
        (78.25, 0.05, 9500), (78.25, 0.33, 9500), (78.25, 0.6, 6400), (79.44, 0.2, 6400), (79.44, 0.6, 4500),
        (80.16, 0.05, 6400), (80.16, 0.2, 4500), (80.16, 0.333, 4500), (80.16, 0.6, 4500),
    ]  # fmt: skip
    return [
        draft(
            "floors",
            f"{floor:g} for {share:.0%} at {rate} q/s",
            f"poisson:rate={rate}",
            floor=f"{floor}:{share}",
        )
        for floor, share, rate in cells
    ]


def priorities_family() -> list[GateCell]:
    """Return classes, mostly in overload."""
    spikes = "spikes:size=700,every=0.2"
    return [
        draft("priorities", "a fifth at 105%", _poisson(1.05), priority="1:0.2"),
        draft("priorities", "half at 120%", _poisson(1.2), priority="1:0.5"),
        draft("priorities", "a fifth at 150%", _bursty(1.5), priority="1:0.2"),
        draft("priorities", "three classes at 130%", _poisson(1.3), priority="2:0.1,1:0.3"),
        draft("priorities", "a fifth at 80%", _bursty(0.8, cv2=16), priority="1:0.2"),
        draft("priorities", "a fifth of spikes", spikes, priority="1:0.2"),
        draft("priorities", "transformer, a fifth at 120%", _poisson(1.2, TRANSFORMER_8),
              cluster=TRANSFORMER_8, slo_ms=TRANSFORMER_SLO_MS, priority="1:0.2"),
    ]  # fmt: skip


def overload_family() -> list[GateCell]:
    """Return more than the GPUs can do, in one class."""
    return [
        draft("overload", "105%", _poisson(1.05)),
        draft("overload", "120%", _poisson(1.2)),
        draft("overload", "150%, cv2 4", _bursty(1.5)),
        draft("overload", "110%, mixed SLOs", _poisson(1.1), slo_ms="18,36,100"),
    ]


def clients_family() -> list[GateCell]:
    """Return queries dealt out to many clients."""
    return [draft("clients", f"{n} at 50%", _bursty(0.5), n_clients=n) for n in (4, 16, 64)]


def transformer_family() -> list[GateCell]:
    """Return what is played on the CNN, at the transformer's rates and SLO."""
    high, low = at_load(0.9, TRANSFORMER_8), at_load(0.1, TRANSFORMER_8)
    cells: list[tuple[str, str, str, str | None]] = [
        ("bursty cv2 2", "bursty:base=250,variant=490,cv2=2", TRANSFORMER_SLO_MS, None),
        ("bursty cv2 4", "bursty:base=250,variant=815,cv2=4", TRANSFORMER_SLO_MS, None),
        ("bursty cv2 8", "bursty:base=250,variant=925,cv2=8", TRANSFORMER_SLO_MS, None),
        ("accel", "accel:from=400,to=1300,tau=200,cv2=8", TRANSFORMER_SLO_MS, None),
        ("gamma cv2 50", "gamma:rate=800,cv2=50", TRANSFORMER_SLO_MS, None),
        ("on and off", f"onoff:high={high:g},low={low:g},on=0.5,off=1", TRANSFORMER_SLO_MS, None),
        ("floor", "poisson:rate=900", TRANSFORMER_SLO_MS, "85.1:0.2"),
        ("mix", "poisson:rate=1150", "100,200,400", None),
        ("90 ms", _bursty(0.6, TRANSFORMER_8), "90", None),
    ]
    return [
        draft("transformer", name, spec, cluster=TRANSFORMER_8, slo_ms=slo, floor=floor)
        for name, spec, slo, floor in cells
    ]
