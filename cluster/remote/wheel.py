"""The package that runs here, as a wheel: `cluster up` sends it to hosts that lack it.

It is packed from the files that this process itself runs, so that an editable checkout and an
installed wheel are sent alike and no build tool is needed. The same files give the same bytes,
and hence the same hash: two hosts have the same version if they have the same hash.
"""

from __future__ import annotations

import base64
import hashlib
import io
import zipfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from superserve.errors import ConfigError

PROJECT = "superserve"
PACKAGES = ("superserve", "router", "gpu_worker", "gateway", "loadgen", "profiles", "cluster")

# What roles and their keeper import on a host; the launcher needs more. A test compares these
# with pyproject.toml.
ON_EVERY_HOST = (
    ("pyzmq", "27"), ("numpy", "2.0"), ("orjson", "3.10"), ("click", "8.1"), ("psutil", "6.0"),
    ("rich", "13.9"), ("prometheus-client", "0.21"), ("supervisor", "4.3"),
)  # fmt: skip
"""Distributions that a host needs, each with its least version."""

FOR_SUPERNETS = (("torch", "2.10"), ("safetensors", "0.5"))
"""Further distributions that a host needs if its workers serve a model on a real device."""

FOR_FAMILIES = (("ruamel.yaml", "0.18"),)
"""And if that is a family. What runs ONNX files is left to its user: onnxruntime or onnxruntime-gpu, which
own the same files, so that one must not be installed beside the other."""

FOR_GATEWAY = (("grpcio", "1.70"), ("httptools", "0.6"), ("protobuf", "5.29"), ("uvloop", "0.21"))
"""And if a gateway runs there."""

FOR_TEXTS = (("tokenizers", "0.20"),)
"""And if it takes texts."""

_EPOCH = (1980, 1, 1, 0, 0, 0)  # a zip file's earliest time: files' own times must not change the hash
_MODE = 0o644 << 16
_LEFT_OUT = ("__pycache__",)
# Compiled for this machine, which a host may not be like: hosts run pure Python.
_COMPILED = (".so", "compiled.json")


@dataclass(frozen=True, slots=True)
class Wheel:
    """A wheel, whole.

    Attributes:
        name: Of its file.
        content: The file.
        hash: Distinguishes it from every other: 16 hexadecimal digits of its SHA-256.
        version: The package's.
    """

    name: str
    content: bytes
    hash: str
    version: str


def pack() -> Wheel:
    """Return the wheel of the package that runs here.

    Raises:
        ConfigError: It is not installed, not even as an editable checkout.
    """
    about = _distribution()
    info = f"{PROJECT}-{about.version}.dist-info"
    files = {f"{info}/METADATA": (about.read_text("METADATA") or "").encode()}
    files[f"{info}/WHEEL"] = (
        b"Wheel-Version: 1.0\nGenerator: cluster.remote.wheel\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    )
    files[f"{info}/entry_points.txt"] = (about.read_text("entry_points.txt") or "").encode()
    root = Path(__file__).parents[2]
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*")):
            is_source = not set(_LEFT_OUT) & set(path.parts) and not path.name.endswith(_COMPILED)
            if is_source and path.is_file():
                files[path.relative_to(root).as_posix()] = path.read_bytes()
    content = _zip(files, f"{info}/RECORD")
    digest = hashlib.sha256(content).hexdigest()[:16]
    return Wheel(f"{PROJECT}-{about.version}-py3-none-any.whl", content, digest, about.version)


def _distribution() -> metadata.Distribution:
    try:
        return metadata.distribution(PROJECT)
    except metadata.PackageNotFoundError:
        raise ConfigError(
            f"{PROJECT}: expected an installed package, to ship it to hosts; try: pip install --editable ."
        ) from None


def _zip(files: dict[str, bytes], record: str) -> bytes:
    lines = []
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            lines.append(f"{name},sha256={digest},{len(content)}\n")
            _add(archive, name, content)
        _add(archive, record, "".join([*lines, f"{record},,\n"]).encode())
    return packed.getvalue()


def _add(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    entry = zipfile.ZipInfo(name, _EPOCH)
    entry.compress_type = zipfile.ZIP_DEFLATED
    entry.external_attr = _MODE
    archive.writestr(entry, content)
