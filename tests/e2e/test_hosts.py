"""A cluster on three hosts, each a network namespace with its own address and sshd, from up to down."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
import time
from typing import TYPE_CHECKING, Any

import psutil  # type: ignore[import-untyped]  # it ships no types
import pytest

from tests.e2e.netns import Net, net
from tests.e2e.pages import check

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

PAGE = "operating.md"


@pytest.fixture
def hosts() -> Iterator[Net]:
    """Give three hosts and an operator; nothing of them is left."""
    with net("a", "b", "c") as here:
        yield here


def write(here: Net, *names: str, security: str = "none", head: str = "", **more: str) -> str:
    """Write a hosts file with the router on `a` and a worker on each host; return its path.

    Args:
        here: The hosts.
        names: Those that take part.
        security: As in the file.
        head: A line of the file's own, besides.
        more: What a host's entry says besides, by host.
    """
    entries = [
        f"  - {{name: {name}, address: {here.address(name)}, workers: 1, python: {sys.executable}"
        f"{', ' + more[name] if name in more else ''}}}"
        for name in names
    ]
    lines = ["router: {host: a}", "emulate: cnn-8gpu-modelled", f"security: {security}", head, "hosts:"]
    path = here.folder / "hosts.yaml"
    path.write_text("\n".join([*lines, *entries, ""]))
    return str(path)


def pids(here: Net) -> dict[str, int]:
    """Return the process of each role, from `cluster status --json`."""
    code, output = here.cluster("status", "--json")
    assert code in (0, 1), output
    seen: list[dict[str, Any]] = json.loads(output)["hosts"]
    return {role["name"]: role["pid"] for host in seen for role in host["roles"] if role["pid"]}


def up(here: Net, *args: str) -> str:
    """Run `cluster up`, which must succeed; return what it printed."""
    code, output = here.cluster("up", *args)
    assert code == 0, output
    return output


def test_a_cluster_on_three_hosts_serves_a_fourth(hosts: Net) -> None:
    """Up, load from elsewhere, status, logs and down: three hosts serve, and keep no process."""
    output = up(hosts, write(hosts, "a", "b", "c"))
    check("hosts.md", "up", output)

    code, output = hosts.loadgen(
        "run", "--trace", "poisson:rate=200", "--duration", "1",
        "--slo-ms", "10000", "--json", str(hosts.folder / "run.json"),
    )  # fmt: skip
    assert code in (0, 1), output  # 1: a busy machine; what is counted must agree all the same
    queries = json.loads((hosts.folder / "run.json").read_text())["queries"]
    assert queries["total"] == queries["ok"] > 0, queries

    code, output = hosts.cluster("status", "--json")
    assert code == 0, output
    status = json.loads(output)["status"]
    assert {worker["name"] for worker in status["workers"]} == {f"worker-{host}-0" for host in "abc"}
    assert all(worker["queries"] for worker in status["workers"]), "each host had its part of the load"
    code, output = hosts.cluster("status")
    assert code == 0, output
    assert f"ok {queries['ok']}" in output

    code, output = hosts.cluster("logs", "b")
    assert code == 0, output
    assert re.match(r"==> b: worker-b-0 <==\n.*welcomed", output, re.DOTALL), output

    roles = pids(hosts)
    assert roles.keys() == {"router", "worker-a-0", "worker-b-0", "worker-c-0"}
    code, output = hosts.cluster("down")
    assert code == 0, output
    for role, pid in roles.items():
        assert f"{role} (pid {pid})" in output
    assert hosts.processes() == []


@pytest.mark.slow
def test_top_and_metrics_reach_the_hosts(hosts: Net) -> None:
    """Router and workers serve /metrics on the ports of the file; `top` shows the workers of all hosts."""
    up(hosts, write(hosts, "a", "b", head="metrics: {router: 9100, workers: 9101, address: 0.0.0.0}"))
    for host, port in (("a", 9100), ("a", 9101), ("b", 9101)):
        url = f"http://{hosts.address(host)}:{port}/metrics"
        fetch = f"import urllib.request as u; print(u.urlopen({url!r}).read())"
        code, output = hosts.run(sys.executable, "-c", fetch)
        assert code == 0, output
        assert "superserve_" in output
    code, output = hosts.cluster("top", "--once")
    assert code == 0, output
    assert "worker-a-0" in output
    assert "worker-b-0" in output
    assert hosts.cluster("down")[0] == 0


@pytest.mark.slow
def test_logs_are_followed_until_ctrl_c(hosts: Net) -> None:
    """`logs -f` shows what a role on another host writes from then on, and ends with Ctrl-C."""
    up(hosts, write(hosts, "a", "b"))
    with hosts.start(sys.executable, "-u", "-m", "cluster", "logs", "-f", "worker-b-0") as command:
        assert command.stdout is not None
        assert "worker-b-0 | " in command.stdout.readline()
        os.kill(pids(hosts)["worker-b-0"], signal.SIGKILL)
        while "welcomed" not in command.stdout.readline():  # by its next life
            pass
        command.send_signal(signal.SIGINT)
        rest, _ = command.communicate(timeout=30)
    assert command.returncode == 0, rest


@pytest.mark.slow
def test_up_changes_only_what_differs(hosts: Net) -> None:
    """A second `up` reports no change; one host more or less starts or stops only that host's roles."""
    file = write(hosts, "a", "b")
    up(hosts, file)
    first = pids(hosts)

    output = up(hosts, file)
    assert "runs already, as asked for: nothing was changed" in output
    assert pids(hosts) == first

    output = up(hosts, write(hosts, "a", "b", "c"))
    second = pids(hosts)
    assert second.keys() - first.keys() == {"worker-c-0"}
    assert {name: second[name] for name in first} == first
    assert output.count("left alone") == len(first)

    output = up(hosts, write(hosts, "a", "c"))
    assert "b: no longer in the file; stopped worker-b-0" in output
    assert pids(hosts) == {name: pid for name, pid in second.items() if name != "worker-b-0"}

    output = up(hosts, write(hosts, "a", "c", c="gpus_per_worker: 2"))
    third = pids(hosts)
    assert [name for name in third if third[name] != second[name]] == ["worker-c-0"]
    assert "restarted" in output
    assert hosts.cluster("down")[0] == 0
    assert hosts.processes() == []


