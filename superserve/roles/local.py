"""The clusters of this machine: where their state files are, and what is in them.

    $SUPERSERVE_STATE, else $XDG_STATE_HOME/superserve, else ~/.local/state/superserve
      default/              a folder a cluster, 0700; its name is `cluster up --name`
        state.json          a `LocalCluster` as JSON, 0600; exists while its keeper lives
        keeper.log, router.log, worker-0.log, ...

The keeper writes the file, whole or not at all. All others read it, to find the router without an
option, and to see which processes run. A keeper that was killed leaves its file behind, so a file
counts only while the process that it names lives. A process is identified by its number *and* the
instant at which it started, because numbers are soon reused.
"""

from __future__ import annotations

import contextlib
import enum
import os
import platform
import re
import select
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from superserve.errors import ConfigError
from superserve.fields import body_of, check_schema, read_file
from superserve.files import check_text, write_private

if TYPE_CHECKING:
    from typing import Self

STATE_VARIABLE = "SUPERSERVE_STATE"
"""Environment variable: the folder for the state of clusters, instead of the usual one."""

DEFAULT_NAME = "default"
"""The cluster that commands use if none is named."""

REMEMBERED = ".clusters"
"""The folder where this user's commands remember clusters on other hosts: see cluster/remote/record.py."""

SCHEMA = 2  # of the file of a local cluster: one of another version is refused

_FILE = "state.json"
_LOOK_S = 0.01  # between two checks of a process for which the kernel gives no descriptor
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_MAX_BYTES = 4 << 20  # a thousand roles, each with the end of its log, take less


class Phase(enum.StrEnum):
    """How far a cluster has got."""

    STARTING = "starting"  # the command that started it may still give up
    RUNNING = "running"
    STOPPING = "stopping"
    FAILED = "failed"  # only reported to the launcher: the file no longer exists


class RoleState(enum.StrEnum):
    """A role's state, in supervisor's words; `cluster.host.watched` has the transitions."""

    STARTING = "STARTING"  # its process runs and is not ready yet
    RUNNING = "RUNNING"  # it is ready
    BACKOFF = "BACKOFF"  # it crashed, and will soon be restarted
    STOPPING = "STOPPING"  # it was asked to end
    STOPPED = "STOPPED"  # it was asked to end, and did; or it was not started yet
    EXITED = "EXITED"  # it ended without being asked, with exit code 0
    FATAL = "FATAL"  # it ended too often, or before it was ever ready
    UNKNOWN = "UNKNOWN"


class Liveness(enum.Enum):
    """Whether the cluster of a state file runs."""

    ALIVE = "alive"
    GONE = "gone"  # its keeper ended without removing the file
    ELSEWHERE = "elsewhere"  # another host wrote the file: this one cannot check


@dataclass(frozen=True, slots=True)
class ProcessId:
    """A process of this machine, as opposed to a later one with the same number.

    Attributes:
        pid: The operating system's number.
        start_ticks: When it started, in clock ticks since the machine started: unlike wall-clock
            time it never shifts.
    """

    pid: int
    start_ticks: int

    @classmethod
    def of(cls, pid: int) -> Self | None:
        """Return the process with this number now; None if there is none, or a zombie."""
        try:
            text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None
        # The second field is the command in parentheses, which may contain anything: proc(5).
        state, *rest = text.rpartition(")")[2].split()
        return None if state in "ZX" else cls(pid, int(rest[18]))

    def is_alive(self) -> bool:
        """Return whether this very process still runs."""
        return ProcessId.of(self.pid) == self

    def open(self) -> int | None:
        """Return a descriptor of it that becomes readable when it ends; None if it has ended.

        The caller closes it. A signal sent through it reaches this process or none.

        Raises:
            OSError: The kernel gives none: before Linux 5.3, or if a container's profile forbids it.
        """
        try:
            descriptor = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return None
        if self.is_alive():
            return descriptor
        os.close(descriptor)
        return None

    def signal(self, number: int) -> bool:
        """Send a signal; return whether the process was there to receive it.

        Raises:
            ConfigError: The process belongs to another user.
        """
        try:
            try:
                return self._signal_by_descriptor(number)
            except OSError:
                # By number instead: this hits another process only if the number was reused in the
                # microseconds since the check.
                if not self.is_alive():
                    return False
                os.kill(self.pid, number)
        except ProcessLookupError:
            return False
        except PermissionError as error:
            raise ConfigError(f"process {self.pid} cannot be stopped: {error.strerror}") from error
        return True

    def _signal_by_descriptor(self, number: int) -> bool:
        descriptor = self.open()
        if descriptor is None:
            return False
        try:
            signal.pidfd_send_signal(descriptor, number)
        except ProcessLookupError:
            return False
        finally:
            os.close(descriptor)
        return True

    def await_end(self, timeout_s: float) -> bool:
        """Wait until it has ended; return whether it ended within `timeout_s` seconds."""
        deadline_s = time.monotonic() + timeout_s
        try:
            descriptor = self.open()
        except OSError:
            while (is_alive := self.is_alive()) and time.monotonic() < deadline_s:
                time.sleep(_LOOK_S)
            return not is_alive
        if descriptor is None:
            return True
        try:
            poller = select.poll()
            poller.register(descriptor, select.POLLIN)
            return bool(poller.poll(max(0, round(timeout_s * 1_000))))
        finally:
            os.close(descriptor)


