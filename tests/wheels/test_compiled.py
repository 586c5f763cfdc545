"""The core compiled from the same files: its tests pass, it decides the same, and it is not run stale.

It is compiled in a copy of the tree, so that the tests beside this one run what one reads.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from importlib.util import find_spec
from typing import TYPE_CHECKING

import pytest

from tests.paths import ROOT

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

COPIED = (
    "superserve",
    "router",
    "gpu_worker",
    "gateway",
    "loadgen",
    "profiles",
    "cluster",
    "tests",
    "wheels",
)
TESTED = (
    "tests/router/core",
    "tests/router/policies",
    "tests/superserve/wire",
    "tests/gpu_worker/test_core.py",
)
UNHURRIED = {"SUPERSERVE_OPT_LEVEL": "0"}
"""What C means is tested, not its speed: the compiler takes a fifth of the time."""

_SIMULATED = """
from loadgen.simulator.simulate import simulate
from loadgen.traces.trace import load_trace
from profiles.table import load_profile
from superserve.build import build
import router.core.edf
trace = load_trace("bursty:base=1500,variant=4900,cv2=8", duration_s=2, seed=1)
gpus = [load_profile("cnn-8gpu-modelled")] * 8
print(build(), router.core.edf.__file__.endswith(".py"))
policies = ("slackfit", "demandfit", "planfit")
print([simulate(trace, gpus, policy=policy, seed=1).digest for policy in policies])
"""


def python(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run Python on the code below a root, which is also its working folder."""
    env = {**os.environ, "PYTHONPATH": str(root), **UNHURRIED}
    return subprocess.run(
        [sys.executable, *words], cwd=root, env=env, capture_output=True, text=True, timeout=500, check=False
    )


def needs_compiler() -> None:
    """Skip where nothing can be compiled."""
    if find_spec("mypyc") is None or find_spec("setuptools") is None or shutil.which("cc") is None:
        pytest.skip("mypyc, setuptools or a C compiler is missing; try: pip install --editable '.[dev]'")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compile a copy of the tree."""
    needs_compiler()
    root = tmp_path_factory.mktemp("compiled")
    for name in COPIED:
        leave_out = shutil.ignore_patterns("__pycache__", "*.so", "compiled.json")
        shutil.copytree(ROOT / name, root / name, ignore=leave_out)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, root / name)
    done = python(root, "wheels/compile.py")
    assert done.returncode == 0, done.stderr
    return root


def test_it_decides_as_pure_python_does(compiled: Path) -> None:
    """Every query of a simulated burst ends alike, under three policies."""
    pure, ours = (python(root, "-c", _SIMULATED) for root in (ROOT, compiled))
    assert (pure.returncode, ours.returncode) == (0, 0), pure.stderr + ours.stderr
    assert pure.stdout.splitlines()[0] == "pure True"
    assert ours.stdout.splitlines()[0] == "compiled False"
    assert pure.stdout.splitlines()[1] == ours.stdout.splitlines()[1]


def test_the_tests_of_core_policies_and_wire_pass(compiled: Path) -> None:
    """The very same files."""
    done = python(
        compiled, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow and not e2e",
        "--hypothesis-profile", "quick", *TESTED,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout


def test_fault_schedules_hold(compiled: Path) -> None:
    """Chaos, through the compiled core."""
    done = python(compiled, "-m", "loadgen.simulator.chaos", "--schedules", "300")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


def test_hosts_are_sent_pure_python(compiled: Path) -> None:
    """They may be other machines."""
    code = (
        "import io, zipfile\n"
        "from cluster.remote.wheel import pack\n"
        "names = zipfile.ZipFile(io.BytesIO(pack().content)).namelist()\n"
        "print('router/core/edf.py' in names, [n for n in names if n.endswith(('.so', 'compiled.json'))])\n"
    )
    done = python(compiled, "-c", code)
    assert (done.returncode, done.stdout) == (0, "True []\n"), done.stderr


def test_a_wheel_is_compiled_if_asked_for(tmp_path: Path) -> None:
    """With the tag of this Python and machine; the source is in it too."""
    needs_compiler()
    words = ["-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(ROOT)]
    env = {**os.environ, "SUPERSERVE_COMPILE": "1", **UNHURRIED}
    done = subprocess.run(
        [sys.executable, *words],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    suffix = sysconfig.get_config_var("EXT_SUFFIX")

    assert not wheel.name.endswith("-any.whl")
    assert {"router/core/edf.py", f"router/core/edf{suffix}", "superserve/compiled.json"} <= names
    assert any(name.endswith(f"__mypyc{suffix}") for name in names)


def test_policies_of_other_packages_run_on_it(compiled: Path, tmp_path: Path) -> None:
    """One that extends a shipped policy, and one that stands alone."""
    (tmp_path / "mine.py").write_text(
        "from router.policies import Choice\n"
        "from router.policies.slackfit import SlackFit\n"
        "class Mine(SlackFit):\n"
        "    name = 'mine'\n"
        "    def choose(self, queue, worker, now_ns):\n"
        "        choice = super().choose(queue, worker, now_ns)\n"
        "        return choice and Choice(queue.head_floor, choice.batch_size)\n"
        "class Alone:\n"
        "    name = 'alone'\n"
        "    def __init__(self, profile): pass\n"
        "    def choose(self, queue, worker, now_ns): return Choice(queue.head_floor, 1)\n"
    )
    code = (
        "import sys; sys.path.append(sys.argv[1])\n"
        "from mine import Alone, Mine\n"
        "from loadgen.simulator.world import Simulation\n"
        "from loadgen.simulator.workloads import Workload\n"
        "from loadgen.traces.trace import load_trace\n"
        "from profiles.table import load_profile\n"
        "trace = load_trace('poisson:rate=300', duration_s=1, seed=1)\n"
        "for policy in (Mine, Alone):\n"
        "    found = Simulation([load_profile('cnn-8gpu-modelled')] * 2, policy=policy)\n"
        "    found.offer(Workload(trace, 36_000_000))\n"
        "    found.run()\n"
        "    print(found.core.answered[0] == trace.n, found.core.dispatcher.n_wrong)\n"
    )
    done = python(compiled, "-c", code, str(tmp_path))
    assert (done.returncode, done.stdout) == (0, "True 0\nTrue 0\n"), done.stdout + done.stderr


def test_a_stale_module_is_refused_until_it_is_removed(compiled: Path) -> None:
    """In one line that says what to type; pure Python runs the changed file."""
    module = compiled / "router" / "core" / "edf.py"
    before = module.read_bytes()
    module.write_bytes(before + b"# changed\n")
    try:
        refused = python(compiled, "-P", "-m", "router", "--help")
        assert refused.returncode == 1
        assert refused.stderr.startswith(f"Error: {module}: the source has changed since it was compiled")
        assert refused.stderr.count("\n") == 1
    finally:
        module.write_bytes(before)
    assert python(compiled, "-P", "-m", "router", "--help").returncode == 0
