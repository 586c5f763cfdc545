"""Two distributions from one source: the whole system, and the client that applications embed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
import zipfile
from email.parser import BytesParser
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from loadgen.live.run import Emulation, emulated
from tests.test_readme import ENDPOINT, client_snippets

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROOT = Path(__file__).parent.parent.parent
CLIENT = ROOT / "wheels" / "client"
OTHER_ROLES = ("router", "gpu_worker", "gateway", "loadgen", "profiles", "cluster")
HEAVY = ("torch", "click", "psutil", "rich", "safetensors", "sklearn", "scipy", "fastapi", "httpx")


class Venv(NamedTuple):
    """A virtual environment that has the client's wheel, and nothing of this one's packages."""

    python: Path
    site_packages: Path

    def run(self, code: str, *, cwd: Path) -> subprocess.CompletedProcess[str]:
        """Run code there, isolated from the environment's variables and this folder."""
        return run([str(self.python), "-I", "-W", "error", "-c", code], cwd=cwd)


def run(argv: Sequence[str], *, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command; the caller judges its exit code."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run(
        argv, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240, check=False
    )


def project(folder: Path) -> dict[str, Any]:
    """Return the table [project] of the folder's pyproject.toml."""
    table: dict[str, Any] = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return table


def build_wheel(folder: Path, out: Path) -> Path:
    """Build a folder's wheel with the hatchling that is installed; no network."""
    done = run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--no-deps",
            "--no-build-isolation",
            "-w",
            str(out),
            str(folder),
        ],
        cwd=out,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = out.glob("*.whl")
    return wheel


def contents(wheel: Path) -> dict[str, bytes]:
    """Return a wheel's files by name."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def top_level(wheel: Path) -> set[str]:
    """Return the folders that a wheel puts into site-packages, its own metadata left out."""
    return {name.partition("/")[0] for name in contents(wheel) if ".dist-info/" not in name}


def needs_hatchling() -> None:
    """Skip where nothing can be built: hatchling comes with the extra `dev`."""
    if find_spec("hatchling") is None:
        pytest.skip("hatchling is not installed; try: pip install --editable '.[dev]'")


@pytest.fixture(scope="module")
def client_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the client's wheel from the tree."""
    needs_hatchling()
    return build_wheel(CLIENT, tmp_path_factory.mktemp("client"))


@pytest.fixture(scope="module")
def whole_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the whole system's wheel from the tree."""
    needs_hatchling()
    return build_wheel(ROOT, tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def venv(client_wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Venv:
    """Install the client's wheel into a fresh environment; skip where its dependencies cannot be had."""
    folder = tmp_path_factory.mktemp("venv")
    made = run([sys.executable, "-m", "venv", "--without-pip", str(folder)], cwd=folder)
    assert made.returncode == 0, made.stderr
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python)]
    got = run([*pip, "install", "--quiet", *project(CLIENT)["dependencies"]], cwd=folder)
    if got.returncode != 0:
        pytest.skip(f"the client's dependencies cannot be installed here: {got.stderr.strip()[-300:]}")
    installed = run([*pip, "install", "--quiet", "--no-deps", str(client_wheel)], cwd=folder)
    assert installed.returncode == 0, installed.stderr
    checked = run([*pip, "check"], cwd=folder)
    assert checked.returncode == 0, checked.stdout
    (site_packages,) = folder.glob("lib/python*/site-packages")
    return Venv(python, site_packages)


def test_both_distributions_agree() -> None:
    """Version, dependencies, Python and licence of the client are the whole system's."""
    whole, client = project(ROOT), project(CLIENT)

    for field in ("version", "dependencies", "requires-python", "license", "license-files"):
        assert client[field] == whole[field], field
    assert (client["name"], whole["name"]) == ("superserve-client", "superserve")
    assert (CLIENT / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_the_client_depends_on_three_packages_and_has_no_extras() -> None:
    """An application that embeds the client gets pyzmq, NumPy and orjson."""
    client = project(CLIENT)

    names = {requirement.partition(">")[0] for requirement in client["dependencies"]}
    assert names == {"pyzmq", "numpy", "orjson"}
    assert "optional-dependencies" not in client
    assert "scripts" not in client


@pytest.mark.slow
def test_the_client_wheel_holds_superserve_alone(client_wheel: Path) -> None:
    """Each of its files is the tree's, each of the tree's is there, and py.typed is among them."""
    files = contents(client_wheel)

    assert top_level(client_wheel) == {"superserve"}
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "superserve").rglob("*.py")}
    assert {name for name in files if name.startswith("superserve/")} == modules | {"superserve/py.typed"}
    assert all(files[name] == (ROOT / name).read_bytes() for name in modules)


