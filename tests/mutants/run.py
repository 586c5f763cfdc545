"""Run tests against copies of the tree, each broken by one mutant."""

from __future__ import annotations

import compileall
import contextlib
import enum
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from py_compile import PycInvalidationMode
from typing import TYPE_CHECKING

from tests.mutants.mutant import Mutant, StaleError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

LIMIT_S = 180.0
"""How long the tests of one mutant may take; one that makes them hang is noticed by that."""

_FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+::\S+)", re.MULTILINE)
"""A test in pytest's summary. A file that cannot be imported has no `::`: then no test looked at anything."""


class Verdict(enum.Enum):
    """The outcome of a mutant; only the first is good."""

    KILLED = "killed"
    SURVIVED = "SURVIVED"
    STALE = "STALE"  # its snippet is not in the file any more
    BROKEN = "BROKEN"  # the tests could not be run at all


@dataclass(frozen=True, slots=True)
class Fate:
    """The outcome of one mutant.

    Attributes:
        detail: The test that failed, or why there is none.
        took_s: How long its tests ran.
    """

    mutant: Mutant
    verdict: Verdict
    detail: str
    took_s: float = 0.0


def baseline(tests: Sequence[str], root: Path) -> str | None:
    """Run tests in an unbroken copy; return None if they pass, else pytest's output."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        tree = copy_tree(root, Path(folder) / "tree")
        code, output = _pytest(tree, tests)
    return None if code == 0 else output


def fates(mutants: Sequence[Mutant], root: Path, *, n_jobs: int) -> Iterator[Fate]:
    """Yield the outcome of each mutant, in order; `n_jobs` at a time, each in its own copy."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder, ThreadPoolExecutor(n_jobs) as pool:
        trees: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for i in range(n_jobs):
            trees.put(copy_tree(root, Path(folder) / str(i)))

        def one(mutant: Mutant) -> Fate:
            tree = trees.get()
            try:
                return _fate(mutant, tree)
            finally:
                trees.put(tree)

        yield from pool.map(one, mutants)


def copy_tree(root: Path, to: Path) -> Path:
    """Copy the packages, their tests and the settings of pytest; return where they are."""
    for package in root.glob("*/__init__.py"):
        shutil.copytree(
            package.parent, to / package.parent.name, ignore=shutil.ignore_patterns("__pycache__")
        )
    shutil.copy(root / "pyproject.toml", to)
    # Compiled once, and valid by content: by time and size, a mutant put in place within the same
    # second as the original, and as long, would not be seen.
    compileall.compile_dir(to, quiet=2, invalidation_mode=PycInvalidationMode.CHECKED_HASH)
    return to


def _fate(mutant: Mutant, tree: Path) -> Fate:
    try:
        path, broken = mutant.applied(tree)
    except StaleError as error:
        return Fate(mutant, Verdict.STALE, str(error))
    text = path.read_text(encoding="utf-8")
    path.write_text(broken, encoding="utf-8")
    started_s = time.monotonic()
    try:
        code, output = _pytest(tree, mutant.tests)
    finally:
        path.write_text(text, encoding="utf-8")
    verdict, detail = _judge(code, output)
    return Fate(mutant, verdict, detail, time.monotonic() - started_s)


def _judge(code: int | None, output: str) -> tuple[Verdict, str]:
    if code is None:
        return Verdict.KILLED, f"the tests did not end within {LIMIT_S:.0f} s"
    if code == 0:
        return Verdict.SURVIVED, "every test passed"
    failed = _FAILED.search(output)
    if failed is None:
        return Verdict.BROKEN, f"no test failed, but pytest ended with {code}:\n{output[-2_000:]}"
    return Verdict.KILLED, failed[1]


def _pytest(tree: Path, tests: Sequence[str]) -> tuple[int | None, str]:
    """Run tests in a copy of the tree; return the exit code, None if they took too long, and the output."""
    options = ["-x", "-q", "--tb=no", "--no-header", "--hypothesis-profile=mutants"]
    plugins = ["-p", "no:randomly", "-p", "no:cacheprovider"]
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", *options, *plugins, *tests],
        cwd=tree,
        env=os.environ | {"PYTHONPATH": str(tree)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        return None, ""
    finally:
        with contextlib.suppress(ProcessLookupError):  # with whatever it has started
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return process.returncode, output
