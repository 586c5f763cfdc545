"""What the engines share that choose the machines themselves: plans without addresses, and the verbs on them.

Such an engine places a role where it likes, so that only it knows where the router is: `{router}` in a role's
arguments stands for that until the role starts. What was started last is kept in the cluster's folder:

    FOLDER/roles/ROLE.json    a `Started`: what a role was started with, 0600
    FOLDER/files/GROUP-DIGEST/...    keys and profile of a group, secrets 0600; others have another digest

`apply` compares with it, so that another command line, file or setting restarts a role, and nothing else
does.
"""

from __future__ import annotations

import base64
import json
import re
import subprocess
import time
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.engines.engine import TAIL_LINES, Applied, HostSeen, RoleSeen, Stopped, absent
from cluster.remote import record as records
from cluster.remote.shell import RemoteError
from superserve.errors import ConfigError, NoRouterError
from superserve.fields import read_file
from superserve.files import write_private
from superserve.net.connection import ask_status

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from cluster.remote.record import KnownHost, Record
    from cluster.spec.roles import HostPlan, HostRole
    from superserve.status import RouterStatus

ROUTER_HOST = "{router}"
"""In a role's arguments: the address at which the engine has placed the router."""

ASK_AGAIN_S = 0.2
_END_S = 60.0  # a role drains for 5 s; then the engine cleans up
_STATUS_S = 2.0
_MEMBER = re.compile(r"(.*)-(\d+)")


@dataclass(frozen=True, slots=True)
class Started:
    """What a role is started with.

    Attributes:
        name: The role.
        kind: "router" or "worker".
        host: Its group: a host of hosts.yaml.
        argv: The arguments of Python, with `ROUTER_HOST` for the router's address.
        env: Environment variables, besides those of the engine.
        serves: What it serves, in words.
        gpus: GPUs that it needs.
        interpreter: The Python that runs it; "" for the engine's own.
        stop_s: How long it has after SIGTERM.
        settings: The engine's settings that count for it.
    """

    name: str
    kind: str
    host: str
    argv: tuple[str, ...]
    env: tuple[tuple[str, str], ...]
    serves: str
    gpus: int
    interpreter: str
    stop_s: float
    settings: tuple[str, ...] = ()


