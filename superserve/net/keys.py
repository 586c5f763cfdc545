"""Key files: who may join a cluster. They hold CURVE keys, as text files of a few lines.

A router has a folder:

    router.key              its secret                                  0600
    router.pub              its public key, for peers                   0644
    operator.key            an operator's secret, for this machine      0600
    clients/NAME.pub        who may send queries
    workers/NAME.pub        who may serve them
    operators/NAME.pub      clients that may also drain workers and the router

and each peer has one file, NAME.key: its own key pair and the router's public key. A file consists of
lines of `field = value`; a line that begins with # is a comment:

    role = client
    name = web
    public = rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7
    secret = JTKVSB%%)wK0E.X)V>+}o?pNmC{O&4W4b!Ni{Lh6
    router = Yne@$w-vo<fVvi]a<NY6T1ed:M$fCG*[IaLV{hID

Keys are in Z85, 40 characters. This module overwrites no file, and reads no secret that others may read; a
file of root's may be readable for one group.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import zmq
from zmq.utils import z85

from superserve.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

ENVIRONMENT = "SUPERSERVE_KEYS"
"""The environment variable with a client's key file, or a folder with one, if `keys` is not given."""

FOLDERS = {"client": "clients", "worker": "workers", "operator": "operators"}
"""The folder of each role's list, under a router's folder."""

ROUTER_KEY = "router.key"
"""The file with a router's secret, in its folder."""

_DEFAULTS = {"client": ("client.key", "operator.key"), "worker": ("worker.key",)}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_MAX_BYTES = 4_096  # a key file takes a few hundred; a bound on what a wrong path can make us read
_Z85_CHARACTERS = 40  # 32 bytes, five characters for every four


@dataclass(frozen=True, slots=True)
class PeerKeys:
    """What a client or a worker needs to talk to a router.

    Attributes:
        path: The file, for error messages.
        public: Its own public key, in Z85; so are the others.
        secret: Its own secret key; never shown.
        router: The router's public key.
    """

    path: Path
    public: str
    secret: str = field(repr=False)
    router: str


@dataclass(frozen=True, slots=True)
class RouterKeys:
    """A router's own key pair, in Z85."""

    public: str
    secret: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Ring:
    """The peers that a router admits: the name of each public key, by role.

    Attributes:
        clients: May send queries and ask for STATUS.
        workers: May serve queries.
        operators: May do what clients may, and also drain.
    """

    clients: Mapping[str, str]
    workers: Mapping[str, str]
    operators: Mapping[str, str]


# --- read ---------------------------------------------------------------------------------


def peer_keys(keys: str | os.PathLike[str] | None, role: str = "client") -> PeerKeys | None:
    """Return the keys at a path, or None for a peer without keys.

    Args:
        keys: A key file, or a folder with `client.key` (or `operator.key`), for a worker `worker.key`.
            None takes the path from SUPERSERVE_KEYS; an empty path means no keys.
        role: client or worker.

    Raises:
        ConfigError: There is no such file, others may read it, or it is malformed.
    """
    given = os.environ.get(ENVIRONMENT, "") if keys is None else os.fspath(keys)
    if not given:
        return None
    try:
        path = Path(given).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{os.fspath(given)}: expected a path without ~: {error}") from error
    if path.is_dir():
        path = _within(path, role)
    fields = _read_secret(path)
    if fields.get("role") == "router":
        raise ConfigError(f"{path}: role: expected a {role}'s key file, got the router's own secret")
    return PeerKeys(
        path, _key(path, fields, "public"), _key(path, fields, "secret"), _key(path, fields, "router")
    )


def _within(folder: Path, role: str) -> Path:
    names = _DEFAULTS[role]
    for name in names:
        if (folder / name).exists():
            return folder / name
    raise ConfigError(
        f"{folder}: expected {' or '.join(names)} there; name a {role}'s key file, such as "
        f"{folder / FOLDERS[role] / 'NAME.key'} from `cluster keys add {role} NAME`"
    )


