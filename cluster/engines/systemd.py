"""systemd units: one for each role, in a folder for each host, and a target that starts them at boot.

    HOST/superserve-NAME.service        a role; active once it is ready
    HOST/superserve.target              all of the host's roles
    HOST/CLUSTER/...                    what they read: copy it to /etc/superserve/CLUSTER

Units of a cluster that is not called "default" have its name after "superserve-".

Secrets reach a role as credentials, readable by that unit alone. A router's lists stay files, since
credentials do not change while a unit runs, and a revoked key must be cut off at once. So does the list of
routers: a router that is added or taken away restarts no other.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from cluster.engines.describe import ROUTER, RolePlace
from cluster.engines.text import Rendered
from cluster.spec.hostplan import bound_at, check_security, list_of_routers, worker_ends
from cluster.spec.roles import KEYS, ROUTERS_FILE
from superserve.roles.local import DEFAULT_NAME

if TYPE_CHECKING:
    from cluster.engines.containers import RenderOptions
    from cluster.engines.describe import Description, Process, RoleGroup

ETC = "/etc/superserve"
"""Where the files of a host's clusters lie, in a folder for each."""

_CREDENTIALS = "${CREDENTIALS_DIRECTORY}"
_PLAIN = re.compile(r"[A-Za-z0-9_@%+=:,./-]+")
_PAST_DRAIN_S = 2

_HARDENING = (
    "NoNewPrivileges=yes", "CapabilityBoundingSet=", "ProtectSystem=strict", "ProtectHome=read-only",
    "PrivateTmp=yes", "ProtectKernelTunables=yes", "ProtectKernelModules=yes", "ProtectKernelLogs=yes",
    "ProtectControlGroups=yes", "ProtectClock=yes", "ProtectHostname=yes", "ProtectProc=invisible",
    "RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX AF_NETLINK", "RestrictNamespaces=yes",
    "RestrictRealtime=yes", "RestrictSUIDSGID=yes", "LockPersonality=yes", "SystemCallArchitectures=native",
    "SystemCallFilter=@system-service", "SystemCallFilter=~@privileged", "UMask=0077",
)  # fmt: skip
_WITHOUT_GPU = ("PrivateDevices=yes",)
_WITH_GPU = ("DevicePolicy=closed", "DeviceAllow=char-nvidia* rw", "DeviceAllow=char-nvidia-uvm rw")


def render(description: Description, options: RenderOptions) -> tuple[Rendered, ...]:
    """Return the units of every host, and the files that they read.

    Raises:
        ConfigError: The file is unsafe without keys.
    """
    del options  # units name no image, and root puts their files in place
    check_security(description.hosts, description.file)
    found: list[Rendered] = []
    for host in description.hosts.hosts:
        groups = [group for group in description.groups if group.host == host.name]
        if not groups:
            continue
        units = [
            (process, group, f"{_prefix(description)}-{process.name}.service")
            for group in groups
            for process in group.processes
        ]
        found.append(
            Rendered(f"{host.name}/{_target_name(description)}", _target([unit for _, _, unit in units]))
        )
        found += [
            Rendered(f"{host.name}/{unit}", _unit(description, group, process, host.python))
            for process, group, unit in units
        ]
        if description.is_listed and any(group.is_router for group in groups):
            listed = list_of_routers(description.hosts).decode()
            place = f"{host.name}/{description.name}/{ROUTERS_FILE}"
            found.append(Rendered(place, listed, is_beside=True))
        found += [
            Rendered(f"{host.name}/{place}", file.content.decode(), file.is_secret, is_beside=True)
            for place, file in {
                f"{description.name}/{file.path}": file for group in groups for file in group.files
            }.items()
        ]
    return tuple(found)


def _prefix(description: Description) -> str:
    return "superserve" if description.name == DEFAULT_NAME else f"superserve-{description.name}"


def _target_name(description: Description) -> str:
    return f"{_prefix(description)}.target"


def _target(units: list[str]) -> str:
    return _section("Unit", "Description=SuperServe", f"Wants={' '.join(units)}") + _section(
        "Install", "WantedBy=multi-user.target"
    )


def _section(name: str, *lines: str) -> str:
    return "\n".join((f"[{name}]", *lines, "", ""))


def _unit(description: Description, group: RoleGroup, process: Process, python: str) -> str:
    """Return the unit of one process."""
    place = _place(description, group, process)
    argv = (python, "-P", *description.argv(group, place))
    environment = [f"Environment={_in_quotes(_escaped(f'{name}={value}'))}" for name, value in group.env]
    return (
        _section(
            "Unit", f"Description=SuperServe {process.name}: {_escaped(group.serves)}",
            f"PartOf={_target_name(description)}",
            "Wants=network-online.target", "After=network-online.target",
            "StartLimitIntervalSec=60", "StartLimitBurst=5",
        )
        + _section(
            "Service", "Type=notify", f"ExecStart={' '.join(_quoted(word) for word in argv)}",
            *environment, "Environment=PYTHONUNBUFFERED=1 HOME=%C/superserve XDG_CACHE_HOME=%C/superserve",
            *_credentials(description, group),
            # A worker is ready once a router has welcomed it, and waits for one as long as it takes.
            "TimeoutStartSec=60" if group.is_router else "TimeoutStartSec=infinity",
            f"TimeoutStopSec={group.stop_s + _PAST_DRAIN_S}",
            "Restart=on-failure", "RestartSec=1", "LimitNOFILE=65536",
            "DynamicUser=yes", "User=superserve", "CacheDirectory=superserve",
            *(_WITH_GPU if group.gpus else _WITHOUT_GPU), *_HARDENING,
        )
        + _section("Install", f"WantedBy={_target_name(description)}").rstrip("\n") + "\n"
    )  # fmt: skip


def _place(description: Description, group: RoleGroup, process: Process) -> RolePlace:
    hosts, folder = description.hosts, f"{ETC}/{description.name}"
    metrics = None if process.metrics is None else (hosts.metrics.address, process.metrics)
    if group.is_router:
        return RolePlace(
            folder, bind=bound_at(hosts.places[description.routers.index(group)]), metrics=metrics,
            router_key=f"{_CREDENTIALS}/router.key",
            listed=f"{folder}/{ROUTERS_FILE}" if description.is_listed else "",
        )  # fmt: skip
    connect = worker_ends(hosts, hosts.host(group.host), group.processes.index(process))
    return RolePlace(
        folder, (connect,), name=process.name, device=process.device, metrics=metrics,
        worker_key=f"{_CREDENTIALS}/worker.key",
    )  # fmt: skip


def _credentials(description: Description, group: RoleGroup) -> list[str]:
    if not description.has_keys:
        return []
    name = "router.key" if group.kind == ROUTER else "worker.key"
    return [f"LoadCredential={name}:{ETC}/{_escaped(description.name)}/{KEYS}/{name}"]


def _escaped(text: str) -> str:
    """Return text in which systemd replaces nothing."""
    return text.replace("%", "%%")


def _quoted(word: str) -> str:
    """Return a word of a command line, in which systemd replaces nothing but the credentials' folder."""
    text = _escaped(word)
    if not text.startswith(_CREDENTIALS):
        text = text.replace("$", "$$")
    if _PLAIN.fullmatch(text.removeprefix(_CREDENTIALS)):
        return text
    return _in_quotes(text)


def _in_quotes(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
