"""Drain, rolling restart and doctor on three hosts, each a network namespace with its own sshd."""

from __future__ import annotations

import json
import signal
import sys
import time
from typing import TYPE_CHECKING

import pytest

from tests.e2e.test_hosts import hosts, pids, up, write

if TYPE_CHECKING:
    from tests.e2e.netns import Net

__all__ = ["hosts"]  # the fixture
pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]


def test_a_rolling_restart_of_three_hosts_under_load_fails_no_query(hosts: Net) -> None:
    """At an SLO of 3 s, with load from a fourth: every query is answered, every worker is a new process."""
    up(hosts, write(hosts, "a", "b", "c"))
    before = pids(hosts)
    path = hosts.folder / "run.json"
    began_s = time.monotonic()
    with hosts.start(
        sys.executable, "-m", "loadgen", "run", "--trace", "poisson:rate=200", "--duration", "600",
        "--slo-ms", "3000", "--json", str(path),
    ) as load:  # fmt: skip
        tuned = hosts.cluster(
            "apply", write(hosts, "a", "b", "c", head="policy: slackfit\nmax_queries: 5000")
        )
        code, output = hosts.cluster("restart", "--rolling")
        after_s = time.monotonic() - began_s
        load.send_signal(signal.SIGINT)  # to `ip netns exec`, which it has become
        said, _ = load.communicate(timeout=90)

    assert tuned == (0, "policy: planfit -> slackfit\nmax_queries: 200000 -> 5000\n")
    assert code == 0, output
    after = pids(hosts)
    assert after["router"] == before["router"]
    for host in "abc":
        name = f"worker-{host}-0"
        assert f"{name}: live again" in output
        assert after[name] != before[name]
    queries = json.loads(path.read_text())["queries"]
    assert queries["total"] > 100 * after_s, "the load lasted as long as the restart"
    assert (queries["ok"], queries["unsent"]) == (queries["total"], 0), said

    code, output = hosts.cluster("doctor")
    assert code == 0, output
    assert hosts.cluster("down")[0] == 0
    assert hosts.processes() == []


def test_a_shell_that_prints_is_no_obstacle(hosts: Net) -> None:
    """A greeting without a newline, a farewell and an exit code of its own: every command works as ever."""
    hosts.stop_sshd("b")
    noisy = hosts.folder / "noisy.sh"
    noisy.write_text('printf "Welcome to b!"\nsh -c "$SSH_ORIGINAL_COMMAND"\nprintf "bye"\nexit 3\n')
    hosts.start_sshd("b", f"ForceCommand sh {noisy}")
    up(hosts, write(hosts, "a", "b"))
    assert "worker-b-0" in pids(hosts)
    for words in (("status",), ("doctor",), ("restart", "worker-b-0"), ("logs", "b")):
        code, output = hosts.cluster(*words)
        assert code == 0, (words, output)
    code, output = hosts.cluster("down")
    assert code == 0, output
    assert "b: stopped worker-b-0" in output
    assert hosts.processes() == []


def test_a_drained_host_stays_away_until_it_is_asked_back(hosts: Net) -> None:
    """Drain a host twice; the doctor's command, and also `up`, bring it back."""
    file = write(hosts, "a", "b")
    up(hosts, file)
    code, output = hosts.cluster("drain", "b")
    assert code == 0, output
    assert "worker-b-0: drained in" in output
    assert "1 left: worker-a-0" in output
    code, output = hosts.cluster("drain", "worker-b-0")
    assert (code, "worker-b-0: has ended already (STOPPED)" in output) == (0, True), output
    code, output = hosts.cluster("drain", "worker-c-0")
    assert (code, "no such worker or host; did you mean worker-" in output) == (1, True), output

    code, output = hosts.cluster("doctor")
    assert code == 1
    assert "do: `cluster restart worker-b-0`" in output
    code, output = hosts.cluster("restart", "worker-b-0")
    assert (code, "worker-b-0: live again" in output) == (0, True), output

    assert hosts.cluster("drain", "b")[0] == 0
    assert "worker-b-0" in up(hosts, file)
    assert "worker-b-0" in pids(hosts)

    hosts.stop_sshd("b")
    code, output = hosts.cluster("doctor")
    assert code == 1
    assert "Connection refused" in output
    assert output.count("wrong:") == 1
    hosts.start_sshd("b")
    code, output = hosts.cluster("doctor")
    assert code == 0, output
    assert hosts.cluster("down")[0] == 0
    assert hosts.processes() == []
