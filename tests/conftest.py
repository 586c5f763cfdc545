"""What every test shares: hypothesis without deadlines, since a busy machine is not a bug; and this checkout.

Processes that tests start find the packages of this checkout, wherever the environment's install points:
they do not look for them in the working folder (see `superserve.plugins`).

What takes longest comes first, since of tests that run side by side a long one must not be the last.
"""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, Phase, settings

from tests.paths import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator

settings.register_profile("superserve", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("quick", settings.get_profile("superserve"), max_examples=25)
# For `make mutants`: the same examples each time, and none made smaller, since only whether one fails counts.
settings.register_profile(
    "mutants",
    settings.get_profile("superserve"),
    database=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
)
settings.load_profile("superserve")

_PATHS = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(_PATHS))
# Hundreds of them start in a run: each reads what the first has compiled, whatever the shell says of that.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# Torch on one thread, here and in what tests start: small batches on several wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"


_LONG = (
    "docs/test_reference.py", "gpu_worker/engines", "gpu_worker/models", "gpu_worker/proof", "loadgen/bench",
    "loadgen/bound", "loadgen/simulator", "zoo",
    "loadgen/cli/test_gate.py", "loadgen/paper", "loadgen/results/test_histogram.py",
    "loadgen/results/test_report.py",
    "loadgen/study", "profiles/measuring", "router/core/test_slow_gpus.py",
)  # fmt: skip
"""Where tests simulate, train or draw: two thirds of the processor time of all that start no process."""


_FIRST = (
    "test_types.py", "wheels/test_compiled.py", "docs/test_your_model.py", "cluster/engines/test_podman.py",
    "docs/test_training.py", "e2e/test_hosts.py", "e2e/test_slurm.py", "docs/test_families.py",
    "e2e/test_ray.py", "docs/test_encoders.py", "docs/test_models.py", "docs/test_quick_start.py",
)  # fmt: skip
"""The files that take longest, in `make test` and in `make test-full`, the longest first."""


_SLOW_S = 600
"""Least time limit of a slow test, seconds."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what computes for long; put the longest files first, then those with tests that start processes.

    Beyond that order is random. Slow tests have time enough for a machine several times slower than the one
    that they were written on.
    """
    long = [ROOT / "tests" / name for name in _LONG]
    for item in items:
        if any(item.path.is_relative_to(place) for place in long):
            item.add_marker("long")
        if item.get_closest_marker("slow"):
            own = item.get_closest_marker("timeout")
            limit_s = max(_SLOW_S, own.args[0] if own is not None else 0)
            item.add_marker(pytest.mark.timeout(limit_s), append=False)
    longest = {item.path for item in items if item.get_closest_marker("e2e")}
    ranks = {ROOT / "tests" / name: rank for rank, name in enumerate(_FIRST)}
    items.sort(key=lambda item: (ranks.get(item.path, len(ranks)), item.path not in longest))


@pytest.fixture(autouse=True)
def _heed_signals() -> Iterator[None]:
    """Each test heeds Ctrl-C and a hangup, whatever started the suite and whatever a test before it has set.

    A suite in a shell's background ignores the first and one under nohup the second, and so would what tests
    start; a command that runs in this process gives them another meaning.
    """
    ctrl_c = signal.signal(signal.SIGINT, signal.default_int_handler)
    hangup = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGINT, ctrl_c)
    signal.signal(signal.SIGHUP, hangup)