@dataclass(frozen=True, slots=True)
class Role:
    """A router or worker, as the keeper sees it.

    Attributes:
        name: Unique in the cluster; workers also send it to the router.
        kind: "router", "worker" or "gateway".
        state: Its state.
        serves: What it serves, in words.
        log: The file with its output.
        process: Its process; None before the first start and after an end.
        restarts: How often it was restarted.
        why: How it last ended, with the last lines of its log; "" if it never did.
        metrics: Where it serves /metrics, HOST:PORT; "" if it does not.
    """

    name: str
    kind: str
    state: RoleState
    serves: str
    log: str
    process: ProcessId | None = None
    restarts: int = 0
    why: str = ""
    metrics: str = ""


@dataclass(frozen=True, slots=True)
class LocalCluster:
    """A cluster, as in its state file.

    Attributes:
        name: As given to `cluster up --name`.
        phase: How far it has got.
        host: The machine that wrote the file.
        boot_id: That machine's latest boot: process numbers mean nothing beyond it.
        keeper: The process that runs all others.
        since: When it was started, for people to read.
        options: What it was started with.
        client_endpoint: Where clients connect; "" until the router is ready.
        worker_endpoint: Where workers connect; "" until the router is ready.
        roles: The router first, then the workers.
    """

    name: str
    phase: Phase
    host: str
    boot_id: str
    keeper: ProcessId
    since: str
    options: dict[str, Any]
    client_endpoint: str
    worker_endpoint: str
    roles: tuple[Role, ...]

    def to_json(self) -> bytes:
        """Return the state file's text."""
        return orjson.dumps({"schema": SCHEMA, **body_of(self)}, option=orjson.OPT_INDENT_2)

    @classmethod
    def from_json(cls, text: bytes, where: str) -> Self:
        """Read a state file's text.

        Raises:
            ConfigError: It is malformed; the error names `where` and the field.
        """
        try:
            body = orjson.loads(text)
        except orjson.JSONDecodeError as error:
            raise ConfigError(f"{where}: expected JSON: {error}") from error
        check_schema(body, SCHEMA, where)
        cluster = read_file(cls, body, where)
        named = {"keeper": cluster.keeper, **{role.name: role.process for role in cluster.roles}}
        for name, process in named.items():
            if process is not None and process.pid <= 1:  # kill(2) takes 0 and below as groups, and 1 is init
                raise ConfigError(f"{where}: {name}: pid: expected a number above 1, got {process.pid}")
        return cluster

    def liveness(self) -> Liveness:
        """Return whether its keeper lives."""
        if self.boot_id != boot_id():
            return Liveness.GONE if self.host == platform.node() else Liveness.ELSEWHERE
        return Liveness.ALIVE if self.keeper.is_alive() else Liveness.GONE


def boot_id() -> str:
    """Return the kernel's identifier of this boot of the machine."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


# --- where ------------------------------------------------------------------------------------


def state_folder() -> Path:
    """Return the folder that contains a folder for each of this user's clusters on this machine.

    Raises:
        ConfigError: No variable names a folder, and the user has no home; or its path is not UTF-8.
    """
    folder = _state_folder()
    check_text([str(folder)])  # it stands in files of JSON
    return folder


def _state_folder() -> Path:
    if given := os.environ.get(STATE_VARIABLE):
        return Path(given).absolute()
    if given := os.environ.get("XDG_STATE_HOME"):
        return Path(given) / "superserve"
    try:
        return Path.home() / ".local" / "state" / "superserve"
    except RuntimeError:
        raise ConfigError(
            f"no folder for the state of clusters: HOME is not set, and user {os.getuid()} has no home; "
            f"set {STATE_VARIABLE} to a folder"
        ) from None


def cluster_folder(name: str) -> Path:
    """Return the folder of the cluster `name`, whether or not it exists.

    Raises:
        ConfigError: The name is invalid.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"--name: expected up to 64 letters, digits, '.', '_' or '-', not beginning with one of "
            f"the last three, got {name!r}"
        )
    return state_folder() / name


