"""What a Kubernetes for tests needs, made once into a cache folder: its programs, kubectl, helm, and images.

The folder is $SUPERSERVE_KUBERNETES, else ~/.cache/superserve/kubernetes. Images are made again after the
package has changed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.cluster.engines.conftest import commands
from tests.cluster.engines.real import IMAGE, PODMAN_PROGRAMS, Podman, helm_in, require
from tests.cluster.kubernetes.rig import PAUSE, kubernetes, why_not
from tests.paths import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.cluster.kubernetes.rig import Kubernetes

BUILD = Path(__file__).with_name("build.sh")
NEXT = f"{IMAGE}:next"
"""The same image under another name: what an upgrade upgrades to."""
_CANNOT = 3
_SOURCES = (
    "superserve",
    "router",
    "gpu_worker",
    "loadgen",
    "profiles",
    "cluster",
    "deploy",
    "pyproject.toml",
)
_PAUSE = """\
FROM {image}
ENTRYPOINT ["/opt/superserve/bin/python", "-c", "import signal; signal.pause()"]
"""


def cache() -> Path:
    """Return the folder of what is made once."""
    given = os.environ.get("SUPERSERVE_KUBERNETES")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "superserve" / "kubernetes"


def built() -> Path:
    """Return the folder, with everything in it; skip with the reason where it cannot be made."""
    folder = cache()
    done = subprocess.run([BUILD, folder], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode == _CANNOT:
        pytest.skip(done.stdout.strip().splitlines()[-1])
    assert done.returncode == 0, done.stdout
    if not all((folder / "bin" / name).exists() for name in ("helm", "kubectl")):
        for program in helm_in(folder / "bin" / "layer", "kubectl"):
            shutil.move(program, folder / "bin" / program.name)
    if not _is_fresh(folder / "images.tar"):
        _make_images(folder / "images.tar")
    if reason := why_not(folder):
        pytest.skip(reason)
    return folder


def _is_fresh(archive: Path) -> bool:
    if not archive.exists():
        return False
    made_ns = archive.stat().st_mtime_ns
    paths = (path for name in _SOURCES for path in (ROOT / name, *(ROOT / name).rglob("*.*")))
    return all(path.stat().st_mtime_ns <= made_ns for path in paths if "__pycache__" not in path.parts)


def _make_images(archive: Path) -> None:
    require(*PODMAN_PROGRAMS)
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        podman = Podman(Path(name))
        podman.set_up()
        try:
            podman.build(commands("keys")[0])
            podman("build", "--tag", PAUSE, "--file=-", given=_PAUSE.format(image=IMAGE))
            podman("tag", IMAGE, NEXT)
            archive.unlink(missing_ok=True)
            podman("save", "--multi-image-archive", "--output", archive, IMAGE, NEXT, PAUSE)
        finally:
            podman.tear_down()


@contextlib.contextmanager
def opened() -> Iterator[Kubernetes]:
    """Give a cluster of two nodes; skip with the reason where there can be none."""
    folder = built()
    with kubernetes(folder / "bin", folder / "images.tar") as here:
        yield here
