"""The errors of a hosts file, all of them at once: `FILE:LINE: path: what was expected, got ...`.

Pydantic checks each value on its own. What concerns several values, such as a port that is used twice, is
checked on the data of the file, without the wrong values, so that one kind of error does not hide the
other.
"""

from __future__ import annotations

import dataclasses
import difflib
import io
import json
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_type_hints

from pydantic import TypeAdapter, ValidationError
from ruamel.yaml import YAML

from cluster.spec import hostkeys
from cluster.spec.engines import KUBERNETES, RAY, SLURM, SSH, KubernetesSettings, RaySettings, SlurmSettings
from cluster.spec.gateway import check_gateway
from cluster.spec.hosts import (
    CLIENT_PORT,
    WORKER_PORT,
    GatewayPlace,
    Host,
    Hosts,
    LogBounds,
    MetricsPorts,
    RouterPlace,
)
from cluster.spec.plan import DEFAULT_PROFILE, MAX_WORKERS
from cluster.spec.yaml_lines import Where, read_located
from gpu_worker.family.file import NEEDS_PROFILE
from gpu_worker.models.names import DIGITS, SHIPPED_SUPERNETS, is_known
from profiles.table import load_profile, shipped_profiles
from router.policies.registry import make_policy
from superserve.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pydantic_core import ErrorDetails

Found = tuple[Where, str]
"""An error: the path to the value, and what was expected."""

T = TypeVar("T")

_RESERVED = ("PYTHONPATH", "SUPERSERVE_HOST_FOLDER", "SUPERSERVE_ROLE_DIGEST", "SUPERSERVE_KEYS")
_SECTIONS: dict[str, type] = {
    "router": RouterPlace, "routers[i]": RouterPlace, "hosts[i]": Host, "metrics": MetricsPorts,
    "log": LogBounds, "slurm": SlurmSettings, "ray": RaySettings, "kubernetes": KubernetesSettings,
    "gateway": GatewayPlace,
}  # fmt: skip
_MOST_NOTICE_S = 65_535  # sbatch's own bound for --signal
_MAX_SHOWN = 60  # of a value in a message: the message should stay one line


def read(path: Path) -> Hosts:
    """Read a hosts file with every default filled in; ConfigError with a line for every error."""
    located = read_located(path)
    errors = [(line, where, f"expected once, is on line {first} too") for line, where, first in located.twice]
    hosts, found = _checked(located.data)
    data = located.data if isinstance(located.data, dict) else {}
    for check in _CHECKS:
        found += check(data)
    found += _serving(data, path.parent)
    errors += [(located.line(where), where, text) for where, text in found]
    if errors:
        unique = sorted(set(errors), key=lambda error: (error[0], str(error[1]), error[2]))
        raise ConfigError("\n".join(_line(path, *error) for error in unique))
    assert hosts is not None, "pydantic found no errors"
    return _filled(hosts, path.parent)


def dump(hosts: Hosts) -> str:
    """Return the text of a hosts file for `hosts`, with defaults; `load_hosts` reads it back."""
    text = io.StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # it is typed as None
    said = _said(dataclasses.asdict(hosts))
    if hosts.routers is not None:
        del said["router"]  # it is the first of them
    yaml.dump(said, text)
    return text.getvalue()


def _said(value: Any) -> Any:
    """Return data without None, which a hosts file leaves out."""
    if isinstance(value, dict):
        return {key: _said(item) for key, item in value.items() if item is not None and item != {}}
    return [_said(item) for item in value] if isinstance(value, list | tuple) else value


def _line(path: Path, line: int, where: Where, text: str) -> str:
    return f"{path}:{line}: {path_text(where)}: {text}" if where else f"{path}:{line}: {text}"


def path_text(where: Where) -> str:
    """Return the path to a value as people write it: hosts[1].gpus."""
    text = ""
    for step in where:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else step
    return text


# --- each value on its own --------------------------------------------------------------------


def _checked(data: Any) -> tuple[Hosts | None, list[Found]]:
    if not isinstance(data, dict):
        return None, [((), f"expected a mapping with router and hosts, got {_shown(data)}")]
    try:
        # Strict as JSON: a list may become a tuple there, but text never a number.
        return TypeAdapter(Hosts).validate_json(json.dumps(data)), []
    except ValidationError as error:
        # Pydantic also reports a list with wrong items as too short, which it is not.
        errors = [
            each
            for each in error.errors(include_url=False)
            if each["type"] != "too_short" or len(each["input"]) < each["ctx"]["min_length"]
        ]
        return None, [_said_by_pydantic(each) for each in errors]


