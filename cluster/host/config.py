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
from typing import TYPE_CHECKING

from cluster.spec.roles import OURS_VARIABLE
from superserve.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from cluster.spec.roles import HostPlan, HostRole

SOCKET = "sv.sock"
CONFIG = "supervisord.conf"
# A role counts as started after so long; one that ends sooner is started again after 1, 2 and
# 3 s, and then is FATAL. One that crashes later is started again at once.
START_S, START_RETRIES = 10, 3
STOP_S = 12  # a router drains for up to 5 s, a worker for up to 4
_MAX_SOCKET_PATH = 90  # of 107 bytes: supervisor appends its number while it binds
_SPECIAL = set("%;#\"'\\\n\r\t ")  # what an .ini file or a shell would read as its own


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
        plan.interpreter, *role.argv,
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
