"""Runs pairs, each in a process of its own, several at a time."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.environments.commands import EMULATED
from tests.paths import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from tests.environments.draw import Pair

_LIMIT_S = 300.0
_HOSTS = """\
router: {host: a}
hosts:
  - {name: a, address: 127.0.0.1, workers: 1}
emulate: cnn-8gpu-modelled
security: none
"""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of a pair.

    Attributes:
        pair: Which.
        complaints: What is wrong.
        seen: The steps: exit codes and the ends of what they wrote.
        skipped: Why it could not be run here; "" if it was.
    """

    pair: Pair
    complaints: tuple[str, ...]
    seen: tuple[dict[str, Any], ...] = ()
    skipped: str = ""


@contextmanager
def inputs() -> Iterator[Path]:
    """Give a folder with what commands read: a hosts file, a trace, a result, a router's event log."""
    folder = Path(tempfile.mkdtemp(prefix="ss-in-", dir="/tmp"))
    try:
        folder.chmod(0o755)
        (folder / "hosts.yaml").write_text(_HOSTS, encoding="utf-8")
        _make(folder)
        yield folder
    finally:
        shutil.rmtree(folder)


def _make(folder: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "MPLCONFIGDIR": str(folder)}
    loadgen = [sys.executable, "-P", "-m", "loadgen"]
    trace = ["trace", "make", "poisson:rate=200", "--duration", "1", "--out", str(folder / "trace.npz")]
    simulated = ["simulate", "--trace", str(folder / "trace.npz"), "--emulate", f"{EMULATED}:1"]
    for argv in (trace, [*simulated, "--json", str(folder / "result.json")]):
        subprocess.run([*loadgen, *argv], env=env, check=True, stdout=subprocess.DEVNULL, timeout=60)
    router = [sys.executable, "-P", "-m", "router", "--record", str(folder / "router.log")]
    with subprocess.Popen(router, env=env, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        process.stderr.readline()  # it says where it listens
        process.terminate()
        process.communicate(timeout=30)


def run_pair(pair: Pair, folder: Path) -> Verdict:
    """Run one pair in a process of its own."""
    asked = json.dumps({"pair": asdict(pair), "inputs": str(folder)})
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"}
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "tests.environments.pair"],
            input=asked, env=env, capture_output=True, text=True, timeout=_LIMIT_S, check=False,
        )  # fmt: skip
        said = json.loads(done.stdout)
    except (subprocess.TimeoutExpired, ValueError) as error:
        detail = getattr(error, "stderr", None) or (
            done.stderr[-2_000:] if isinstance(error, ValueError) else ""
        )
        return Verdict(pair, (f"the pair could not be judged: {error}: {detail}",))
    return Verdict(
        pair, tuple(said.get("complaints", ())), tuple(said.get("seen", ())), said.get("skipped", "")
    )


def run_all(pairs: Iterable[Pair], folder: Path, at_once: int) -> Iterator[Verdict]:
    """Run pairs, some at once; verdicts come in the pairs' order."""
    with ThreadPoolExecutor(at_once) as pool:
        yield from pool.map(lambda pair: run_pair(pair, folder), pairs)
