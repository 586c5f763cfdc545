"""The counterfactual agrees with a simulation of that change."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from loadgen.results.run import in_time
from loadgen.study.explain.whatif import WhatIf, play, window_of
from superserve.clock import MS
from superserve.errors import ConfigError
from tests.loadgen.study.explain.flown import SLO_NS, drawn, even, fly

if TYPE_CHECKING:
    from loadgen.traces.trace import Trace

POLICY = "fixed:cnn-78.25"


@pytest.fixture(scope="module")
def trace() -> Trace:
    """Return bursts that overload two GPUs now and then."""
    return drawn("bursty:base=600,variant=1200,cv2=8", 2.0)


@pytest.mark.parametrize(
    ("change", "gpus", "policy", "slo_ms"),
    [
        (WhatIf(), 2, POLICY, 36),
        (WhatIf(gpus=1), 3, POLICY, 36),
        (WhatIf(policy="slackfit"), 2, "slackfit", 36),
        (WhatIf(slo_ns=60 * MS), 2, POLICY, 60),
    ],
)
def test_it_agrees_with_a_simulation_of_the_change(
    trace: Trace, change: WhatIf, gpus: int, policy: str, slo_ms: int
) -> None:
    """Played from the record of another run, query by query, it ends as the simulation of the change does."""
    recorded = fly(trace, gpus=2, policy=POLICY)
    changed = fly(trace, gpus=gpus, policy=policy, slo_ns=slo_ms * MS)
    flight = recorded.flight
    asked = flight.missed()[-1]
    if change.slo_ns is not None:
        # The recorded slack counts from sending, up to half a millisecond after the query was due.
        change = WhatIf(slo_ns=change.slo_ns - (SLO_NS - asked.slack_ns))

    played = play(flight, window_of(flight, list(flight.queries.values())), change, asked)

    expected = in_time(changed.simulated.columns, slo_ms * MS)
    same = [end.is_in_time == expected[query_id] for (_, query_id), end in played.ends.items()]
    assert len(same) == trace.n
    # Where deadlines are missed by a hair, another draw of the ways makes it another query.
    assert sum(same) >= 0.88 * len(same)
    assert played.attainment == pytest.approx(expected.mean(), abs=0.01)
    # And it is the change that does it: as it was, a good part missed.
    assert in_time(recorded.simulated.columns, SLO_NS).mean() < 0.9


def test_slow_gpus_are_played_as_slow_as_measured() -> None:
    """GPUs that took 1.5 times as long do so again."""
    flown = fly(drawn("poisson:rate=1200", 1.0), gpus=2, policy=POLICY, factor=1.5)
    flight = flown.flight

    played = play(flight, window_of(flight, list(flight.queries.values())), WhatIf())

    missed = 1 - in_time(flown.simulated.columns, SLO_NS).mean()
    assert missed > 0.02
    assert 1 - played.attainment == pytest.approx(missed, rel=0.25)


def test_it_refuses_to_play_without_gpus() -> None:
    """One GPU less of one is none."""
    flight = fly(even(100, 0.1), gpus=1).flight

    with pytest.raises(ConfigError, match="no GPU is left of 1"):
        play(flight, window_of(flight, list(flight.queries.values())), WhatIf(gpus=-1))


def test_changes_are_words() -> None:
    """Each part of a change is named."""
    assert WhatIf(1, "slackfit", 41 * MS).words == "with 1 GPU more, under slackfit, with an SLO of 41 ms"
    assert WhatIf(-2).words == "with 2 GPUs less"
    assert WhatIf().words == "as it was"
