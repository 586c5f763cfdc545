"""What each host of a hosts file will run: its roles, their command lines, and what they need there.

    router            on the router's host; binds every address of it, or loopback if that is all
                      the file names; of a list of routers: router-HOST-I
    gateway           on the first router's host, if the file has one
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

from cluster.spec.gateway import gateway_on_host
from cluster.spec.hostkeys import keys_of, operator_key
from cluster.spec.roles import (
    FILES,
    ROUTERS_FILE,
    SETTINGS,
    HostPlan,
    Target,
    Wanted,
    at,
    emulated,
    resident,
    router_role,
    routers_file,
    timing,
    worker_role,
)
from profiles.table import load_profile, shipped_profiles
from superserve.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cluster.spec.hostkeys import HostKeys
    from cluster.spec.hosts import Host, Hosts, RouterPlace
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
        router_host: The name of the router's host; of several, the first one's.
        client_endpoint: Where clients connect; of several routers, all of them with commas between.
        worker_endpoint: Where workers connect, in the same form.
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
        (*_routers(hosts, host, own), *_workers(hosts, host, profile, own), *_gateway(hosts, host))
        for host, own in zip(hosts.hosts, keys, strict=True)
    )
    wanted = tuple(_wanted(hosts, host, there) for host, there in zip(hosts.hosts, roles, strict=True))
    slots = tuple((name, host.gpus_per_worker or 1) for host in hosts.hosts for name in host.worker_names)
    return HostsPlan(
        hosts.cluster, str(path.absolute()), hosts.ssh_config, hosts.router.host,
        ",".join(_ends(hosts, "client")), ",".join(_ends(hosts, "worker")),
        hosts.emulate or hosts.serves, wanted, roles, slots,
        tuple(
            (*files, *own.files, *_settings(hosts, host), *_list_of_routers(hosts, host))
            for host, own in zip(hosts.hosts, keys, strict=True)
        ),
        hosts.log.megabytes << 20, hosts.log.files, operator_key(hosts),
    )  # fmt: skip


def _ends(hosts: Hosts, whose: str) -> list[str]:
    """Return each router's endpoint for clients or workers, as others reach it."""
    ports = {"client": "client_port", "worker": "worker_port"}
    return [at(_address(place), getattr(place, ports[whose])) for place in hosts.places]


def _address(place: RouterPlace) -> str:
    assert place.address is not None, "load_hosts fills it in"
    return place.address


def _list_of_routers(hosts: Hosts, host: Host) -> tuple[tuple[str, bytes], ...]:
    """Return the file that lists several routers, for a host with one of them."""
    if hosts.routers is None or host.name not in {place.host for place in hosts.places}:
        return ()
    return ((ROUTERS_FILE, list_of_routers(hosts)),)


def list_of_routers(hosts: Hosts, worker_ends: Sequence[str] | None = None) -> bytes:
    """Return the file that lists the routers of a hosts file, as others reach them; none if it has one.

    That one hears of others by this file, once there are some.

    Args:
        hosts: The file.
        worker_ends: Where workers reach each, if not at the address of the file.
    """
    if len(hosts.places) == 1:
        return routers_file((), ())
    return routers_file(_ends(hosts, "client"), worker_ends or _ends(hosts, "worker"))


def worker_ends(hosts: Hosts, host: Host, i: int) -> str:
    """Return what the `i`th worker of a host connects to: every router, with commas between."""
    # A router's own host may not reach itself at the address that others use.
    endpoints = [
        at(own_address(place) if host.name == place.host else _address(place), place.worker_port)
        for place in hosts.places
    ]
    # Each begins its list with another router: of routers that are alike it joins the first.
    first = sum(one.n_workers for one in hosts.hosts[: hosts.hosts.index(host)])
    turn = (first + i) % len(endpoints)
    return ",".join(endpoints[turn:] + endpoints[:turn])