class PlacedEngine(ABC):
    """The verbs of an engine that chooses machines, over a few steps that differ.

    Args:
        record: What is known about the cluster; saved whenever the router turns out to be elsewhere.

    Attributes:
        record: The same, as it is now.
    """

    def __init__(self, record: Record) -> None:
        self.record = record

    def keep(self, record: Record) -> None:
        """Replace what is known about the cluster."""
        self.record = record

    # --- what differs -------------------------------------------------------------------------

    @abstractmethod
    def settings(self, kind: str) -> tuple[str, ...]:
        """Return the engine's settings for roles of a kind: others restart them."""

    @abstractmethod
    def start(self, role: Started) -> None:
        """Start a role that does not run."""

    @abstractmethod
    def end(self, name: str) -> None:
        """Drain a role and let it end, without waiting."""

    @abstractmethod
    def seen(self) -> dict[str, RoleSeen]:
        """Return every role that the engine knows, by name."""

    @abstractmethod
    def router_address(self) -> str:
        """Return where the router is now; "" if it does not run."""

    @abstractmethod
    def gone(self, names: Iterable[str]) -> None:
        """End at once what is left of roles that have drained, and release what the engine holds for them."""

    @abstractmethod
    def logs(self, role: str, n_lines: int = TAIL_LINES) -> list[str]:
        """Return the last lines of a role's log."""

    @abstractmethod
    def start_reading(self, host: str, argv: Sequence[str]) -> subprocess.Popen[bytes]:
        """Start a command where a host's logs are; the caller reads its output from `stdout`, and ends it."""

    # --- verbs --------------------------------------------------------------------------------

    def apply(
        self, plans: Mapping[str, HostPlan], files: Mapping[str, Mapping[str, str]]
    ) -> dict[str, Applied]:
        """Run exactly the plans' roles, by host, with files beside them; touch only what differs."""
        done: dict[str, Applied] = {name: Applied("", {}, []) for name in plans}
        for host, plan in plans.items():
            try:
                done[host].files.extend(_put(Path(plan.folder), files[host]))
            except OSError as error:
                done[host] = Applied(f"{host}: {error.filename}: {error.strerror}", {}, [])
        wanted = [
            self.started(host, plan, role)
            for host, plan in plans.items()
            for role in plan.roles
            if not done[host].error
        ]
        try:
            self._replace(wanted, done)
        except RemoteError as error:
            return {host: replace(one, error=one.error or f"{host}: {error}") for host, one in done.items()}
        return done

    def roles(self) -> tuple[HostSeen, ...]:
        """Return the state of every role; every host has the same error if the engine does not answer."""
        try:
            found = self.seen()
        except RemoteError as error:
            return tuple(HostSeen(host.name, str(error), None, ()) for host in self.record.hosts)
        return tuple(
            HostSeen(host.name, "", None, tuple(self._role(host, name, found) for name in host.roles))
            for host in self.record.hosts
        )

    def scale(self, role: str, n: int) -> None:
        """Run a role once, or, with 0, drain it and let it end. Does not wait for either."""
        assert n in (0, 1), "a role is one process"
        if n:
            self.gone([role])
            self.start(self.last(role))
        else:
            self.end(role)

    def stop(self) -> Stopped:
        """Stop the router, while workers still answer what it holds, then everything."""
        try:
            found = self.seen()
            running = [role for role in found.values() if not role.has_ended]
            routers = [role.name for role in running if role.kind == "router"]
            workers = [role.name for role in running if role.kind != "router"]
            for names in (routers, workers):
                for name in names:
                    self.end(name)
                self._await_end(names)
            self.gone(found)
        except RemoteError as error:
            return Stopped({}, {host.name: str(error) for host in self.record.hosts})
        names_of = {host.name: set(host.roles) for host in self.record.hosts}
        return Stopped(
            {
                host: tuple((role.name, role.pid or 0) for role in running if role.name in names)
                for host, names in names_of.items()
            },
            {},
        )

    def router_status(self) -> RouterStatus | None:
        """Return the router's STATUS; None if it does not answer, WireError if it cannot be read."""
        if (found := self._ask()) is not None:
            return found
        return self._ask() if self._locate() else None

    # --- steps --------------------------------------------------------------------------------

    def started(self, host: str, plan: HostPlan, role: HostRole) -> Started:
        """Return what a role of a plan is started with."""
        stop_s = plan.timing.router_stop_s if role.kind == "router" else plan.timing.worker_stop_s
        return Started(
            role.name, role.kind, host, role.argv, role.env, role.serves, role.gpus, plan.interpreter,
            stop_s, self.settings(role.kind),
        )  # fmt: skip

    def _replace(self, wanted: Sequence[Started], done: dict[str, Applied]) -> None:
        """End roles that are not wanted, or run as something else; then start all that do not run."""
        found = self.seen()
        running = {name: role for name, role in found.items() if not role.has_ended}
        same = {role.name for role in wanted if role.name in running and self._was(role)}
        ending = [name for name in running if name not in same]
        for name in ending:
            self.end(name)
        self._await_end(ending)
        self.gone(name for name in found if name not in same)
        names = {role.name for role in wanted}
        for name in ending:
            if name not in names and running[name].host in done:
                done[running[name].host].changed[name] = "stopped"
        # The router first: workers that find it at once need not look again.
        for role in sorted(wanted, key=lambda role: role.kind != "router"):
            if role.name in same:
                continue
            self._write(role)
            try:
                self.start(role)
            except RemoteError as error:
                before = done[role.host]
                done[role.host] = replace(before, error=f"{role.host}: {role.name}: {error}")
            else:
                done[role.host].changed[role.name] = "restarted" if role.name in running else "started"

    def _was(self, role: Started) -> bool:
        """Return whether that is what the role was started with last."""
        return self._path(role.name).exists() and self.last(role.name) == role

    def _await_end(self, names: Sequence[str]) -> None:
        give_up_s = time.monotonic() + _END_S
        while names:
            found = self.seen()
            waiting = [name for name in names if name in found and not found[name].has_ended]
            if not waiting:
                return
            if time.monotonic() > give_up_s:
                raise RemoteError(f"{', '.join(waiting)}: expected to end within {_END_S:g} s, still there")
            time.sleep(ASK_AGAIN_S)

    def _role(self, host: KnownHost, name: str, found: Mapping[str, RoleSeen]) -> RoleSeen:
        role = found.get(name)
        return absent(host, name, "STOPPED") if role is None else replace(role, host=host.name)

    # --- the router's place -------------------------------------------------------------------

    def _ask(self) -> RouterStatus | None:
        endpoint = self.record.client_endpoint
        if ROUTER_HOST in endpoint:
            return None
        try:
            return ask_status(endpoint, _STATUS_S, keys=self.record.keys)
        except NoRouterError:
            return None

    def _locate(self) -> bool:
        """Look where the router is; return whether that is news, and keep it."""
        address = self.router_address()
        if not address:
            return False
        ports = [end.rpartition(":")[2] for end in (self.record.client_endpoint, self.record.worker_endpoint)]
        bare = f"[{address}]" if ":" in address else address
        client, worker = (f"tcp://{bare}:{port}" for port in ports)
        if client == self.record.client_endpoint:
            return False
        self.record = replace(self.record, client_endpoint=client, worker_endpoint=worker)
        records.save(self.record)
        return True

    # --- what was started ---------------------------------------------------------------------

    @property
    def folder(self) -> Path:
        """The cluster's folder."""
        return Path(self.record.hosts[0].folder)

    def last(self, name: str) -> Started:
        """Return what a role was started with last; a further worker of a group gets what its siblings got.

        Raises:
            ConfigError: There is no such role or group.
        """
        path = self._path(name)
        if path.exists():
            try:
                body = json.loads(path.read_bytes())
            except (OSError, ValueError) as error:
                raise ConfigError(f"{path}: expected what `cluster up` writes: {error}") from error
            return read_file(Started, body, str(path))
        host = self.record.host_of(name)
        workers = [one for one in host.roles if one not in ("router", name)]
        sibling = next((one for one in workers if self._path(one).exists()), None)
        if sibling is None:
            raise ConfigError(f"{name}: expected a worker that was started on {host.name} before")
        role = further(self.last(sibling), name)
        self._write(role)
        return role

    def _path(self, name: str) -> Path:
        return self.folder / "roles" / f"{name}.json"

    def _write(self, role: Started) -> None:
        path = self._path(role.name)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_private(path, json.dumps(asdict(role), indent=1).encode())