def _said_by_pydantic(error: ErrorDetails) -> Found:
    where = tuple(step for step in error["loc"] if step != "[key]")
    kind, context = error["type"], error.get("ctx", {})
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        return where, _unknown_key(where)
    if kind in ("missing", "missing_argument"):
        return where, f"expected {_WANTED.get(str(where[-1]), 'a value')}, got nothing"
    if kind in ("too_short", "too_long"):
        least, most = context.get("min_length"), context.get("max_length")
        bound = f"at least {least}" if least is not None else f"at most {most}"
        return where, f"expected {bound}, got {context['actual_length']}"
    words = _WORDS.get(kind, error["msg"][:1].lower() + error["msg"][1:])
    if kind == "string_pattern_mismatch":
        words = _pattern_words(str(context["pattern"]))
    return where, f"expected {words.format(**context)}, got {_shown(error['input'])}"


_WANTED = {"router": "{host: NAME}, the host that the router runs on", "host": "a host's name",
           "hosts": "a list of hosts", "name": "a name, unique in the file"}  # fmt: skip
_WORDS = {
    "int_type": "a whole number",
    "float_type": "a number",
    "string_type": "text (quote it if it looks like something else)",
    "tuple_type": "a list, such as [0, 1]",
    "dict_type": "a mapping",
    "dataclass_type": "a mapping of keys and values",
    "literal_error": "{expected}",
    "greater_than_equal": "{ge} or more",
    "less_than_equal": "{le} or less",
    "finite_number": "a finite number",
    "string_too_long": "at most {max_length} characters",
}


def _pattern_words(pattern: str) -> str:
    if "._-" in pattern:
        return "a name of up to 64 letters, digits, '.', '_' or '-', beginning with a letter or digit"
    if r"\s" in pattern:
        return "text without spaces that does not begin with '-'"
    return "a variable's name" if pattern.startswith("^[A-Za-z_]") else "one line of text"


def _shown(value: Any) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def _unknown_key(where: Where) -> str:
    """Return the error for an unknown key: the nearest one here, or where the same one belongs."""
    key = str(where[-1])
    known = _keys(_class_at(where[:-1]))
    elsewhere = [place for place, kind in _SECTIONS.items() if key in _keys(kind)]
    elsewhere = [place for place in elsewhere if place != "routers[i]"]  # the same keys as `router`
    if key in _keys(Hosts):
        elsewhere.append("the top of the file")
    if nearest := difflib.get_close_matches(key, known, n=1):
        return f"unknown key; did you mean {nearest[0]!r}?"
    if elsewhere:
        return f"unknown key here; it belongs in {' or '.join(elsewhere)}"
    return f"unknown key: expected one of {', '.join(known)}"


def _keys(kind: type) -> list[str]:
    return [each.name for each in dataclasses.fields(kind)]


def _class_at(where: Where) -> type:
    """Return the dataclass whose keys belong at a place."""
    kind: Any = Hosts
    for step in where:
        if isinstance(step, str):
            kind = get_type_hints(kind)[step]
        options = [kind, *get_args(kind), *(each for part in get_args(kind) for each in get_args(part))]
        kind = next((each for each in options if dataclasses.is_dataclass(each)), kind)
    return kind  # type: ignore[no-any-return]  # by construction of the classes in hosts.py


# --- several values together ------------------------------------------------------------------


def _get(data: Any, key: str, kind: type[T]) -> T | None:
    """Return a value if it is there and of that kind; if not, pydantic has reported it."""
    value = data.get(key) if isinstance(data, dict) else None
    return value if isinstance(value, kind) and not isinstance(value, bool) else None


def _hosts(data: dict[str, Any]) -> Iterator[tuple[Where, dict[str, Any]]]:
    for i, host in enumerate(_get(data, "hosts", list) or ()):
        if isinstance(host, dict):
            yield ("hosts", i), host


def _names(data: dict[str, Any]) -> list[str]:
    return [name for _, host in _hosts(data) if (name := _get(host, "name", str))]


def _address(host: dict[str, Any], name: str) -> tuple[str, int]:
    return _get(host, "address", str) or name, _get(host, "port", int) or 22


