"""Which cluster a command offers its load to: from its options, checked before anything starts."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from gpu_worker.core.played import AS_PROFILED, Pace
from loadgen.live.run import Emulation
from loadgen.options import DEFAULT_POLICY, profile_and_n
from loadgen.results.tables import make_folder
from profiles.table import load_profile
from router.policies.registry import make_policy
from superserve.errors import ConfigError
from superserve.net.connection import ask_status
from superserve.net.endpoints import endpoints_of
from superserve.roles import local

if TYPE_CHECKING:
    from pathlib import Path
_ANY_PAYLOAD_BYTES = 64  # emulated GPUs ignore the payload
_MAX_GPUS = 4096


def target_of(
    connect: str | None,
    emulate: str | None,
    policy: str | None,
    logs: Path | None,
    *,
    pace: Pace = AS_PROFILED,
) -> Emulation | str:
    """Return the private cluster to start, or the endpoint to use.

    Args:
        connect: `HOST:PORT` of a router, or of several, separated by commas.
        emulate: `PROFILE:N`; with neither, the cluster that runs on this machine.
        policy: Of the private cluster.
        logs: Where it keeps its event logs.
        pace: Of its GPUs compared with their profile; a running cluster must have the default.

    Raises:
        ConfigError: The options exclude each other, or name something that does not exist.
    """
    if emulate is not None and connect is not None:
        raise ConfigError("--connect and --emulate: expected one of them, got both")
    if emulate is not None:
        if logs is not None:
            make_folder(logs, "--logs")
        found = _emulation(emulate, policy or DEFAULT_POLICY, logs)
        return replace(found, pace=pace)
    if pace != AS_PROFILED:
        raise ConfigError("--speed and --drift: a running cluster has its own; expected with --emulate only")
    if policy is not None:
        raise ConfigError("--policy: a running router has its own; expected with --emulate only")
    if connect is None:
        return _local_endpoint()
    parts = endpoints_of(connect, "--connect")
    return ",".join(part if "://" in part else f"tcp://{part}" for part in parts)


def _local_endpoint() -> str:
    """Return the client endpoint of this machine's cluster, or of one that it started on other hosts."""
    try:
        return local.client_endpoint()
    except ConfigError as error:
        raise ConfigError(
            f"{error}; or give --connect HOST:PORT of a running router, or --emulate PROFILE:N to start a "
            f"private one (such as cnn-8gpu-modelled:8)"
        ) from error


def keys_of(target: Emulation | str, keys: str | None) -> str:
    """Return the key file for the target: the given one, or the operator's; "" for a private cluster."""
    if isinstance(target, Emulation):
        return ""
    return local.remembered_keys(target) if keys is None else keys


def payload_bytes_of(target: Emulation | str, keys: str) -> int:
    """Return the bytes of a payload for the cluster's model; 64 if it takes any."""
    if isinstance(target, Emulation):
        return _ANY_PAYLOAD_BYTES
    model = ask_status(target, keys=keys).model
    return _ANY_PAYLOAD_BYTES if model is None or model.input is None else model.input.n_bytes


def _emulation(emulate: str, policy: str, logs: Path | None) -> Emulation:
    name, n_gpus = profile_and_n(emulate, most=_MAX_GPUS)
    make_policy(policy, load_profile(name))
    return Emulation(name, n_gpus, policy, folder=logs, record=logs is not None)