def further(sibling: Started, name: str) -> Started:
    """Return another worker of the same group, with its own name and, if it has one, port for metrics."""
    words = list(sibling.argv)
    words[words.index("--name") + 1] = name
    theirs, ours = (_MEMBER.fullmatch(one) for one in (sibling.name, name))
    if "--metrics-port" in words and theirs is not None and ours is not None:
        place = words.index("--metrics-port") + 1
        words[place] = str(int(words[place]) + int(ours[2]) - int(theirs[2]))
    return replace(sibling, name=name, argv=tuple(words))


def _put(folder: Path, files: Mapping[str, str]) -> list[str]:
    """Write files that differ below a folder; return their names."""
    changed = []
    for name, text in _unpacked(files):
        path = folder / name
        if path.exists() and path.read_bytes() == text:
            continue
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_private(path, text)
        changed.append(name)
    return changed


def _unpacked(files: Mapping[str, str]) -> Iterator[tuple[str, bytes]]:
    for name, text in sorted(files.items()):
        yield name, base64.b64decode(text)


def read_here(argv: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start a command on this machine, whose output the caller reads."""
    return subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)


def tail_lines(text: str, n_lines: int = TAIL_LINES) -> list[str]:
    """Return the last lines of a text that are not empty."""
    return [line for line in text.splitlines() if line.strip()][-n_lines:]


def unreadable(what: str, said: Any) -> RemoteError:
    """Return the error for an engine's answer that has another form than expected."""
    return RemoteError(f"{what}: expected its usual form, got {said!r}")