@pytest.mark.slow
def test_a_killed_launchers_work_is_completed(hosts: Net) -> None:
    """The launcher is killed once the first role runs: the next `up` completes it, each role once."""
    file = write(hosts, "a", "b", "c")
    launcher = hosts.start(sys.executable, "-m", "cluster", "up", file)
    with launcher:
        hosts.until(lambda: running(hosts) >= 1)
        kill_tree(launcher)

    up(hosts, file)

    roles = pids(hosts)
    assert roles.keys() == {"router", "worker-a-0", "worker-b-0", "worker-c-0"}
    assert running(hosts) == len(roles)
    assert hosts.cluster("down")[0] == 0
    assert hosts.processes() == []


def running(here: Net) -> int:
    """Return how many routers and workers run, by their command lines."""
    found = 0
    for process in here.processes():
        with contextlib.suppress(psutil.Error):  # it ended meanwhile
            found += bool({"router", "gpu_worker"} & set(process.cmdline()))
    return found


def kill_tree(launcher: subprocess.Popen[str]) -> None:
    """Kill a command that `ip netns exec` has become, as SIGKILL does: it gets to tidy nothing up."""
    os.kill(launcher.pid, signal.SIGKILL)
    launcher.wait()


@pytest.mark.slow
def test_the_roles_of_a_host_die_with_their_supervisor(hosts: Net) -> None:
    """`kill -9` of a host's supervisord leaves none of its roles; `status` reports it, `up` repairs it."""
    file = write(hosts, "a", "b")
    up(hosts, file)
    before = pids(hosts)
    supervisord = int((hosts.state("b") / ".hosts/default/b/keeper.pid").read_text())

    os.kill(supervisord, signal.SIGKILL)
    hosts.until(lambda: running(hosts) == len(before) - 1)

    code, output = hosts.cluster("status")
    assert code == 1
    assert "worker-b-0" in output
    up(hosts, file)
    after = pids(hosts)
    assert [name for name in after if after[name] != before[name]] == ["worker-b-0"]
    assert hosts.cluster("down")[0] == 0
    assert hosts.processes() == []


@pytest.mark.slow
def test_an_unreachable_host_is_named_and_the_others_run(hosts: Net) -> None:
    """What can run runs; the table and the line below it name the host, and `down` names it too."""
    file = write(hosts, "a", "b", "c")
    hosts.stop_sshd("c")
    code, output = hosts.cluster("up", file)
    assert code == 1
    check(PAGE, "unreachable", output)
    assert pids(hosts).keys() == {"router", "worker-a-0", "worker-b-0"}

    hosts.start_sshd("c")
    up(hosts, file)
    hosts.stop_sshd("c")
    code, output = hosts.cluster("status")
    assert code == 1
    check(PAGE, "status-unreachable", output)
    code, output = hosts.cluster("down")
    assert code == 1
    check(PAGE, "down-unreachable", output)
    assert [process.cmdline()[-1] for process in hosts.processes() if "gpu_worker" in process.cmdline()]

    hosts.start_sshd("c")
    code, output = hosts.cluster("down")
    assert code == 0, output
    assert hosts.processes() == []


