"""A trace dealt out to several routers: every query once, and a queue that is split loses a little."""

from __future__ import annotations

import numpy as np
import pytest
from click.testing import CliRunner

from loadgen.study.shards import MESSAGE_NS, cli, dealt, sharded
from loadgen.traces.trace import load_trace
from profiles.table import load_profile
from superserve.clock import MS
from superserve.errors import ConfigError


def test_messages_stay_whole_and_routers_get_alike() -> None:
    """A message has one router; no router gets more than a message beyond another."""
    due_ns = load_trace("poisson:rate=5000", duration_s=1.0, seed=1).due_ns
    routers = dealt(due_ns, 4)

    messages = due_ns // MESSAGE_NS
    for message in np.unique(messages):
        assert len(set(routers[messages == message].tolist())) == 1
    shares = np.bincount(routers, minlength=4)
    assert shares.max() - shares.min() <= np.bincount(messages).max()


def test_one_router_has_everything_and_two_lose_little() -> None:
    """At half load both attain nearly all; the split queue is never better by more than noise."""
    trace = load_trace("poisson:rate=1500", duration_s=2.0, seed=1)
    profile = load_profile("cnn-8gpu-modelled")
    one, two = (sharded(trace, profile, 4, n, policy="slackfit", slo_ns=36 * MS) for n in (1, 2))

    assert one.attainment > 0.99
    assert two.attainment > 0.98
    assert two.accuracy < one.accuracy + 0.05


def test_gpus_that_cannot_be_shared_out_are_refused() -> None:
    """The error names the option."""
    trace = load_trace("poisson:rate=100", duration_s=0.1, seed=1)
    with pytest.raises(ConfigError, match="--routers: expected a divisor of 4 GPUs, got 3"):
        sharded(trace, load_profile("cnn-8gpu-modelled"), 4, 3, policy="slackfit", slo_ns=MS)


def test_the_command_prints_a_line_for_each_number() -> None:
    """And the difference from the first."""
    argv = ["--trace", "poisson:rate=200", "--duration", "0.5", "--gpus", "2", "--routers", "1,2"]
    result = CliRunner().invoke(cli, argv)

    assert result.exit_code == 0, result.output
    assert "1 routers: attainment" in result.output
    assert "2 routers: attainment" in result.output