def _hosts_once(data: dict[str, Any]) -> list[Found]:
    """Check that names and addresses are unique: the same host twice would put two workers on each GPU."""
    found: list[Found] = []
    names: dict[str, int] = {}
    addresses: dict[tuple[str, int], int] = {}
    for where, host in _hosts(data):
        i = int(where[1])
        name = _get(host, "name", str)
        if name is None:
            continue
        if names.setdefault(name, i) != i:
            found.append(
                ((*where, "name"), f"expected each host once, and hosts[{names[name]}] is {name!r} too")
            )
        address = _address(host, name)
        if addresses.setdefault(address, i) != i:
            key = "address" if "address" in host else "name"
            found.append(
                (
                    (*where, key),
                    f"expected each address once, and hosts[{addresses[address]}] has {address[0]!r} too",
                )
            )
    return found


def _addresses(data: dict[str, Any]) -> list[Found]:
    """Check that an address is not a login: ssh would accept `user@address`, and nothing else would."""
    places = [(where, host) for where, host in _hosts(data)]
    found: list[Found] = []
    for where, section in [*_routers(data), *places]:
        address = _get(section, "address", str)
        if address and "@" in address:
            hint = "; `user:` is the name to log in as" if where[0] == "hosts" else ""
            found.append(((*where, "address"), f"expected an address alone, got {address!r}{hint}"))
    return found


def _routers(data: dict[str, Any]) -> list[tuple[Where, dict[str, Any]]]:
    """Return each router's section that is a mapping, and where it is."""
    several = data.get("routers")
    found: list[tuple[Where, Any]] = [(("router",), data.get("router"))]
    if isinstance(several, list):
        found = [(("routers", i), section) for i, section in enumerate(several)]
    return [(where, section) for where, section in found if isinstance(section, dict)]


def _routers_are_listed(data: dict[str, Any]) -> list[Found]:
    names = list(dict.fromkeys(_names(data)))
    found: list[Found] = []
    for where, router in _routers(data):
        name = _get(router, "host", str)
        if name is None or not names or name in names:
            continue
        nearest = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        known = ", ".join(names)
        found.append(((*where, "host"), f"expected the name of a host: {known}, got {name!r}{hint}"))
    return found


def _router_or_routers(data: dict[str, Any]) -> list[Found]:
    """Check that the file has one of both."""
    if data and "router" not in data and "routers" not in data:
        return [(("router",), f"expected {_WANTED['router']}, got nothing")]
    if "router" in data and "routers" in data:
        return [(("routers",), "expected router or routers, got both: write all of them as routers")]
    return []


def _count(host: dict[str, Any]) -> int:
    gpus = _get(host, "gpus", list)
    return len(gpus) if gpus is not None else _get(host, "workers", int) or 0


def _ports_once(data: dict[str, Any]) -> list[Found]:
    """Check that each port of a host has one user: a router has two, and each role one for metrics.

    Of routers, that is. An engine that chooses the machines takes other ports where two have the same.
    """
    metrics = data.get("metrics")
    used: dict[tuple[str, int], list[tuple[Where, str]]] = defaultdict(list)
    n_before: dict[str | None, int] = defaultdict(int)
    is_placed = _get(data, "engine", str) not in (None, SSH)
    for place, router in _routers(data):
        router_host = _get(router, "host", str)
        i, n_before[router_host] = n_before[router_host], n_before[router_host] + 1
        if is_placed and i:
            continue
        for key, default in (("client_port", CLIENT_PORT), ("worker_port", WORKER_PORT)):
            port = default if key not in router else _get(router, key, int)
            if router_host and port:
                where = (*place, key)
                used[router_host, port].append((where, path_text(where)))
        if router_host and (port := _get(metrics, "router", int)):
            used[router_host, port + i].append((("metrics", "router"), "metrics.router"))
    if first := _get(metrics, "workers", int):
        for host in {_get(host, "name", str): host for _, host in _hosts(data)}.values():
            for i in range(min(_count(host), MAX_WORKERS)):
                used[str(host.get("name")), first + i].append(
                    (("metrics", "workers"), f"metrics.workers, of worker {i}")
                )
    return [*_used_twice(used), *_beyond(data, first)]


def _used_twice(used: dict[tuple[str, int], list[tuple[Where, str]]]) -> Iterator[Found]:
    for (host, port), users in used.items():
        for where, _ in users[1:]:
            words = " and ".join(text for _, text in users)
            yield where, f"expected each port once on a host, and {words} are both {port} on {host}"


def _beyond(data: dict[str, Any], first: int | None) -> Iterator[Found]:
    most = max((_count(host) for _, host in _hosts(data)), default=0)
    if first and first + most - 1 > 65_535:
        yield (
            ("metrics", "workers"),
            f"expected {most} ports from here on, for the workers of one host, up to 65535, got {first}",
        )


