"""10^5 queries at 70 % load across an upgrade, a reload, a drain and a scale-down, on each engine.

    python -m tests.cluster.upgrades [--queries N] [--json FILE] podman slurm ray kubernetes

An engine that this machine cannot have is skipped with the reason. The exit code is 1 if a query failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.cluster.upgrades.guests import Guest, OnRay, OnSlurm, loaded, now_s, rate_qps

if TYPE_CHECKING:
    from collections.abc import Iterator

STEPS = ("upgrade", "reload", "drain", "scale")
_KILLED_N = 20  # seconds of load while a killed worker comes back, at least
_BACK_S = 90.0


@contextlib.contextmanager
def _guest(engine: str) -> Iterator[Guest]:
    """Give a cluster's engine, started for this."""
    if engine == "slurm":
        from tests.e2e.slurm_net import slurm  # noqa: PLC0415  each needs its own programs

        with slurm("n1", "n2", "n3") as here:
            yield OnSlurm(here)
    elif engine == "ray":
        from tests.e2e.ray_net import ray  # noqa: PLC0415

        with ray("n1", "n2", "n3") as here:
            yield OnRay(here)
    elif engine == "kubernetes":
        from tests.cluster.kubernetes.programs import opened  # noqa: PLC0415
        from tests.cluster.upgrades.guests import OnKubernetes  # noqa: PLC0415

        with opened() as here:
            yield OnKubernetes(here)
    else:
        from tests.cluster.upgrades.podman import on_podman  # noqa: PLC0415

        with on_podman() as guest:
            yield guest


def show(guest: Guest, n: int) -> dict[str, Any]:
    """Run every step under load, and kill a worker; return the figures."""
    rate = rate_qps()
    guest.up()
    seconds = {}
    with loaded(guest, rate, n) as printed:
        for step in STEPS:
            began_s = time.monotonic()
            getattr(guest, step)()
            seconds[step] = round(time.monotonic() - began_s, 1)
            _say(f"  {time.time():.1f} {step}: {seconds[step]} s")
    found = json.loads(printed[0])
    with loaded(guest, rate, int(_KILLED_N * rate)) as printed:
        time.sleep(1.0)  # the load has settled
        killed_s = now_s()
        guest.kill()
        guest.wait_back(killed_s, _BACK_S)
    killed = json.loads(printed[0])
    guest.down()
    del found["fleet"]
    return {
        "rate_qps": round(rate), **found, "steps_s": seconds, "back_s": back_s(killed["fleet"], killed_s),
        "killed": {"sent": killed["sent"], "ends": killed["ends"]},
    }  # fmt: skip


def back_s(fleet: list[list[float]], killed_s: float) -> float | None:
    """Return how long after a kill the fleet was whole again; None if it never was, or never shrank."""
    before = [n for at_s, n in fleet if at_s <= killed_s]
    whole = before[-1] if before else max(n for _, n in fleet)
    fell = False
    for at_s, n in fleet:
        if at_s > killed_s:
            fell = fell or n < whole
            if fell and n >= whole:
                return round(at_s - killed_s, 1)
    return None


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> None:
    """Parse the command line, run, and print a line for each engine."""
    parser = argparse.ArgumentParser()
    parser.add_argument("engines", nargs="+", choices=["podman", "slurm", "ray", "kubernetes"])
    parser.add_argument("--queries", type=int, default=100_000)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    results: dict[str, Any] = {}
    failed = 0
    for engine in asked.engines:
        try:
            with _guest(engine) as guest:
                results[engine] = found = show(guest, asked.queries)
        except pytest.skip.Exception as reason:
            _say(f"{engine}: skipped: {reason}")
            continue
        failed += found["sent"] - found["ends"].get("ok", 0)
        _say(f"{engine}: {json.dumps(found)}")
    if asked.json is not None:
        asked.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