@pytest.mark.slow
def test_the_client_wheel_says_what_it_is(client_wheel: Path) -> None:
    """Its metadata has a name, a licence with its text, a page to read, and what it requires."""
    files = contents(client_wheel)
    (info,) = {name.partition("/")[0] for name in files if ".dist-info/" in name}

    metadata = BytesParser().parsebytes(files[f"{info}/METADATA"])
    assert metadata["Name"] == "superserve-client"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert sorted(metadata.get_all("Requires-Dist", [])) == sorted(project(CLIENT)["dependencies"])
    assert metadata.as_string().endswith((CLIENT / "README.md").read_text(encoding="utf-8"))
    assert files[f"{info}/licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()


@pytest.mark.slow
def test_an_sdist_builds_the_same_client_wheel(client_wheel: Path, tmp_path: Path) -> None:
    """The sdist stands on its own: the wheel made of it has the same files, byte for byte."""
    done = run([sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(tmp_path)], cwd=CLIENT)
    assert done.returncode == 0, done.stderr
    (sdist,) = tmp_path.glob("*.tar.gz")
    out = tmp_path / "out"
    out.mkdir()

    assert contents(build_wheel(sdist, out)) == contents(client_wheel)


@pytest.mark.slow
def test_the_whole_wheel_holds_all_packages_and_their_data(whole_wheel: Path, client_wheel: Path) -> None:
    """It is complete by itself, with the client's very files, so that installing both changes nothing."""
    whole, client = contents(whole_wheel), contents(client_wheel)

    assert top_level(whole_wheel) == {"superserve", *OTHER_ROLES}
    assert {f"{package}/py.typed" for package in top_level(whole_wheel)} <= set(whole)
    assert {
        "gateway/rpc/inference.binpb",
        "gpu_worker/models/data/digits.safetensors",
        "profiles/data/digits-cpu.json",
        "profiles/data/digits-cpu.statistics.safetensors",
        "profiles/data/ofa-resnet50-pareto.json",
    } <= set(whole)
    shared = {name for name in client if name.startswith("superserve/")}
    assert all(whole[name] == client[name] for name in shared)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_client_imports_alone_and_light(venv: Venv, tmp_path: Path) -> None:
    """Where only the client is installed nothing else of ours is, and it loads what it needs and no more."""
    code = (
        "import importlib.util, json, sys\n"
        "import superserve\n"
        "superserve.Client\n"  # what it is made of is loaded when it is first asked for
        f"names = {(*OTHER_ROLES, *HEAVY)!r}\n"
        "there = [name for name in names if importlib.util.find_spec(name)]\n"
        # Compiled modules make some that have no file.
        "files = {name for name, module in sys.modules.items() if getattr(module, '__file__', None)}\n"
        "loaded = sorted({name.partition('.')[0] for name in files} - sys.stdlib_module_names)\n"
        "print(json.dumps([superserve.__file__, there, loaded]))\n"
    )
    done = venv.run(code, cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    file, there, loaded = json.loads(done.stdout)
    assert Path(file).is_relative_to(venv.site_packages)
    assert there == []
    assert set(loaded) == {"superserve", "zmq", "numpy", "orjson"}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_mypy_sees_the_types_of_an_installed_client(venv: Venv, tmp_path: Path) -> None:
    """py.typed arrives: under --strict an application learns that a reply's subnet is no number."""
    right = tmp_path / "right.py"
    right.write_text("import superserve\n\nname: str = superserve.Client('x').infer(b'', slo_ms=1).subnet\n")
    wrong = tmp_path / "wrong.py"
    wrong.write_text(right.read_text().replace("name: str", "name: int"))
    mypy = [sys.executable, "-m", "mypy", "--strict", "--python-executable", str(venv.python), "--cache-dir"]

    assert run([*mypy, str(tmp_path), str(right)], cwd=tmp_path).returncode == 0
    said = run([*mypy, str(tmp_path), str(wrong)], cwd=tmp_path).stdout
    assert 'expression has type "str", variable has type "int"' in said


@pytest.fixture
def endpoint() -> Iterator[str]:
    """Run a router with two emulated GPUs; give its client endpoint."""
    with emulated(Emulation("cnn-8gpu-modelled", 2)) as cluster:
        yield cluster.client_endpoint


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.timeout(300)
def test_the_client_alone_runs_what_the_pages_show(venv: Venv, endpoint: str, tmp_path: Path) -> None:
    """Snippets for applications run where nothing but the client is installed."""
    for snippet in client_snippets():
        done = venv.run(snippet.replace(ENDPOINT, endpoint), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout
