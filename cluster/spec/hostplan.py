"""What each host of a hosts file will run: its roles, their command lines, and what they need there.

    router            on the router's host; binds every address of it, or loopback if that is all
                      the file names
    worker-HOST-I     one for each GPU of `gpus`, or `workers` of them

The paths of files on the operator's machine (a profile that is not a shipped one) become
files in the cluster's folder on each host; `{folder}` in an argument stands for that.
"""

from __future__ import annotations

import base64
import hashlib
import ipaddress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.spec.hostkeys import keys_of, operator_key
from cluster.spec.roles import (
    FILES,
    HostPlan,
    Target,
    Wanted,
    emulated,
    resident,
    router_role,
    timing,
    worker_role,
)
from profiles.table import load_profile, shipped_profiles
from superserve.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cluster.spec.hostkeys import HostKeys
    from cluster.spec.hosts import Host, Hosts
    from cluster.spec.roles import HostRole, Served

EVERY = "0.0.0.0"  # noqa: S104  only bound where `check_security` allows it
"""Every address of IPv4."""

FOLDER = "{folder}"
"""In a role's arguments: the cluster's folder on the role's host."""


@dataclass(frozen=True, slots=True)
class HostsPlan:
    """A cluster to run on several hosts.

    Attributes:
        name: Of the cluster.
        file: Its hosts file, as an absolute path.
        ssh_config: The file for `ssh -F`; None for the user's own.
        router_host: The name of the router's host.
        client_endpoint: Where clients connect.
        worker_endpoint: Where workers connect.
        profile: The profile that the workers use.
        wanted: What each host must have.
        roles: What each runs, in the same order.
        slots: How many GPUs each worker registers, by its name.
        files: Files beside the roles on each host, in the same order: a path in the folder, and the
            content. They include secrets.
        log_bytes: Size at which a log is rotated.
        log_files: How many rotated logs are kept.
        keys: The key file with which this machine's commands ask the router; "" without keys.
    """

    name: str
    file: str
    ssh_config: str | None
    router_host: str
    client_endpoint: str
    worker_endpoint: str
    profile: str
    wanted: tuple[Wanted, ...]
    roles: tuple[tuple[HostRole, ...], ...]
    slots: tuple[tuple[str, int], ...]
    files: tuple[tuple[tuple[str, bytes], ...], ...] = field(repr=False)
    log_bytes: int
    log_files: int
    keys: str

    def roles_of(self, host: str, folder: str) -> tuple[HostRole, ...]:
        """Return what a host will run, with paths in the cluster's folder there."""
        return tuple(
            replace(role, argv=tuple(word.replace(FOLDER, folder) for word in role.argv))
            for role in self.roles[self._place_of(host)]
        )

    def plan_of(self, host: str, folder: str, interpreter: str, code: str) -> HostPlan:
        """Return what a host will run, in its folder, with the Python and the package there."""
        roles = self.roles_of(host, folder)
        return HostPlan(folder, interpreter, code, roles, self.log_bytes, self.log_files, timing=timing())

    def files_of(self, host: str) -> dict[str, str]:
        """Return the files beside the roles of a host, as JSON carries them."""
        files = self.files[self._place_of(host)]
        return {name: base64.b64encode(content).decode() for name, content in files}

    def _place_of(self, host: str) -> int:
        return [want.name for want in self.wanted].index(host)


def plan_of(hosts: Hosts, path: Path) -> HostsPlan:
    """Return the plan for a hosts file.

    Raises:
        ConfigError: It is unsafe, or needs keys that are missing.
    """
    check_security(hosts, path)
    profile, files = served_profile(hosts)
    keys = [keys_of(hosts, host.name) for host in hosts.hosts]
    roles = tuple(
        (*_router(hosts, host, own), *_workers(hosts, host, profile, own))
        for host, own in zip(hosts.hosts, keys, strict=True)
    )
    wanted = tuple(_wanted(hosts, host, there) for host, there in zip(hosts.hosts, roles, strict=True))
    slots = tuple((name, host.gpus_per_worker or 1) for host in hosts.hosts for name in host.worker_names)
    return HostsPlan(
        hosts.cluster, str(path.absolute()), hosts.ssh_config, hosts.router.host,
        at(hosts.router_address, hosts.router.client_port),
        at(hosts.router_address, hosts.router.worker_port),
        hosts.emulate or hosts.serves, wanted, roles, slots, tuple((*files, *own.files) for own in keys),
        hosts.log.megabytes << 20, hosts.log.files, operator_key(hosts),
    )  # fmt: skip


def at(address: str, port: int) -> str:
    """Return the endpoint of a port at a name or an address; IPv6 addresses get brackets."""
    bare = address.strip("[]")
    return f"tcp://[{bare}]:{port}" if ":" in bare else f"tcp://{address}:{port}"


