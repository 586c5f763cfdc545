"""The gateway of a hosts file: `gateway: {http_port: 8000, grpc_port: 8001, ...}`, on the router's host.

With `keys:` it uses the operator's key, which that host has for STATUS, and which the router admits as a
client's.
"""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING, Any

from cluster.spec.roles import GATEWAY, KEYS, OPERATOR_KEY, HostRole

if TYPE_CHECKING:
    from cluster.spec.hosts import GatewayPlace

HTTP_PORT = 8000


def gateway_on_host(
    place: GatewayPlace,
    connect: str,
    folder: str,
    *,
    has_keys: bool,
    is_open: bool,
    env: tuple[tuple[str, str], ...],
) -> HostRole:
    """Return the gateway's role on the router's host.

    Args:
        place: As in the file.
        connect: The router's client endpoint, as that host reaches it.
        folder: The cluster's there.
        has_keys: Whether the router admits listed keys only.
        is_open: Whether the file says `security: none`.
        env: Environment variables.
    """
    argv = [
        "-m", "gateway", "--connect", connect, "--address", place.address,
        "--http-port", str(place.http_port), "--http-processes", str(place.processes),
    ]  # fmt: skip
    if place.grpc_port is not None:
        argv += ["--grpc-port", str(place.grpc_port), "--grpc-processes", str(place.processes)]
    if place.default_slo_ms is not None:
        argv += ["--default-slo-ms", f"{place.default_slo_ms:g}"]
    for name in ("model", "tokenizer", "callers", "tls_cert", "tls_key"):
        if (value := getattr(place, name)) is not None:
            argv += [f"--{name.replace('_', '-')}", value]
    if has_keys:
        argv += ["--keys", f"{folder}/{KEYS}/{OPERATOR_KEY}"]
    if is_open and place.callers is None:
        argv += ["--security", "none"]
    words = f"HTTP at {place.address}:{place.http_port}"
    words += "" if place.grpc_port is None else f", gRPC at {place.address}:{place.grpc_port}"
    return HostRole(GATEWAY, GATEWAY, tuple(argv), env, words)


def check_gateway(data: dict[str, Any]) -> list[tuple[tuple[str | int, ...], str]]:
    """Return what is wrong with a file's gateway beyond its types, each with its path."""
    gateway = data.get("gateway")
    if not isinstance(gateway, dict):
        return []
    found: list[tuple[tuple[str | int, ...], str]] = []
    engine = data.get("engine", "ssh")
    if engine != "ssh":
        text = f"expected it with engine: ssh only, got {engine}; start `python -m gateway` there yourself"
        found.append((("gateway",), text))
    address = gateway.get("address", "127.0.0.1")
    is_guarded = gateway.get("callers") is not None or data.get("security") == "none"
    if isinstance(address, str) and not _is_loopback(address) and not is_guarded:
        text = f"others could call without a name: expected callers, or security: none, beside {address!r}"
        found.append((("gateway", "address"), text))
    if (gateway.get("tls_cert") is None) != (gateway.get("tls_key") is None):
        found.append((("gateway",), "expected tls_cert and tls_key, or neither"))
    return [*found, *_ports(data, gateway)]


def _ports(data: dict[str, Any], gateway: dict[str, Any]) -> list[tuple[tuple[str | int, ...], str]]:
    router, metrics = (
        part if isinstance(part := data.get(name), dict) else {} for name in ("router", "metrics")
    )
    used = {
        router.get("client_port", 5555): "router.client_port",
        router.get("worker_port", 5556): "router.worker_port",
        metrics.get("router"): "metrics.router",
    }  # fmt: skip
    found: list[tuple[tuple[str | int, ...], str]] = []
    for name, port in (
        ("http_port", gateway.get("http_port", HTTP_PORT)),
        ("grpc_port", gateway.get("grpc_port")),
    ):
        if port is None:
            continue
        if port in used:
            text = f"expected each port once on a host, and {used[port]} is {port} too"
            found.append((("gateway", name), text))
        used[port] = f"gateway.{name}"
    return found


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address.strip("[]")).is_loopback
    except ValueError:
        return address == "localhost"