def _workers(data: dict[str, Any]) -> list[Found]:
    """Check that each host chooses its workers in one way, and that at least one host has a worker."""
    found: list[Found] = []
    is_emulated = data.get("emulate") is not None
    router_hosts = {_get(router, "host", str) for _, router in _routers(data)}
    n_workers = 0
    for where, host in _hosts(data):
        found += [
            ((*where, key), text)
            for key, text in _of_host(host, is_emulated, host.get("name") in router_hosts)
        ]
        n_workers += _count(host)
    if not found and not n_workers and _names(data):
        found.append((("hosts",), "expected a worker on one of them at least, got none"))
    return found


def _of_host(host: dict[str, Any], is_emulated: bool, has_router: bool) -> Iterator[tuple[str, str]]:
    gpus, workers, device = (host.get(key) for key in ("gpus", "workers", "device"))
    if is_emulated:
        yield from (
            (key, "expected workers: N under `emulate`, which uses no device")
            for key in ("gpus", "device", "threads")
            if host.get(key) is not None
        )
    elif host.get("gpus_per_worker") is not None:
        yield "gpus_per_worker", "expected with `emulate` only: a real worker process has one GPU"
    if gpus is not None and workers is not None:
        yield "workers", "expected gpus or workers, got both: each of the gpus has one worker"
    elif gpus is None and workers is None and not has_router:
        ways = "workers: N" if is_emulated else "gpus: [0, 1] or workers: N"
        yield "name", f"expected {ways} on a host without the router, got neither"
    if gpus is not None and device == "cpu":
        yield "device", "expected cuda, or nothing, with gpus, got 'cpu'"
    if isinstance(gpus, list) and (
        twice := sorted({gpu for gpu in gpus if isinstance(gpu, int) and gpus.count(gpu) > 1})
    ):
        yield "gpus", f"expected each device once, got {', '.join(map(str, twice))} twice"
    for name in host["env"] if isinstance(host.get("env"), dict) else ():
        if name in _RESERVED:
            yield "env", f"{name} is set by the cluster itself: expected other variables"


def _security(data: dict[str, Any]) -> list[Found]:
    if data.get("security") == "none" and data.get("keys") is not None:
        return [(("keys",), "expected no keys with security: none")]
    return []


def _engine(data: dict[str, Any]) -> list[Found]:
    """Check that the settings are those of the file's engine, and that options of sbatch are options."""
    engine = _get(data, "engine", str) or SSH
    found: list[Found] = [
        ((name,), f"expected it with engine: {name} only, got engine: {engine}")
        for name in (SLURM, RAY, KUBERNETES)
        if data.get(name) is not None and engine != name
    ]
    slurm = _get(data, "slurm", dict) or {}
    for key in ("options", "router_options", "worker_options"):
        for i, option in enumerate(_get(slurm, key, list) or ()):
            if isinstance(option, str) and (not option.startswith("-") or any(c.isspace() for c in option)):
                text = f"expected an option of sbatch as one word, such as --partition=gpu, got {option!r}"
                found.append((("slurm", key, i), text))
    notice_s = _get(slurm, "notice_s", int)
    if notice_s is not None and not 0 < notice_s <= _MOST_NOTICE_S:
        found.append((("slurm", "notice_s"), f"expected 1 to {_MOST_NOTICE_S}, got {notice_s}"))
    return found


_CHECKS: tuple[Callable[[dict[str, Any]], list[Found]], ...] = (
    _hosts_once, _addresses, _routers_are_listed, _router_or_routers, _ports_once, _workers, _security,
    _engine, check_gateway,
)  # fmt: skip


# --- what is served ---------------------------------------------------------------------------


