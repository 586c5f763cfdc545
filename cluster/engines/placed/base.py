"""What the engines share that choose the machines themselves: plans without addresses, and the verbs on them.

Such an engine places a role where it likes, so that only it knows where the routers are: see `routing`. What
was started last is kept in the cluster's folder:

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
from cluster.spec.roles import at, is_router
from superserve.errors import ConfigError, NoRouterError
from superserve.fields import read_file
from superserve.files import write_private
from superserve.net.connection import ask_status

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from cluster.remote.record import KnownHost, Record
    from cluster.spec.roles import HostPlan, HostRole
    from superserve.status import RouterStatus

UNKNOWN = "{router}"
"""In the record's endpoints: the address of a router that has not been found yet."""

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
        argv: The arguments of Python, with the names of `routing` for where the routers are.
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
        record: What is known about the cluster; saved whenever a router turns out to be elsewhere.

    Attributes:
        record: The same, as it is now.
        shares_network: Whether roles on a node share its ports.
    """

    shares_network = True

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
    def router_addresses(self) -> dict[str, str]:
        """Return where each router is now, by its name; without those that do not run."""

    @abstractmethod
    def gone(self, names: Iterable[str]) -> None:
        """End at once what is left of roles that have drained, and release what the engine holds for them."""

    @abstractmethod
    def logs(self, role: str, n_lines: int = TAIL_LINES) -> list[str]:
        """Return the last lines of a role's log."""

    @abstractmethod
    def follow(self, role: str, n_lines: int) -> subprocess.Popen[bytes]:
        """Start what prints the last lines of a role's log and then each new one."""

    def sent(self, changed: Sequence[str]) -> None:  # noqa: B027  nodes with a shared file system see them
        """Bring files of the cluster's folder that have changed to where routers run."""

    # --- verbs --------------------------------------------------------------------------------

    def tune(self, settings: bytes) -> None:
        """Give the routers other settings, which each reads by itself.

        Raises:
            RemoteError: A file is not where `cluster up` puts it, or a router cannot be reached.
        """
        changed = []
        for name in self.routers:
            argv = self.last(name).argv
            if "--settings" not in argv:
                raise RemoteError(f"{name}: started by an earlier version: `cluster up` restarts it")
            path = Path(argv[argv.index("--settings") + 1])
            write_private(path, settings)
            changed.append(str(path.relative_to(self.folder)))
        self.sent(changed)

    @property
    def routers(self) -> list[str]:
        """The names of the routers."""
        return [name for name in self.record.role_names if is_router(name)]

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
            if changed := [name for one in done.values() for name in one.files]:
                self.sent(changed)
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
        """Stop the routers, while workers still answer what they hold, then everything."""
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
        found = self._ask()
        # One that does not answer may be elsewhere now.
        is_located = UNKNOWN not in self.record.client_endpoint
        if is_located and found is not None and all(share.answers for share in found.routers or ()):
            return found
        return self._ask() if self._locate() else found

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
        names = {role.name for role in wanted}
        for path in (self.folder / "roles").glob("*.json"):
            if path.stem not in names:  # before a router drains: others then do not list it any more
                path.unlink()
        ending = [name for name in running if name not in same]
        for name in ending:
            self.end(name)
        self._await_end(ending)
        self.gone(name for name in found if name not in same)
        for name in ending:
            if name not in names and running[name].host in done:
                done[running[name].host].changed[name] = "stopped"
        # Routers first: workers that find it at once need not look again.
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
        """Return whether that is what the role was started with last, but for the words about it."""
        if not self._path(role.name).exists():
            return False
        before = self.last(role.name)
        if replace(before, serves=role.serves) != role:
            return False
        if before != role:
            self._write(role)
        return True

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

    # --- where the routers are ----------------------------------------------------------------

    def _ask(self) -> RouterStatus | None:
        """Ask the routers where they were last; None if none answers."""
        known = [end for end in self.record.client_endpoint.split(",") if UNKNOWN not in end]
        if not known:
            return None
        try:
            return ask_status(",".join(known), _STATUS_S, keys=self.record.keys)
        except NoRouterError:
            return None

    def _locate(self) -> bool:
        """Look where the routers are; return whether that is news, and keep it."""
        found = self.router_addresses()
        ends = zip(
            self.routers, self.record.client_endpoint.split(","), self.record.worker_endpoint.split(","),
            strict=True,
        )  # fmt: skip
        now = [
            [
                at(found[name], int(end.rpartition(":")[2])) if name in found else end
                for end in (client, worker)
            ]
            for name, client, worker in ends
        ]
        client, worker = (",".join(each) for each in zip(*now, strict=True))
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
        workers = [one for one in host.roles if one != name and not is_router(one)]
        sibling = next((one for one in workers if self._path(one).exists()), None)
        if sibling is None:
            raise ConfigError(f"{name}: expected a worker that was started on {host.name} before")
        role = further(self.last(sibling), name, shares_network=self.shares_network)
        self._write(role)
        return role

    def _path(self, name: str) -> Path:
        return self.folder / "roles" / f"{name}.json"

    def _write(self, role: Started) -> None:
        path = self._path(role.name)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_private(path, json.dumps(asdict(role), indent=1).encode())


def further(sibling: Started, name: str, *, shares_network: bool) -> Started:
    """Return another worker of the same group: with its own name, and port for metrics on a shared node."""
    words = list(sibling.argv)
    words[words.index("--name") + 1] = name
    theirs, ours = (_MEMBER.fullmatch(one) for one in (sibling.name, name))
    if shares_network and "--metrics-port" in words and theirs is not None and ours is not None:
        place = words.index("--metrics-port") + 1
        words[place] = str(int(words[place]) + int(ours[2]) - int(theirs[2]))
    return replace(sibling, name=name, argv=tuple(words))


def _put(folder: Path, files: Mapping[str, str]) -> list[str]:
    """Write files that differ below a folder, remove those that a group has no more, and return their names.

    A file that stays would be a key that is still listed.
    """
    changed = []
    for group in sorted({"/".join(name.split("/")[:2]) for name in files}):
        for path in sorted((folder / group).rglob("*")):
            name = str(path.relative_to(folder))
            if path.is_file() and name not in files:
                path.unlink()
                changed.append(name)
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
