"""The files by which `supervisor` runs a cluster's roles on one host, as text.

    STATE/.hosts/CLUSTER/HOST/     0700
      supervisord.conf             one program a role; here is all of supervisor's configuration
      roles/NAME.sh                a role's command line and environment, runnable by hand
      NAME.log, NAME.log.1, ...    what it wrote; bounded
      plan.json, before.json       what runs, and what ran before the last change
      keys/, files/                0700: the keys and profiles that the roles read, 0600 each
      sv.sock, supervisord.log, supervisord.pid

A role's program carries a digest of its script, so that `update` sees a change of either.
"""

from __future__ import annotations

import hashlib
import shlex
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from superserve.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from typing import Self

OURS_VARIABLE = "SUPERSERVE_HOST_FOLDER"
"""Environment variable of every role: the folder of its cluster on its host."""

SOCKET = "sv.sock"
CONFIG = "supervisord.conf"
KEYS, FILES = FILLED = ("keys", "files")
"""Folders that hold exactly what `up` puts there."""

OPERATOR_KEY = "operator.key"
"""In KEYS of the router's host: what its STATUS is asked with."""

# A role counts as started after so long; one that ends sooner is started again after 1, 2 and
# 3 s, and then is FATAL. One that crashes later is started again at once.
START_S, START_RETRIES = 10, 3
STOP_S = 12  # a router drains for up to 5 s, a worker for up to 4
_MAX_SOCKET_PATH = 90  # of 107 bytes: supervisor appends its number while it binds
_SPECIAL = set("%;#\"'\\\n\r\t ")  # what an .ini file or a shell would read as its own


@dataclass(frozen=True, slots=True)
class HostRole:
    """One process to run on a host.

    Attributes:
        name: Unique in the cluster.
        kind: "router" or "worker".
        argv: The arguments of the host's Python.
        env: Environment variables, besides the host's own.
        serves: What it serves, in words.
    """

    name: str
    kind: str
    argv: tuple[str, ...]
    env: tuple[tuple[str, str], ...]
    serves: str

    @classmethod
    def from_dict(cls, body: Mapping[str, Any]) -> Self:
        """Read what `asdict` wrote and JSON carried."""
        env = tuple((str(name), str(value)) for name, value in body["env"])
        return cls(body["name"], body["kind"], tuple(body["argv"]), env, body["serves"])


@dataclass(frozen=True, slots=True)
class HostPlan:
    """What one host is to run.

    Attributes:
        folder: Of the cluster on that host.
        interpreter: The Python that runs the roles.
        code: The folder with the package.
        roles: The router first, where it is here.
        log_bytes: How large a log grows before it is put aside.
        log_files: How many put aside are kept.
    """

    folder: str
    interpreter: str
    code: str
    roles: tuple[HostRole, ...]
    log_bytes: int = 10 << 20
    log_files: int = 3

    def to_dict(self) -> dict[str, Any]:
        """Return what `from_dict` takes."""
        return asdict(self)

    @classmethod
    def from_dict(cls, body: Mapping[str, Any]) -> Self:
        """Read what `to_dict` gave and JSON carried."""
        return cls(**{**body, "roles": tuple(HostRole.from_dict(role) for role in body["roles"])})


def check_folder(folder: Path) -> None:
    """Raise ConfigError if supervisor could not work in a folder of that name."""
    if special := sorted(_SPECIAL & set(str(folder))):
        raise ConfigError(
            f"{folder}: expected a path without {special}; set SUPERSERVE_STATE on the host to another one"
        )
    if len(str(folder / SOCKET)) > _MAX_SOCKET_PATH:
        raise ConfigError(
            f"{folder}: expected a path of at most {_MAX_SOCKET_PATH - len(SOCKET) - 1} characters, since "
            f"it holds a socket; set SUPERSERVE_STATE on the host to a shorter one"
        )


def script(role: HostRole, plan: HostPlan) -> str:
    """Return the text of a role's script."""
    env = {**dict(role.env), "PYTHONPATH": plan.code, OURS_VARIABLE: plan.folder}
    words = [
        "exec", "env", *(f"{name}={value}" for name, value in sorted(env.items())),
        plan.interpreter, "-P", *role.argv,
    ]  # fmt: skip
    return f"#!/bin/sh\n# Written by `cluster up`, which overwrites it.\n{shlex.join(words)}\n"


def supervisord_conf(plan: HostPlan, *, min_files: int) -> str:
    """Return supervisor's configuration.

    Args:
        plan: What the host is to run.
        min_files: How many files a process may have open, at least.
    """
    head = f"""\
; Written by `cluster up`, which overwrites it.
[unix_http_server]
file=%(here)s/{SOCKET}
chmod=0700

[supervisord]
nodaemon=true
directory=%(here)s
logfile=%(here)s/supervisord.log
logfile_maxbytes=1MB
logfile_backups=1
pidfile=%(here)s/supervisord.pid
minfds={min_files}
umask=077

[rpcinterface:supervisor]
supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface
"""
    return head + "".join(_program(role, plan) for role in plan.roles)


def _program(role: HostRole, plan: HostPlan) -> str:
    digest = hashlib.sha256(script(role, plan).encode()).hexdigest()[:16]
    return f"""
[program:{role.name}]
command=/bin/sh %(here)s/roles/{role.name}.sh
environment=SUPERSERVE_ROLE_DIGEST="{digest}"
priority={1 if role.kind == "router" else 2}
autorestart=unexpected
exitcodes=0
startsecs={START_S}
startretries={START_RETRIES}
stopsignal=TERM
stopwaitsecs={STOP_S}
killasgroup=true
redirect_stderr=true
stdout_logfile=%(here)s/{role.name}.log
stdout_logfile_maxbytes={plan.log_bytes}
stdout_logfile_backups={plan.log_files}
"""