def _serving(data: dict[str, Any], folder: Path) -> list[Found]:
    """Check supernet, profile, weights and policy, each of which names something outside the file."""
    found: list[Found] = []
    emulate, supernet = _get(data, "emulate", str), _get(data, "supernet", str)
    if emulate is not None:
        found += [
            ((key,), "expected it or `emulate`, got both")
            for key in ("supernet", "family", "profile", "weights")
            if data.get(key) is not None
        ]
    found += _family(data)
    if supernet and not is_known(supernet):
        nearest = difflib.get_close_matches(supernet, SHIPPED_SUPERNETS, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        names = ", ".join(SHIPPED_SUPERNETS)
        found.append(
            ((("supernet"),), f"expected one of {names}, or package.module:attribute, got {supernet!r}{hint}")
        )
    elif supernet and supernet != DIGITS and data.get("profile") is None:
        found.append(
            (("supernet",), f"{supernet} comes without a profile: expected one, from `profiles search`")
        )
    weights = _get(data, "weights", str)
    if weights and weights != "random" and not weights.startswith("/"):
        found.append(
            (("weights",), f"expected 'random' or an absolute path, the same on each host, got {weights!r}")
        )
    return [*found, *_profile_and_policy(data, folder), *_keys_folder(data, folder)]


def _family(data: dict[str, Any]) -> list[Found]:
    """Check a family, whose file lies on the hosts with its models: they may be too large to send."""
    family = _get(data, "family", str)
    if family is None or data.get("emulate") is not None:
        return []
    found: list[Found] = [
        ((key,), f"expected it or `family`, got both: {why}")
        for key, why in (
            ("supernet", "a family is served instead of a supernet"),
            ("weights", "each model of a family has its own"),
        )
        if data.get(key) is not None
    ]
    if not family.startswith("/"):
        found.append((("family",), f"expected an absolute path, the same on each host, got {family!r}"))
    if data.get("profile") is None:
        found.append((("family",), NEEDS_PROFILE))
    return found


def _keys_folder(data: dict[str, Any], folder: Path) -> Iterator[Found]:
    keys = _absolute(_get(data, "keys", str), folder)
    if keys is None or data.get("security") == "none":
        return
    try:
        hostkeys.check(Path(keys))
    except ConfigError as error:
        yield ("keys",), str(error)


def _profile_and_policy(data: dict[str, Any], folder: Path) -> Iterator[Found]:
    key = "emulate" if _get(data, "emulate", str) else "profile"
    try:
        profile = load_profile(_profile(_get(data, key, str) or DEFAULT_PROFILE, folder))
    except ConfigError as error:
        yield (key,), str(error)
        profile = load_profile(DEFAULT_PROFILE)  # to check the policy's name all the same
    try:
        make_policy(_get(data, "policy", str) or "planfit", profile)
    except ConfigError as error:
        yield ("policy",), str(error)


def _profile(name: str, folder: Path) -> str:
    """Return a shipped profile's name, or a file's absolute path, relative to the hosts file."""
    return name if name in shipped_profiles() else str((folder / name).absolute())


def _filled(hosts: Hosts, folder: Path) -> Hosts:
    """Return `hosts` with every default filled in, and absolute paths."""
    filled = tuple(_filled_host(host, is_emulated=hosts.emulate is not None) for host in hosts.hosts)
    addresses = {host.name: host.address for host in filled}
    places = tuple(
        dataclasses.replace(place, address=place.address or addresses[place.host]) for place in hosts.places
    )
    served: dict[str, Any] = {"emulate": _profile(hosts.emulate, folder)} if hosts.emulate is not None else {
        "supernet": None if hosts.family else hosts.supernet or DIGITS,
        "profile": _profile(hosts.profile or DEFAULT_PROFILE, folder),
    }  # fmt: skip
    return dataclasses.replace(
        hosts,
        hosts=filled,
        router=places[0],
        routers=None if hosts.routers is None else places,
        keys=_absolute(hosts.keys, folder),
        slurm=_slurm(hosts.slurm, folder) if hosts.engine == SLURM else None,
        ray=hosts.ray or RaySettings() if hosts.engine == RAY else None,
        kubernetes=hosts.kubernetes or KubernetesSettings() if hosts.engine == KUBERNETES else None,
        ssh_config=_absolute(hosts.ssh_config, folder),
        **served,
    )


def _slurm(slurm: SlurmSettings | None, folder: Path) -> SlurmSettings:
    """Return the settings with an absolute folder; that of the state folder depends on who reads it."""
    slurm = slurm or SlurmSettings()
    return dataclasses.replace(slurm, folder=_absolute(slurm.folder, folder))


def _filled_host(host: Host, *, is_emulated: bool) -> Host:
    return dataclasses.replace(
        host,
        address=host.address or host.name,
        workers=None if host.gpus is not None else host.workers or 0,
        device=None if is_emulated else host.device or ("cpu" if host.gpus is None else "cuda"),
        gpus_per_worker=host.gpus_per_worker or 1 if is_emulated else None,
        threads=None if is_emulated else host.threads or 1,
    )


def _absolute(path: str | None, folder: Path) -> str | None:
    try:
        return None if path is None else str((folder / Path(path).expanduser()).absolute())
    except RuntimeError as error:  # no HOME, and no such user
        raise ConfigError(f"{path}: expected a path without ~: {error}") from error
