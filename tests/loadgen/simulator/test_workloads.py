"""Mixes of SLOs, floors and unequal GPUs are what their options say, or refused by name."""

from __future__ import annotations

import numpy as np
import pytest

from loadgen.simulator.simulate import slowed
from loadgen.simulator.workloads import (
    mixed_workload,
    parse_cluster,
    parse_floor,
    parse_priorities,
    parse_slos,
)
from loadgen.traces.trace import load_trace
from profiles.table import load_profile
from superserve.clock import MS
from superserve.errors import ConfigError

CNN = load_profile("cnn-8gpu-modelled")
TRACE = load_trace("poisson:rate=10000", duration_s=1.0, seed=1)


def test_equal_parts_of_a_cluster_share_one_profile() -> None:
    """Four GPUs as profiled and two that take 2.5 times as long: two objects, so two policies."""
    cluster = parse_cluster("cnn-8gpu-modelled:4,cnn-8gpu-modelled*2.5:2")

    assert len(cluster) == 6
    assert len({id(profile) for profile in cluster}) == 2
    assert cluster[5].latency_ns(0, 1) == pytest.approx(2.5 * cluster[0].latency_ns(0, 1))
    assert slowed(CNN, 2.5) == cluster[5]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cnn-8gpu-modelled", r"--emulate: expected PROFILE:N with N from 1"),
        ("cnn-8gpu-modelled:0", r"--emulate: expected PROFILE:N with N from 1"),
        ("cnn-8gpu-modelled*x:1", r"--emulate: expected a number above 0 and up to 1000, got 'x'"),
        ("cnn-8gpu-modeled:1", r"did you mean 'cnn-8gpu-modelled'"),
    ],
)
def test_a_malformed_cluster_is_refused(text: str, said: str) -> None:
    """The error names the option, the part, and what was expected."""
    with pytest.raises(ConfigError, match=said):
        parse_cluster(text)


def test_slos_are_drawn_in_their_shares() -> None:
    """Weights 1, 2 and 1 give a quarter, a half and a quarter of the queries, the same for one seed."""
    slos = parse_slos("18,36:2,100")

    workload, again = mixed_workload(TRACE, slos, seed=3), mixed_workload(TRACE, slos, seed=3)

    assert isinstance(workload.slo_ns, np.ndarray)
    kinds, counts = np.unique(workload.slo_ns, return_counts=True)
    assert kinds.tolist() == [18 * MS, 36 * MS, 100 * MS]
    assert (counts / TRACE.n).tolist() == pytest.approx([0.25, 0.5, 0.25], abs=0.03)
    assert (workload.slo_ns == again.slo_ns).all()


def test_a_floor_binds_its_share() -> None:
    """A third of the queries ask for 78 %, the others for nothing."""
    workload = mixed_workload(TRACE, parse_slos("36"), parse_floor("78:0.333"), seed=3)

    assert workload.min_accuracy is not None
    assert (workload.min_accuracy == 78).mean() == pytest.approx(0.333, abs=0.03)
    assert set(workload.min_accuracy.tolist()) == {0.0, 78.0}


@pytest.mark.parametrize("text", ["", "0", "36:0", "x:1", "36,,18", "36:-1"])
def test_a_malformed_mix_is_refused(text: str) -> None:
    """The error names the option."""
    with pytest.raises(ConfigError, match="--slo-ms: expected a number above 0"):
        parse_slos(text)


def test_classes_are_drawn_in_their_shares() -> None:
    """A tenth in class 3, a fifth in class 1, the rest in class 0; the same SLOs as without classes."""
    slos = parse_slos("18,36")
    plain = mixed_workload(TRACE, slos, seed=3)

    workload = mixed_workload(TRACE, slos, classes=parse_priorities("3:0.1,1:0.2"), seed=3)

    assert workload.priority is not None
    assert plain.priority is None
    kinds, counts = np.unique(workload.priority, return_counts=True)
    assert kinds.tolist() == [0, 1, 3]
    assert (counts / TRACE.n).tolist() == pytest.approx([0.7, 0.2, 0.1], abs=0.03)
    assert (np.asarray(workload.slo_ns) == plain.slo_ns).all()
    whole = mixed_workload(TRACE, slos, classes=parse_priorities("2:1"), seed=3)
    assert whole.priority is not None
    assert (whole.priority == 2).all()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "expected CLASS:SHARE with a class from 1 to 255, got ''"),
        ("1", "expected CLASS:SHARE with a class from 1 to 255, got '1'"),
        ("0:0.5", "expected CLASS:SHARE with a class from 1 to 255, got '0:0.5'"),
        ("256:0.5", "expected CLASS:SHARE with a class from 1 to 255"),
        ("1:0", "expected a number above 0 and up to 1, got '0'"),
        ("1:x", "expected a number above 0 and up to 1, got 'x'"),
        ("1:0.5,1:0.2", "class 1 is given twice"),
        ("1:0.5,2:0.6", "expected shares of 1 at most together, got 1.1"),
    ],
)
def test_malformed_classes_are_refused(text: str, said: str) -> None:
    """The error names the option and the part."""
    with pytest.raises(ConfigError, match=f"--priority: {said}"):
        parse_priorities(text)