def _is_literal(address: str) -> bool:
    try:
        ipaddress.ip_address(address.strip("[]"))
    except ValueError:
        return False
    return True


def is_loopback(address: str) -> bool:
    """Return whether an address can only be reached from its own host."""
    try:
        return ipaddress.ip_address(address.strip("[]")).is_loopback
    except ValueError:
        return address == "localhost"


def check_security(hosts: Hosts, path: Path) -> None:
    """Raise ConfigError if a file without keys would open ports to other machines without leave."""
    if hosts.keys is not None or hosts.security == "none" or is_loopback(hosts.router_address):
        return
    raise ConfigError(
        f"{path}: security: without keys nothing listens beyond loopback, and the router's address is "
        f"{hosts.router_address}: make keys with `cluster keys make` and write `keys: FOLDER`, or write "
        f"`security: none` if every host that reaches it may use it"
    )


def served_profile(hosts: Hosts) -> tuple[str, tuple[tuple[str, bytes], ...]]:
    """Return a worker's option for its profile, and the file to send if it is not a shipped one."""
    name = hosts.emulate or hosts.serves
    if name in shipped_profiles():
        return name, ()
    content = load_profile(name).to_json()
    # With the digest another profile makes another command line, so that workers are restarted.
    place = f"{FILES}/{hashlib.sha256(content).hexdigest()[:12]}-{Path(name).name}"
    return f"{FOLDER}/{place}", ((place, content),)


def _wanted(hosts: Hosts, host: Host, roles: Sequence[HostRole]) -> Wanted:
    assert host.address is not None, "load_hosts fills it in"
    is_routers = host.name == hosts.router.host
    ports = [hosts.router.client_port, hosts.router.worker_port] if is_routers else []
    if is_routers and hosts.metrics.router is not None:
        ports.append(hosts.metrics.router)
    if hosts.metrics.workers is not None:
        ports += range(hosts.metrics.workers, hosts.metrics.workers + host.n_workers)
    gpus = tuple(int(device.partition(":")[2]) for device in host.devices if device.startswith("cuda:"))
    return Wanted(
        host.name, Target(host.address, host.user, host.port), host.python, tuple(ports),
        () if hosts.emulate is not None else gpus,
        hosts.emulate is None and host.n_workers > 0, tuple(role.name for role in roles),
        _looked_up(hosts, host), hosts.family is not None,
    )  # fmt: skip


def _looked_up(hosts: Hosts, host: Host) -> str:
    """Return the name that a host's workers look up to find the router; "" if they look up none."""
    is_needed = host.n_workers > 0 and host.name != hosts.router.host
    return hosts.router_address if is_needed and not _is_literal(hosts.router_address) else ""


def _router(hosts: Hosts, host: Host, keys: HostKeys) -> list[HostRole]:
    if host.name != hosts.router.host:
        return []
    bound = _own(hosts) if is_loopback(hosts.router_address) else "::" if _is_ipv6(hosts) else EVERY
    more = (
        *(("--keys", f"{FOLDER}/{keys.ring}") if keys.ring else ()),
        *(("--security", "none") if hosts.security == "none" else ()),
        *_metrics(hosts, hosts.metrics.router),
    )
    client, worker = at(bound, hosts.router.client_port), at(bound, hosts.router.worker_port)
    return [router_role(client, worker, hosts.policy, hosts.margin_ms, *more, env=_env(host))]


def _is_ipv6(hosts: Hosts) -> bool:
    return ":" in hosts.router_address


def _own(hosts: Hosts) -> str:
    """Return the address at which the router's own host reaches it."""
    return "::1" if _is_ipv6(hosts) else "127.0.0.1"


def _metrics(hosts: Hosts, port: int | None) -> tuple[str, ...]:
    if port is None:
        return ()
    return ("--metrics-port", str(port), "--metrics-address", hosts.metrics.address)


def _env(host: Host) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(host.env.items()))


def _workers(hosts: Hosts, host: Host, profile: str, keys: HostKeys) -> list[HostRole]:
    # The router's own host may not reach itself at the address that others use.
    address = _own(hosts) if host.name == hosts.router.host else hosts.router_address
    endpoint = at(address, hosts.router.worker_port)
    admitted = ("--keys", f"{FOLDER}/{keys.worker}") if keys.worker else ()
    roles = []
    first_port = hosts.metrics.workers
    for i, (name, device) in enumerate(zip(host.worker_names, host.devices, strict=True)):
        metrics = _metrics(hosts, None if first_port is None else first_port + i)
        served = _served(hosts, host, profile, device)
        roles.append(worker_role(name, endpoint, served, *admitted, *metrics, env=_env(host)))
    return roles


def _served(hosts: Hosts, host: Host, profile: str, device: str) -> Served:
    if hosts.emulate is not None:
        return emulated(profile, host.gpus_per_worker or 1, hosts.emulate)
    return resident(hosts.model, profile, device, host.threads or 1, hosts.weights)