def bound_at(place: RouterPlace) -> str:
    """Return what a router binds: loopback if that is all it is reached at, else every address."""
    address = _address(place)
    return own_address(place) if is_loopback(address) else "::" if ":" in address else EVERY


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
    open_at = [_address(place) for place in hosts.places if not is_loopback(_address(place))]
    if hosts.keys is not None or hosts.security == "none" or not open_at:
        return
    raise ConfigError(
        f"{path}: security: without keys nothing listens beyond loopback, and the router's address is "
        f"{open_at[0]}: make keys with `cluster keys make` and write `keys: FOLDER`, or write "
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
    here = [place for place in hosts.places if place.host == host.name]
    ports = [port for place in here for port in (place.client_port, place.worker_port)]
    if hosts.gateway is not None and host.name == hosts.router.host:
        ports += hosts.gateway.ports
    if here and hosts.metrics.router is not None:
        ports += range(hosts.metrics.router, hosts.metrics.router + len(here))
    if hosts.metrics.workers is not None:
        ports += range(hosts.metrics.workers, hosts.metrics.workers + host.n_workers)
    gpus = tuple(int(device.partition(":")[2]) for device in host.devices if device.startswith("cuda:"))
    gateway = hosts.gateway if host.name == hosts.router.host else None
    return Wanted(
        host.name, Target(host.address, host.user, host.port), host.python, tuple(ports),
        () if hosts.emulate is not None else gpus,
        hosts.emulate is None and host.n_workers > 0, tuple(role.name for role in roles),
        _looked_up(hosts, host), hosts.family is not None,
        gateway is not None, gateway is not None and gateway.tokenizer is not None,
    )  # fmt: skip


def _looked_up(hosts: Hosts, host: Host) -> str:
    """Return the name that a host's workers look up to find the router; "" if they look up none."""
    others = [_address(place) for place in hosts.places if place.host != host.name]
    names = [address for address in others if not _is_literal(address)]
    return names[0] if names and host.n_workers > 0 else ""


def _routers(hosts: Hosts, host: Host, keys: HostKeys) -> list[HostRole]:
    more = (
        *(("--keys", f"{FOLDER}/{keys.ring}") if keys.ring else ()),
        *(("--security", "none") if hosts.security == "none" else ()),
    )
    listed = () if hosts.routers is None else ("--routers", f"{FOLDER}/{ROUTERS_FILE}")
    tuning = hosts.tuning(f"{FOLDER}/{SETTINGS}")
    roles = []
    for i, (name, place) in enumerate(zip(hosts.router_names, hosts.places, strict=True)):
        if place.host != host.name:
            continue
        metrics = _metrics(hosts, hosts.router_metrics(i))
        client, worker = (at(bound_at(place), port) for port in (place.client_port, place.worker_port))
        role = router_role(client, worker, tuning, *more, *metrics, *listed, env=_env(host))
        roles.append(replace(role, name=name))
    return roles


def _settings(hosts: Hosts, host: Host) -> tuple[tuple[str, bytes], ...]:
    """Return the routers' settings for a host with one of them; nothing for others."""
    is_there = host.name in {place.host for place in hosts.places}
    return ((SETTINGS, hosts.tuning().content()),) if is_there else ()


def _gateway(hosts: Hosts, host: Host) -> list[HostRole]:
    if hosts.gateway is None or host.name != hosts.router.host:
        return []
    connect = ",".join(
        at(own_address(place) if place.host == host.name else _address(place), place.client_port)
        for place in hosts.places
    )
    return [
        gateway_on_host(
            hosts.gateway, connect, FOLDER, has_keys=hosts.keys is not None, is_open=hosts.security == "none",
            env=_env(host),
        )
    ]  # fmt: skip


def own_address(place: RouterPlace) -> str:
    """Return the address at which a router's own host reaches it."""
    return "::1" if ":" in _address(place) else "127.0.0.1"


def _metrics(hosts: Hosts, port: int | None) -> tuple[str, ...]:
    if port is None:
        return ()
    return ("--metrics-port", str(port), "--metrics-address", hosts.metrics.address)


def _env(host: Host) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(host.env.items()))


def _workers(hosts: Hosts, host: Host, profile: str, keys: HostKeys) -> list[HostRole]:
    admitted = ("--keys", f"{FOLDER}/{keys.worker}") if keys.worker else ()
    roles = []
    first_port = hosts.metrics.workers
    for i, (name, device) in enumerate(zip(host.worker_names, host.devices, strict=True)):
        metrics = _metrics(hosts, None if first_port is None else first_port + i)
        served = _served(hosts, host, profile, device)
        connect = worker_ends(hosts, host, i)
        roles.append(worker_role(name, connect, served, *admitted, *metrics, env=_env(host)))
    return roles


def _served(hosts: Hosts, host: Host, profile: str, device: str) -> Served:
    if hosts.emulate is not None:
        return emulated(profile, host.gpus_per_worker or 1, hosts.emulate)
    return resident(hosts.model, profile, device, host.threads or 1, hosts.weights)
