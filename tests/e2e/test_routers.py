"""A router of two is killed under load: no query fails, and its workers serve with the other one."""

from __future__ import annotations

import pytest

from tests.e2e.router_faults import repeat

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(120)]


@pytest.mark.parametrize("fault", ["kill", "stop"])
def test_a_router_that_is_lost_fails_no_query(fault: str) -> None:
    """Every query with two seconds to spare gets its output, and once."""
    # On GPUs so slow each router has some eight queries at any moment.
    (struck,) = repeat(fault, 1, 400.0, 2_000.0, 4, speed=0.25)

    assert struck.n_again > 0, "the router had nothing when it was struck"
    assert struck.n_failed == 0, struck.line()
    assert struck.first_ms is not None