def load(folder: Path) -> LocalCluster | None:
    """Return the cluster in the state file in `folder`; None if there is no file.

    Raises:
        ConfigError: It cannot be read, is malformed, or belongs to another user.
    """
    path = folder / _FILE
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_uid != os.geteuid():
                raise ConfigError(
                    f"{path}: expected a file of this user; set {STATE_VARIABLE} to another folder"
                )
            text = file.read(_MAX_BYTES)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"{path}: expected a file that can be read: {error.strerror}") from error
    return LocalCluster.from_json(text, str(path))


def save(cluster: LocalCluster, folder: Path) -> None:
    """Write the state file: readers see the old one or the new one, never a part.

    Raises:
        OSError: It cannot be written.
    """
    write_private(folder / _FILE, cluster.to_json())


def forget(folder: Path) -> None:
    """Remove the state file, if it exists."""
    (folder / _FILE).unlink(missing_ok=True)


def names(base: Path | None = None) -> list[str]:
    """Return the clusters that have a state file, by name."""
    base = state_folder() if base is None else base
    with contextlib.suppress(OSError):
        return sorted(path.parent.name for path in base.glob(f"*/{_FILE}"))
    return []


def running(base: Path | None = None) -> LocalCluster:
    """Return the cluster that runs on this machine: the default one, or the only one.

    Raises:
        ConfigError: None runs, or several do and none is the default; the error shows what to type.
    """
    base = state_folder() if base is None else base
    found = {name: cluster for name in names(base) if (cluster := load(base / name)) is not None}
    alive = {name: cluster for name, cluster in found.items() if cluster.liveness() is Liveness.ALIVE}
    if DEFAULT_NAME in alive:
        return _serving(alive[DEFAULT_NAME])
    if len(alive) == 1:
        return _serving(*alive.values())
    if alive:
        which = ", ".join(f"{name} at {cluster.client_endpoint}" for name, cluster in alive.items())
        raise ConfigError(
            f"several clusters run on this machine: {which}: expected --connect with one of them"
        )
    if found:
        name, cluster = next(iter(found.items()))
        raise ConfigError(f"the cluster {name!r} of this machine {remains(cluster)}")
    raise ConfigError("no cluster runs on this machine: start one with `cluster up`")


def client_endpoint(base: Path | None = None) -> str:
    """Return the client endpoint of this machine's cluster, or of one that it started on other hosts.

    The latter counts only if this machine has none itself: the default one, or the only one. It is
    what the operator's commands remember, and may not run any more.

    Raises:
        ConfigError: There is none, or several; the error shows what to type.
    """
    base = state_folder() if base is None else base
    elsewhere = {} if names(base) else _remembered(base)
    if DEFAULT_NAME in elsewhere:
        return elsewhere[DEFAULT_NAME]
    if len(elsewhere) > 1:
        which = ", ".join(f"{name} at {endpoint}" for name, endpoint in sorted(elsewhere.items()))
        raise ConfigError(f"several clusters on other hosts are known: {which}: expected --connect with one")
    return next(iter(elsewhere.values())) if elsewhere else running(base).client_endpoint


def remembered_keys(endpoint: str, base: Path | None = None) -> str:
    """Return the key file for the router at `endpoint`, of a cluster that `cluster up FILE` started.

    Returns:
        The file's path; "" if this machine remembers no such cluster, or the cluster has no keys.
    """
    try:
        base = state_folder() if base is None else base
    except ConfigError:
        return ""  # without a folder nothing is remembered, and the endpoint was given
    for path in (base / REMEMBERED).glob("[!.]*.json"):
        with contextlib.suppress(OSError, orjson.JSONDecodeError, TypeError, KeyError):  # torn or foreign
            body = orjson.loads(path.read_bytes())
            if body["client_endpoint"] == endpoint:
                return str(body["keys"])
    return ""


def _remembered(base: Path) -> dict[str, str]:
    """Return the client endpoint of each cluster that `cluster up FILE` has started on hosts."""
    found = {}
    for path in (base / REMEMBERED).glob("[!.]*.json"):
        with contextlib.suppress(OSError, orjson.JSONDecodeError, TypeError, KeyError):  # torn or foreign
            found[path.stem] = str(orjson.loads(path.read_bytes())["client_endpoint"])
    return found


def _serving(cluster: LocalCluster) -> LocalCluster:
    if cluster.phase is not Phase.RUNNING:
        raise ConfigError(f"the cluster {cluster.name!r} of this machine is {cluster.phase}: try again later")
    return cluster


def remains(cluster: LocalCluster) -> str:
    """Return what is left of a cluster whose keeper is not alive on this machine, in words."""
    if cluster.liveness() is Liveness.ELSEWHERE:
        return f"was started on {cluster.host}, and can be seen from there only"
    return (
        f"is gone: its keeper (pid {cluster.keeper.pid}) ended without tidying up, and took all its "
        f"processes with it; start it again with `cluster up`"
    )
