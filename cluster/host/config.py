"""The files by which `supervisor` runs a cluster's roles on one host, as text.

    STATE/CLUSTER/               0700; on other hosts STATE/.hosts/CLUSTER/HOST/
      supervisord.conf           one program for each role; all of supervisor's configuration is here
      roles/NAME.sh              a role's command line and environment, runnable by hand
      NAME.log, NAME.log.1, ...  its output; bounded
      plan.json, before.json     what runs, and what ran before the last change
      keys/, files/              0700: the keys and profiles that the roles read, 0600 each
      sv.sock, keeper.log, keeper.pid, lock

A role's program contains a digest of its script, so that `update` notices a change of either. If only the
list of routers to connect to is another one, and one router is on both, the digest stays: the role hears of
the others from that router, and the script is for its next start. Paths are relative to the folder, where
supervisord runs: no character of the folder's name can confuse an .ini file.
"""

from __future__ import annotations

import hashlib
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.spec.roles import OURS_VARIABLE

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cluster.spec.roles import HostPlan, HostRole

SOCKET = "sv.sock"
CONFIG = "supervisord.conf"
PLAN, BEFORE = "plan.json", "before.json"
"""What runs, and what ran before the last `apply`."""

PRIORITIES = {"gateway": 0, "router": 1}
"""Which roles stop first; workers come last, all at once."""
KEEPER_LOG = "keeper.log"
"""The keeper's own log: starts, ends and restarts."""

KEEP, KEPT = b"keep\n", b"kept\n"
"""What the command that starts a cluster of this machine sends to the keeper, and the answer."""

_DIGEST = re.compile(
    r'^\[program:(.+)\]\ncommand=.*\nenvironment=SUPERSERVE_ROLE_DIGEST="(\w+)"$', re.MULTILINE
)
_TAIL_BYTES = 8_192  # a screen of lines; logs can be large


def script(role: HostRole, plan: HostPlan) -> str:
    """Return the text of a role's script."""
    # A killed role cannot flush, and its last lines are the important ones.
    env = {"PYTHONUNBUFFERED": "1", **dict(role.env), OURS_VARIABLE: plan.folder}
    if plan.code:
        env["PYTHONPATH"] = plan.code
    words = [
        "exec", "env", *(f"{name}={value}" for name, value in sorted(env.items())),
        # -P: no file in the current folder can replace a module of the package.
        plan.interpreter, "-P", *role.argv,
    ]  # fmt: skip
    return (
        "#!/bin/sh\n# Written by `cluster up`, which overwrites it.\n"
        f"cd {shlex.quote(plan.cwd)} || cd /\n{shlex.join(words)}\n"
    )


def kept_digests(before: HostPlan, config: str, plan: HostPlan) -> dict[str, str]:
    """Return the digests of roles that may run on as they are, by name.

    Args:
        before: What the host has run so far.
        config: Supervisor's configuration for that.
        plan: What it will run.
    """
    digests = dict(_DIGEST.findall(config))
    old = {role.name: role for role in before.roles}
    return {
        role.name: digests[role.name]
        for role in plan.roles
        if role.name in digests and role.name in old and _runs_on(old[role.name], before, role, plan)
    }


def _runs_on(old: HostRole, before: HostPlan, new: HostRole, plan: HostPlan) -> bool:
    """Return whether two roles are the same but for routers, and a process of the one knows the other's."""
    bare, routers = zip(*(_without_routers(role) for role in (old, new)), strict=True)
    if script(bare[0], before) != script(bare[1], plan):
        return False
    return routers[0] == routers[1] or bool(routers[0] & routers[1])


def _without_routers(role: HostRole) -> tuple[HostRole, frozenset[str]]:
    """Return a role without the routers that it connects to, and those."""
    if "--connect" not in role.argv:
        return role, frozenset()
    at = role.argv.index("--connect") + 1
    return replace(role, argv=(*role.argv[:at], *role.argv[at + 1 :])), frozenset(role.argv[at].split(","))


def supervisord_conf(plan: HostPlan, *, min_files: int, digests: Mapping[str, str] | None = None) -> str:
    """Return supervisor's configuration.

    Args:
        plan: What the host runs.
        min_files: How many files a process must be able to open.
        digests: Of roles that run on, by name, from `kept_digests`.
    """
    digests = digests or {}
    head = f"""\
; Written by `cluster up`, which overwrites it.
[unix_http_server]
file={SOCKET}
chmod=0700

[supervisord]
nodaemon=true
silent=true
nocleanup=true
logfile={KEEPER_LOG}
logfile_maxbytes=1MB
logfile_backups=1
pidfile=keeper.pid
childlogdir=.
minfds={min_files}
umask=077

[rpcinterface:supervisor]
supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface

[rpcinterface:superserve]
supervisor.rpcinterface_factory=cluster.host.watch:make_rpc
"""
    return head + "".join(
        _program(role, plan, digests.get(role.name) or _digest(role, plan)) for role in plan.roles
    )


def _digest(role: HostRole, plan: HostPlan) -> str:
    return hashlib.sha256(script(role, plan).encode()).hexdigest()[:16]


def _program(role: HostRole, plan: HostPlan, digest: str) -> str:
    return f"""
[program:{role.name}]
command=/bin/sh roles/{role.name}.sh
environment=SUPERSERVE_ROLE_DIGEST="{digest}"
priority={PRIORITIES.get(role.kind, 2)}
autorestart=unexpected
exitcodes=0
stopsignal=TERM
killasgroup=true
redirect_stderr=true
stdout_logfile={role.name}.log
stdout_logfile_maxbytes={plan.log_bytes}
stdout_logfile_backups={plan.log_files}
"""


def tail_of(path: Path | str, n_lines: int, *, start: int = 0) -> list[str]:
    """Return the last non-empty lines of a log, from byte `start` on."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            begin = start if start <= size else 0  # the log was rotated since
            file.seek(max(begin, size - _TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return []
    return [line for line in lines if line.strip()][-n_lines:]
