"""Guards of the tree's shape: what a reader has to hold in mind at once stays small.

Each guard lists what breaks it today. A new offender fails the test, and so does one that was mended and is
still listed: the lists only shrink.
"""

from __future__ import annotations

import ast
import functools
import re
import tomllib
from collections import Counter, defaultdict
from typing import TYPE_CHECKING

import pytest

from tests.paths import ROOT
from tests.test_architecture import ENTRY_POINTS, MODULES, PACKAGES, Import, imports, statements, tree

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

MAX_FUNCTION_LINES = 70
MAX_FILE_LINES = 600
MAX_MODULES = 12

LONG_FUNCTIONS: set[str] = set()
LONG_FILES: set[str] = set()
CROWDED_FOLDERS: set[str] = set()
UNIMPORTED: set[str] = set()
SAME_NAMES: set[str] = set()
CYCLES: set[frozenset[str]] = set()

STARTED = {
    # By another process of ours, as `python -m NAME`.
    "cluster.engines.placed.slurm_keeper",
    "cluster.host.bare",
    "cluster.host.onhost",
    "cluster.host.watch",
    "loadgen.bench.senders.asgi_echo",
    "loadgen.bench.senders.crowd",
    "loadgen.bench.senders.echo",
    "loadgen.bench.senders.mosec_null",
    "loadgen.bench.senders.sender",
    "loadgen.live.sender",
    "loadgen.live.sink",
    "loadgen.oip.sender",
    # By the Makefile or a person, as `python -m NAME`.
    "gpu_worker.models.train_digits",
    "gpu_worker.serve.eventlog",
    "loadgen.paper.figures",
    "loadgen.paper.reproduce",
    "loadgen.simulator.chaos.routers",
    "loadgen.study.agreement",
    "loadgen.study.shards",
}
"""Modules that are programs: nothing needs to import them."""


@functools.cache
def imports_of(name: str) -> tuple[Import, ...]:
    """Return a module's imports of our own modules."""
    return tuple(found for found in imports(name, MODULES[name]) if found.target in MODULES)


def relative(path: Path) -> str:
    """Return a path as the lists above have it."""
    return path.relative_to(ROOT).as_posix()


# --- size -----------------------------------------------------------------------------------


def below(node: ast.AST) -> Iterator[ast.AST]:
    """Yield every statement below a node, however deep."""
    for child in statements(node):
        yield child
        yield from below(child)


def long_functions(nodes: Iterable[ast.AST], where: str) -> Iterator[str]:
    """Yield the functions among `nodes` that are too long, each as `where:name`."""
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None, "parsed from a file"
            if node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES:
                yield f"{where}:{node.name}"


def test_functions_fit_on_a_screen() -> None:
    """No function takes more than 70 lines."""
    found = {
        one for name in MODULES for one in long_functions(below(tree(MODULES[name])), relative(MODULES[name]))
    }

    assert found == LONG_FUNCTIONS


def test_files_are_one_idea() -> None:
    """No file takes more than 600 lines."""
    found = {
        relative(path)
        for path in MODULES.values()
        if len(path.read_text(encoding="utf-8").splitlines()) > MAX_FILE_LINES
    }

    assert found == LONG_FILES


def test_folders_are_seen_at_a_glance() -> None:
    """No folder holds more than 12 modules, `__init__` and `__main__` aside."""
    held = Counter(
        relative(path.parent) for path in MODULES.values() if path.stem not in ("__init__", "__main__")
    )

    assert {folder for folder, n in held.items() if n > MAX_MODULES} == CROWDED_FOLDERS


def test_a_long_function_is_found() -> None:
    """The search above is not passed by finding nothing."""
    body = "".join(f"    x = {i}\n" for i in range(MAX_FUNCTION_LINES))

    assert list(long_functions(below(ast.parse(f"def f():\n{body}")), "a.py")) == ["a.py:f"]
    assert not list(long_functions(below(ast.parse(f"def f():\n{body[:-10]}")), "a.py"))


# --- names ----------------------------------------------------------------------------------


