"""Waits for a quiet moment of this machine before something is measured on it."""

from __future__ import annotations

import time

from loadgen.results.result import NoiseProbe, quantile_ns

SAMPLE_S, WAIT_S = 0.4, 6.0
"""It waits, for at most the second, until the idle machine was quiet for the first."""


def await_calm(quiet_ns: int) -> None:
    """Wait until this machine, without a run, wakes a sleeper in time; but not for ever.

    Another guest's load on a shared host says nothing about the rate that is searched.
    """
    give_up_s = time.monotonic() + WAIT_S
    while time.monotonic() < give_up_s:
        noise = NoiseProbe()
        noise.start()
        time.sleep(SAMPLE_S)
        late_ns = quantile_ns(noise.stop(), 990)
        if late_ns is not None and late_ns < quiet_ns:
            return
