"""The simulator's speed is measured on runs that serve."""

from __future__ import annotations

from loadgen.bench.rows.simulator import fastest


def test_the_simulators_speed_is_that_of_a_run_that_serves() -> None:
    """All of its queries are answered in time, and the figures agree with each other."""
    found = fastest(seconds=0.5, n_times=1)

    assert found.attainment == 1.0
    assert found.n_batches > 100
    assert found.x_realtime > 0
    assert abs(found.us_per_query * found.n_queries * found.x_realtime / 1e6 - 0.5) < 0.01