def public_classes() -> dict[str, list[str]]:
    """Return the modules that define each public class name."""
    found: dict[str, list[str]] = defaultdict(list)
    for name in MODULES:
        for node in tree(MODULES[name]).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found[node.name].append(name)
    return found


def test_no_two_public_classes_share_a_name() -> None:
    """A name is one thing: a reader who meets it need not ask which."""
    assert {name for name, where in public_classes().items() if len(where) > 1} == SAME_NAMES


# --- imports --------------------------------------------------------------------------------


def entry_points() -> set[str]:
    """Return the modules that are commands: of pyproject.toml, `python -m PACKAGE`, or in STARTED.

    A `__main__` names the module of its command as text: `run` imports it.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = [*project["scripts"].values()]
    named += [value for group in project["entry-points"].values() for value in group.values()]
    mains = {name for name in MODULES if name.endswith(".__main__")}
    # Imported by name, inside the guard of `superserve.roles.command`.
    guarded = {
        module
        for name in mains
        for module in re.findall(r'run\("([\w.]+)"', MODULES[name].read_text("utf-8"))
    }
    return {value.partition(":")[0] for value in named} | mains | guarded | STARTED


def test_every_module_is_used() -> None:
    """A module that nothing imports and nobody starts is dead, or a test's and belongs there."""
    used = {found.target for name in MODULES for found in imports_of(name) if found.target != name}
    packages = {name for name, path in MODULES.items() if path.name == "__init__.py"}

    assert set(MODULES) - used - packages - entry_points() == UNIMPORTED


def test_programs_that_are_listed_are_programs() -> None:
    """Each of STARTED can be started, so that the list excuses nothing else."""
    for name in STARTED:
        assert any(
            isinstance(node, ast.If) and "__name__ ==" in ast.unparse(node.test)
            for node in tree(MODULES[name]).body
        ), name


def folder_of(name: str) -> str:
    """Return the folder that a module lies in, as a dotted name."""
    return name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]


def folder_arrows() -> dict[str, set[str]]:
    """Return which folders each folder imports from, types included.

    A role's commands and the names that its `__init__` hands on are ways in, not parts of a floor.
    """
    arrows: dict[str, set[str]] = defaultdict(set)
    for name, path in MODULES.items():
        role, _, rest = name.partition(".")
        if rest in ENTRY_POINTS or (path.name == "__init__.py" and name == role):
            continue
        for found in imports_of(name):
            here, there = folder_of(name), folder_of(found.target)
            if here != there:
                arrows[here].add(there)
    return arrows


def cycles(arrows: Mapping[str, set[str]]) -> set[frozenset[str]]:
    """Return the sets of folders that import each other, directly or by way of others."""
    reach = {start: _reachable(start, arrows) for start in arrows}
    groups = {
        frozenset(other for other in reach if other in reach[start] and start in reach[other])
        for start in reach
    }
    return {group for group in groups if len(group) > 1}


def _reachable(start: str, arrows: Mapping[str, set[str]]) -> set[str]:
    """Return `start` and every folder that it imports from, at whatever remove."""
    seen, todo = {start}, [start]
    while todo:
        for there in arrows.get(todo.pop(), ()):
            if there not in seen:
                seen.add(there)
                todo.append(there)
    return seen


def test_folders_are_floors() -> None:
    """No two folders import each other, not even for types: one of them is the lower floor."""
    assert cycles(folder_arrows()) == CYCLES


@pytest.mark.parametrize(
    ("arrows", "expected"),
    [
        ({"a": {"b"}, "b": {"c"}, "c": set()}, set()),
        ({"a": {"b"}, "b": {"a"}}, {frozenset("ab")}),
        ({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}, {frozenset("abc")}),
    ],
)
def test_cycles_are_found(arrows: dict[str, set[str]], expected: set[frozenset[str]]) -> None:
    """Direct ones and those of three, and none where there is none."""
    assert cycles(arrows) == expected


def test_the_tree_is_looked_at() -> None:
    """Every role's modules are among those that the guards see."""
    assert {name.partition(".")[0] for name in MODULES} == set(PACKAGES)
