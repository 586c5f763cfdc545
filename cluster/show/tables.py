"""What the commands print: tables of processes, what is wrong with them, and what to type next."""

from __future__ import annotations

import io
import math
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster.spec.plan import name_option
from profiles.table import load_profile
from superserve.roles.local import DEFAULT_NAME, RoleState

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from cluster.operate.down import Down
    from superserve.roles.local import LocalCluster, Role
    from superserve.status import GpuStatus, RouterShare, RouterStatus

_MS = 1_000_000
_MIB = 1 << 20
_WIDTH = 160  # of output that is not a terminal: nothing is cut there


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table as plain text, as wide as the terminal, or wide enough without one."""
    shown = Table(box=box.SIMPLE, show_edge=False, pad_edge=False)
    for column in columns:
        shown.add_column(column, overflow="fold")
    for row in rows:
        shown.add_row(*(Text(cell) for cell in row))  # Text: brackets in a name are not markup
    width = shutil.get_terminal_size((_WIDTH, 24)).columns if sys.stdout.isatty() else _WIDTH
    page = io.StringIO()
    Console(file=page, width=width, color_system=None).print(shown)
    return "\n".join(line.rstrip() for line in page.getvalue().splitlines())


def processes(cluster: LocalCluster) -> str:
    """Return the table of a cluster's processes: role, number, state, and what each serves."""
    rows = [("keeper", str(cluster.keeper.pid), str(cluster.phase), f"this cluster, since {cluster.since}")]
    ends = list(zip(cluster.client_endpoint.split(","), cluster.worker_endpoint.split(","), strict=False))
    for role in cluster.roles:
        serves = role.serves
        if role.kind == "router" and cluster.client_endpoint and ends:
            client, worker = ends.pop(0)
            serves = f"clients at {client}, workers at {worker}, {serves}"
        if role.metrics:
            serves = f"{serves}, http://{role.metrics}/metrics"
        rows.append((role.name, _pid(role), _state(role), serves))
    return table(("role", "pid", "state", "serves"), rows)


def _pid(role: Role) -> str:
    return "-" if role.process is None else str(role.process.pid)


def _state(role: Role) -> str:
    if not role.restarts:
        return str(role.state)
    return f"{role.state} (restarted {'once' if role.restarts == 1 else f'{role.restarts} times'})"


def roles_of(cluster: LocalCluster) -> list[dict[str, Any]]:
    """Return each role for programs: its name, kind, host, state and process."""
    return [
        {
            "name": role.name, "kind": role.kind, "host": cluster.host, "state": role.state,
            "pid": None if role.process is None else role.process.pid,
        }
        for role in cluster.roles
    ]  # fmt: skip


def reasons(cluster: LocalCluster) -> list[str]:
    """Return why roles are not ready, each with the end of its log."""
    return [role.why for role in cluster.roles if role.state is not RoleState.RUNNING and role.why]


# --- what to type next ------------------------------------------------------------------------


def what_next(cluster: LocalCluster, status: RouterStatus, profile: str) -> list[str]:
    """Return what to type next, and how a program connects."""
    return next_lines(cluster.name, cluster.client_endpoint, status, profile)


def next_lines(
    name: str, client_endpoint: str, status: RouterStatus, profile: str, *, has_keys: bool = False
) -> list[str]:
    """Return what to type next, and how a program connects, for a cluster on any hosts."""
    given = "" if name == DEFAULT_NAME else f" --connect {client_endpoint.replace('tcp://', '')}"
    named = name_option(name)
    keys = ', keys="NAME.key"' if has_keys else ""
    return [
        f"Load it:   {command('loadgen')} run --trace {_gentle(status, profile)}{given}",
        f'Use it:    superserve.Client("{client_endpoint}"{keys})',
        f"See it:    {command('cluster')} status{named}",
        f"Stop it:   {command('cluster')} down{named}",
    ]


def _gentle(status: RouterStatus, profile: str) -> str:
    """Return a trace and an SLO that need about a tenth of the workers' capacity."""
    table = load_profile(profile)
    smallest, largest, size = 0, table.n_subnets - 1, table.max_batch_size
    each_qps = size * 1e9 / table.latency_ns(smallest, size)
    rate_qps = float(f"{max(1.0, len(status.workers) * each_qps / 10):.1g}")
    # Four times one query on the largest subnet, in tens of milliseconds, and at least the usual 36.
    slo_ms = max(36, 10 * math.ceil(4 * table.latency_ns(largest, 1) / _MS / 10))
    is_real = status.model is not None and status.model.input is not None
    if is_real:  # on cores that the load generator uses too
        slo_ms = max(slo_ms, 100)
    return f"poisson:rate={rate_qps:g} --duration 10 --slo-ms {slo_ms}"