def test_a_wrong_key_is_named(hosts: Net) -> None:
    """A host that refuses the operator is reported; with --rollback nothing starts at all."""
    write(hosts, "a", "b", "c")
    hosts.ssh_config = hosts.strangers_config("c")
    code, output = hosts.cluster("up", str(hosts.folder / "hosts.yaml"), "--rollback")
    assert code == 1
    check(PAGE, "wrong-key", output)
    assert hosts.processes() == []


def test_a_taken_port_keeps_everything_from_starting(hosts: Net) -> None:
    """Another process has the router's port: the error names it, and nothing starts."""
    listen = (
        "import socket; s = socket.create_server(('0.0.0.0', 5556)); print('listens', flush=True); s.accept()"
    )
    with hosts.start(sys.executable, "-c", listen, host="a") as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "listens\n"
        code, output = hosts.cluster("up", write(hosts, "a", "b"))
        other.kill()
    assert code == 1
    check(PAGE, "port-taken", output)
    assert hosts.processes() == []


@pytest.mark.slow
def test_a_worker_that_crashes_at_start_is_fatal(hosts: Net) -> None:
    """It is given up after a few tries, and `up` and `status` show the last lines of its log."""
    broken = write(hosts, "a", "b", b="env: {PYTHONHASHSEED: seven}")
    code, output = hosts.cluster("up", broken)
    assert code == 1
    check(PAGE, "crash", output)
    code, output = hosts.cluster("status")
    assert code == 1
    assert "worker-b-0 is FATAL" in output
    assert "PYTHONHASHSEED" in output

    up(hosts, write(hosts, "a", "b"))  # mended
    assert hosts.cluster("down")[0] == 0
    assert hosts.processes() == []


@pytest.mark.slow
def test_rollback_takes_down_what_this_call_started(hosts: Net) -> None:
    """With --rollback a failed `up` leaves what ran before, and nothing else."""
    up(hosts, write(hosts, "a"))
    before = pids(hosts)
    code, output = hosts.cluster("up", write(hosts, "a", "b", b="env: {PYTHONHASHSEED: seven}"), "--rollback")
    assert code == 1
    assert "taken down again" in output
    assert pids(hosts) == before
    assert running(hosts) == len(before)
    assert hosts.cluster("down")[0] == 0
    assert hosts.processes() == []


@pytest.mark.slow
def test_a_router_by_a_name_that_hosts_do_not_know_is_named_before_anything_starts(hosts: Net) -> None:
    """An alias of ssh's is no address: the table reports it, and nothing is started."""
    file = hosts.folder / "hosts.yaml"
    entries = "".join(
        f"  - {{name: {name}, address: alias-{name}, workers: 1, python: {sys.executable}}}\n"
        for name in "ab"
    )
    file.write_text(f"router: {{host: a}}\nemulate: cnn-8gpu-modelled\nsecurity: none\nhosts:\n{entries}")
    aliases = "".join(f"Host alias-{name}\n  HostName {hosts.address(name)}\n" for name in "ab")
    hosts.ssh_config.write_text(aliases + hosts.ssh_config.read_text())
    began_s = time.monotonic()
    code, output = hosts.cluster("up", str(file))
    assert code == 1
    assert "b: router: expected an address that this host can look up, got 'alias-a'" in output
    assert "nothing was started" in output
    assert time.monotonic() - began_s < 60
    assert hosts.processes() == []


@pytest.mark.slow
def test_a_router_on_ipv6_serves(hosts: Net) -> None:
    """Its own worker and the commands reach it at an address of IPv6's loopback."""
    path = hosts.folder / "hosts.yaml"
    path.write_text(
        f"router: {{host: a, address: '::1'}}\nemulate: cnn-8gpu-modelled\n"
        f"hosts: [{{name: a, address: {hosts.address('a')}, workers: 1, python: {sys.executable}}}]\n"
    )
    assert "[::1]:5555" in up(hosts, str(path))
    code, output = hosts.cluster("status")
    assert code == 0, output
    assert hosts.cluster("down")[0] == 0
    assert hosts.processes() == []


def test_without_keys_nothing_listens_beyond_loopback(hosts: Net) -> None:
    """A file without keys that does not say `security: none` is refused before any host is asked."""
    code, output = hosts.cluster("up", write(hosts, "a", "b", security="keys"))
    assert code == 1
    assert "security: none" in output
    assert hosts.processes() == []