def router_keys(folder: Path, secret: Path | None = None) -> RouterKeys:
    """Return the key pair of the router with this folder.

    Args:
        folder: Its folder.
        secret: The file with its secret; None for `router.key` in the folder.

    Raises:
        ConfigError: There is no key pair, others may read it, or it is malformed.
    """
    path = secret or folder / "router.key"
    if secret is None and not path.exists():
        raise ConfigError(f"{path}: no such file: make it with `cluster keys --out {folder} make`")
    fields = _read_secret(path)
    if fields.get("role") != "router":
        raise ConfigError(f"{path}: role: expected router, got {fields.get('role')!r}")
    return RouterKeys(_key(path, fields, "public"), _key(path, fields, "secret"))


def read_ring(folder: Path) -> tuple[Ring, list[str]]:
    """Return the peers that a router's folder lists, and an error for each file that is left out.

    Raises:
        OSError: The folder itself, or one of its lists, cannot be read.
    """
    folder.stat()
    problems: list[str] = []
    lists: dict[str, dict[str, str]] = {}
    seen: dict[str, Path] = {}
    for role, below in FOLDERS.items():
        lists[role] = {}
        for path in _public_files(folder / below):
            try:
                check_name(path.stem)  # STATUS shows it as text, and a file's name may be any bytes
                _check_file(path)
                public = read_public(path, role)
            except ConfigError as error:
                problems.append(str(error))
                continue
            if public in seen:
                problems.append(f"{path}: public: expected one file a key, but {seen[public]} has it too")
                continue
            seen[public] = path
            lists[role][public] = path.stem
    return Ring(lists["client"], lists["worker"], lists["operator"]), problems


def _public_files(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.suffix == ".pub")
    except FileNotFoundError:
        return []


def _check_file(path: Path) -> None:
    """Raise ConfigError unless `path` is a regular file: opening a pipe could wait for a writer for ever."""
    try:
        is_file = stat.S_ISREG(path.stat().st_mode)
    except OSError as error:
        raise ConfigError(f"{path}: expected a key file: {error.strerror}") from error
    if not is_file:
        raise ConfigError(f"{path}: expected a file")


def read_public(path: Path, role: str) -> str:
    """Return the public key in a file of a role.

    Raises:
        ConfigError: It cannot be read, is malformed, or belongs to another role.
    """
    fields = _parse(path, _read(path))
    if fields.get("role") != role:
        raise ConfigError(f"{path}: role: expected {role}, got {fields.get('role')!r}")
    return _key(path, fields, "public")


def signature(folder: Path) -> tuple[tuple[str, int, int, int], ...]:
    """Return a value that changes whenever a list does: each public file's path, inode, size and time."""
    found: list[tuple[str, int, int, int]] = []
    for below in FOLDERS.values():
        try:
            entries = list(os.scandir(folder / below))
        except FileNotFoundError:
            continue
        for entry in entries:
            if entry.name.endswith(".pub"):
                try:
                    is_now = entry.stat()
                except FileNotFoundError:
                    continue
                found.append((entry.path, is_now.st_ino, is_now.st_size, is_now.st_mtime_ns))
    return tuple(sorted(found))


def _read_secret(path: Path) -> dict[str, str]:
    try:
        status = path.stat()
    except OSError as error:
        raise ConfigError(f"{path}: expected a key file: {error.strerror}") from error
    mode = stat.S_IMODE(status.st_mode)
    # Kubernetes hands a secret to a process that is not root as root's file, which the pod's own group may
    # read. PostgreSQL takes its private key by the same rule.
    others = 0o037 if status.st_uid == 0 and os.geteuid() != 0 else 0o077
    if mode & others:
        raise ConfigError(f"{path}: a secret that others may read ({mode:04o}): chmod 600 {path}")
    return _parse(path, _read(path))


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise ConfigError(f"{path}: expected a key file of at most {_MAX_BYTES} bytes")
        return content.decode("ascii")
    except OSError as error:
        raise ConfigError(f"{path}: expected a key file: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: expected lines of ASCII such as `role = client`") from error


def _parse(path: Path, text: str) -> dict[str, str]:
    fields: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        name, equals, value = line.partition("=")
        if not equals or name.strip() in fields:
            raise ConfigError(f"{path}:{number}: expected `field = value`, each field once")
        fields[name.strip()] = value.strip()
    return fields