def command(name: str) -> str:
    """Return how to type one of this project's commands on this machine."""
    beside = Path(sys.executable).parent / name
    if shutil.which(name) is not None or not beside.exists():
        return name
    try:
        return str(beside.relative_to(Path.cwd()))
    except ValueError:
        return str(beside)


# --- status and down --------------------------------------------------------------------------


class Endpoints(Protocol):
    """A router's addresses: those of a cluster of this machine, or of the record of one on several."""

    @property
    def client_endpoint(self) -> str:
        """Where clients connect."""
        ...

    @property
    def worker_endpoint(self) -> str:
        """Where workers connect."""
        ...


def router(cluster: Endpoints, status: RouterStatus) -> list[str]:
    """Return lines about the router: where it is, its queue, and how queries ended."""
    queries, queue, batches = status.queries, status.queue, status.batches
    answered = ", ".join(f"{name} {n:,}" for name, n in queries.answered.items() if n) or "none"
    head = queue.head_slack_ms
    lines = [
        f"clients    {cluster.client_endpoint}, {status.clients} connected",
        f"workers    {cluster.worker_endpoint}, {len(status.workers)} GPUs registered",
        f"policy     {status.router.policy}",
        f"queries    {queries.received:,} received, {queries.in_flight:,} in flight",
        f"answered   {answered}",
        f"queue      {queue.length:,} queries, {queue.held_bytes / _MIB:.1f} MiB"
        + ("" if head is None else f", the first has {head:.1f} ms of slack"),
        f"batches    {batches.dispatched:,} dispatched, {batches.in_flight:,} in flight",
    ]
    return [*lines, *(f"router     {share_words(share)}" for share in status.routers or ())]


def share_words(share: RouterShare) -> str:
    """Return one of several routers in words."""
    if not share.answers:
        return f"{share.endpoint}: does not answer"
    state = ", draining" if share.draining else ""
    return (
        f"{share.endpoint}: {share.gpus} GPUs, {share.queued:,} queries queued, "
        f"{share.received:,} received{state}"
    )


def roles(cluster: LocalCluster, status: RouterStatus | None) -> str:
    """Return the table of `cluster status`: the reports of keeper and router on each process."""
    registered = {} if status is None else status.processes()
    rows = []
    for role in cluster.roles:
        found = registered.get(role.name, ())
        rows.append((role.name, _pid(role), str(role.state), str(role.restarts), role.serves, *work(found)))
    columns = ("role", "pid", "state", "restarts", "serves", "registered", "batches", "queries", "slowdown")
    return table(columns, rows)


def work(found: Sequence[GpuStatus]) -> tuple[str, str, str, str]:
    """Return the router's report on a worker process: its GPUs, their work, their slowdown."""
    if not found:
        return "-", "-", "-", "-"
    n_well = sum(gpu.is_well for gpu in found)
    slowdown = sum(gpu.slowdown for gpu in found) / len(found)
    return (
        f"{n_well} of {len(found)}",
        f"{sum(gpu.batches for gpu in found):,}",
        f"{sum(gpu.queries for gpu in found):,}",
        f"{slowdown:.2f}",
    )


def stopped(done: Down) -> list[str]:
    """Return lines about what was stopped."""
    cluster = done.cluster
    if not done.was_alive:
        return [tidied(cluster)]
    how = "killed: it did not stop in time, and what it still held is lost" if done.was_killed else "stopped"
    pids = ", ".join(f"{role.name} ({_pid(role)})" for role in cluster.roles if role.process is not None)
    return [f"cluster {cluster.name!r} {how}: {pids or 'no role'}, and its keeper ({cluster.keeper.pid})"]


def tidied(left: LocalCluster) -> str:
    """Return the line for a dead keeper whose remains were removed."""
    return (
        f"cluster {left.name!r}: its keeper (pid {left.keeper.pid}) had ended without tidying up, "
        f"and its processes with it; removed what it left"
    )