def _key(path: Path, fields: Mapping[str, str], name: str) -> str:
    text = fields.get(name, "")
    try:
        is_key = len(text) == _Z85_CHARACTERS and z85.encode(z85.decode(text)).decode() == text
    except (ValueError, KeyError, struct.error):
        is_key = False
    if not is_key:  # the text may be a secret, so the error does not quote it
        raise ConfigError(f"{path}: {name}: expected a key of 40 characters in Z85")
    return text


# --- write --------------------------------------------------------------------------------


def make_ring(folder: Path) -> list[Path]:
    """Make a router's folder: its key pair, an operator's, and empty lists; return the files.

    Raises:
        ConfigError: The folder has a router's key already, or cannot be written.
    """
    if (folder / "router.key").exists():
        raise ConfigError(
            f"{folder / 'router.key'}: exists already; a new one would lock out all that trust it"
        )
    public, secret = _pair()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for below in FOLDERS.values():
            (folder / below).mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be made: {error.strerror}") from error
    body = {"role": "router", "name": "router", "public": public}
    ours = [folder / "router.key", folder / "router.pub"]
    with _all_or_none(ours):
        _write(ours[0], {**body, "secret": secret}, 0o600)
        _write(ours[1], body, 0o644)
        made = add_peer(folder, "operator", "operator", folder / "operator.key")
    return [*ours, *made]


@contextlib.contextmanager
def _all_or_none(paths: Sequence[Path]) -> Iterator[None]:
    """Remove files that were made where a later one cannot be: the command can then be typed again.

    Those that were there before stay.
    """
    new = [path for path in paths if not path.exists()]
    try:
        yield
    except ConfigError:
        for path in new:
            path.unlink(missing_ok=True)
        raise


def add_peer(folder: Path, role: str, name: str, secret_path: Path | None = None) -> list[Path]:
    """Make a peer's key, list it, and return its two files: the secret one and the listed one.

    Args:
        folder: The router's folder.
        role: client, worker or operator.
        name: Letters, digits, dot, dash and underscore.
        secret_path: Where the secret file goes; beside the listed one if None.

    Raises:
        ConfigError: The name is malformed or taken, or the folder has no router's key.
    """
    check_name(name)
    router = router_keys(folder).public
    listed = folder / FOLDERS[role] / f"{name}.pub"
    own = secret_path or listed.with_suffix(".key")
    public, secret = _pair()
    body = {"role": role, "name": name, "public": public}
    _write(own, {**body, "secret": secret, "router": router}, 0o600)
    try:
        _write(listed, body, 0o644)
    except ConfigError:
        own.unlink()
        raise
    return [own, listed]


def revoke(folder: Path, name: str) -> list[Path]:
    """Remove a name from every list, with its secret, and return the files that were removed.

    Raises:
        ConfigError: No key of that name is listed.
    """
    check_name(name)
    listed = [folder / below / f"{name}.pub" for below in FOLDERS.values()]
    found = [path for path in listed if path.exists()]
    if not found:
        raise ConfigError(f"{folder}: no key is listed under the name {name!r}")
    gone: list[Path] = []
    for path in found:
        secrets = [path.with_suffix(".key")]
        if path == folder / "operators" / "operator.pub":  # the one that `make_ring` made
            secrets.append(folder / "operator.key")
        for file in (path, *secrets):  # the list first: removing that revokes the key
            if file.exists():
                file.unlink()
                gone.append(file)
    return gone


def check_name(name: str) -> None:
    """Raise ConfigError unless `name` is valid for a key."""
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"name {name!r}: expected 1 to 64 letters, digits, dots, dashes and underscores, "
            f"a letter or digit first"
        )


def _pair() -> tuple[str, str]:
    public, secret = zmq.curve_keypair()
    return public.decode("ascii"), secret.decode("ascii")


def _write(path: Path, fields: Mapping[str, str], mode: int) -> None:
    """Write a new file, with its mode from the start, whole or not at all."""
    lines = "".join(f"{name} = {value}\n" for name, value in fields.items())
    note = "# A secret: anyone who has this file can act as its owner.\n" if "secret" in fields else ""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        try:
            with os.fdopen(fd, "w", encoding="ascii") as file:
                file.write(note + lines)
                file.flush()
                os.fsync(file.fileno())
            os.link(partial, path)  # unlike a rename, a link refuses to overwrite
        finally:
            partial.unlink()
    except FileExistsError as error:
        raise ConfigError(f"{path}: exists already, and is not overwritten") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from error
