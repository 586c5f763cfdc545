"""Who may import whom. The tree is the architecture, and this keeps its arrows."""

from __future__ import annotations

import ast
import functools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

ROOT = Path(__file__).parent.parent
PACKAGES = ("superserve", "router", "gpu_worker", "gateway", "loadgen", "profiles", "cluster")

# What a folder, and all below it, may import beyond itself; arrows add up. An entry of the right side
# stands for itself and all below it. Nobody is given `cluster`.
ARROWS: dict[str, tuple[str, ...]] = {
    "superserve": (),
    "router": ("superserve", "profiles.table"),
    "gpu_worker": ("superserve", "profiles.table"),
    "profiles": ("superserve",),
    # A client of the router, like any application.
    "gateway": ("superserve",),
    # What measures, calibrates or counts a subnet runs it; the commands lead there.
    "profiles.measuring": ("gpu_worker",),
    # The load generator starts routers and workers as processes, through superserve.roles.processes.
    "loadgen": ("superserve", "profiles.table"),
    # The event logs of emulated GPUs prove that none of them cheated; `core` is how fast those GPUs are; a
    # policy's name is checked before anything is started.
    "loadgen.live": ("gpu_worker.serve", "gpu_worker.core", "router.policies"),
    "loadgen.cli": ("gpu_worker.serve", "gpu_worker.core", "router.policies", "router.report.scaler"),
    "loadgen.paper": ("gpu_worker.serve",),
    # Fleets that follow their load are simulated with the autoscaler that serves.
    "loadgen.study": ("gpu_worker.serve", "gpu_worker.core", "router.report"),
    # The gate keeps figures under the version of the policy's code, and so asks where that is.
    "loadgen.study.gate": ("router.policies",),
    # Why a query was late is read from the router's event log, replayed, and from its flight record.
    "loadgen.study.explain": ("router.serve", "router.core"),
    # The simulator runs the core that serves, under a policy built by name; no sockets. Its chaos clients are
    # the session that applications embed, given the messages that the router would send.
    "loadgen.simulator": ("router.core", "router.policies", "router.serve", "gpu_worker"),
    # gRPC's messages, to offer load over the gateway's protocol; its options are those of a run.
    "loadgen.oip": ("gateway.rpc", "gpu_worker.core"),
    # The demo compares what came back with a local forward of the same subnet.
    "loadgen.demo": ("gpu_worker", "profiles.measuring"),
    # The benchmarks time the router's path, the decision and the actuation on their own.
    "loadgen.bench": ("router", "gpu_worker"),
    "cluster": ("superserve", "router", "gpu_worker", "loadgen", "profiles"),
}

# What applications embed stays small: these and the standard library.
EMBEDDED_DEPENDENCIES = ("zmq", "numpy", "orjson")

# Pure cores: events and `now_ns` in, actions out. The router's, the client's and the worker's.
PURE = (
    "superserve.client.session",
    "superserve.client.reply",
    "router.core",
    "router.policies",
    "gpu_worker.core",
)
ENTRY_POINTS = ("cli", "__main__")
"""Modules at the top of a role that lead into all of it, and that nothing imports."""
IMPURE = ("zmq", "socket", "time", "threading", "logging", "random", "numpy.random", "asyncio", "secrets")


class Import(NamedTuple):
    """One import: the module it reaches, its line, and whether it runs when the importer is imported."""

    target: str
    line: int
    at_import: bool


def modules() -> dict[str, Path]:
    """Return every module of the packages: its dotted name and its file."""
    paths = (path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py")))
    return {dotted(path.relative_to(ROOT)): path for path in paths}


def dotted(path: Path) -> str:
    """Return the module's name: `router/core.py` is `router.core`, `router/__init__.py` is `router`."""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = modules()


@functools.cache
def tree(path: Path) -> ast.Module:
    """Return a file's syntax tree."""
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


@functools.cache
def imports(name: str, path: Path) -> tuple[Import, ...]:
    """Return every import of a module: at its top, inside functions, and for type checking."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    return tuple(_walk(tree(path), package, at_import=True))


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """Yield what is directly below a node and has statements or is one; expressions are most of a tree."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.ExceptHandler | ast.match_case):
            yield child


def _walk(node: ast.AST, package: str, *, at_import: bool) -> Iterator[Import]:
    """Walk the tree; what stands in a function or under TYPE_CHECKING does not run at import."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        yield from (Import(target, node.lineno, at_import) for target in _targets(node, package))
    is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    is_typing = isinstance(node, ast.If) and ast.unparse(node.test) in (
        "TYPE_CHECKING",
        "typing.TYPE_CHECKING",
    )
    deferred: list[ast.stmt] = getattr(node, "body", []) if is_function or is_typing else []
    for child in statements(node):
        yield from _walk(child, package, at_import=at_import and child not in deferred)


def _targets(node: ast.Import | ast.ImportFrom, package: str) -> list[str]:
    """Return the modules that a statement reaches: `from router import core` is `router.core`."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    parents = package.split(".")
    base = ".".join(parents[: len(parents) - node.level + 1]) if node.level else ""
    origin = ".".join(part for part in (base, node.module) if part)
    members = (f"{origin}.{alias.name}" for alias in node.names)
    return [member if member in MODULES else origin for member in members]


def under(name: str, roots: Iterable[str]) -> bool:
    """Return whether a module is one of `roots` or below one."""
    return any(name == root or name.startswith(f"{root}.") for root in roots)


def forbidden(name: str, target: str) -> bool:
    """Return whether a module may not import `target`, a module of ours or of others."""
    if not under(target, PACKAGES) or under(target, [name.partition(".")[0]]):
        return False
    allowed = [root for importer, roots in ARROWS.items() if _may_use(name, importer) for root in roots]
    return not under(target, allowed)


def _may_use(name: str, importer: str) -> bool:
    """Return whether a module may use the arrows of `importer`: it lies below, or is the role's command."""
    role, _, rest = name.partition(".")
    return under(name, [importer]) or (rest in ENTRY_POINTS and under(importer, [role]))


def offences(names: Iterable[str], is_wrong: Callable[[str, Import], bool]) -> list[str]:
    """Return the imports of modules that are wrong, each with its file and line."""
    return [
        f"{MODULES[name].relative_to(ROOT)}:{found.line} imports {found.target}"
        for name in names
        for found in imports(name, MODULES[name])
        if is_wrong(name, found)
    ]


def test_imports_follow_the_arrows() -> None:
    """No module imports another role beyond what the table allows, even inside a function."""
    assert offences(MODULES, lambda name, found: forbidden(name, found.target)) == []


def test_importing_superserve_needs_little() -> None:
    """An application that embeds the client gets no torch, click or psutil by importing it."""
    allowed = (*EMBEDDED_DEPENDENCIES, "superserve", *sys.stdlib_module_names)
    names = [name for name in MODULES if under(name, ["superserve"])]

    assert names
    assert offences(names, lambda _, found: found.at_import and not under(found.target, allowed)) == []


def test_the_core_and_the_policies_are_pure() -> None:
    """They have no socket, clock, thread, log or hidden randomness to reach for."""
    names = [name for name in MODULES if under(name, PURE)]

    assert names
    assert offences(names, lambda _, found: under(found.target, IMPURE)) == []


@pytest.mark.parametrize(
    ("name", "target", "is_forbidden"),
    [
        ("superserve.client.client", "router.core", True),
        ("superserve.client.client", "superserve.wire", False),
        ("router.core", "profiles.table", False),
        ("router.core", "profiles.measuring.measure", True),
        ("router.core", "profiles", True),
        ("router.serve.loop", "gpu_worker.serve.server", True),
        ("profiles.measuring.measure", "gpu_worker.supernet.supernet", False),
        ("profiles.table", "gpu_worker.supernet.supernet", True),
        ("loadgen.simulator.world", "router.core", False),
        ("loadgen.simulator.world", "router.report.status", True),
        ("loadgen.traces.trace", "router.core", True),
        ("loadgen.bench.table", "superserve.roles.processes", False),
        ("cluster.operate.up", "loadgen.live.run", False),
        ("router.cli", "cluster.operate.up", True),
        ("router.core", "numpy", False),
    ],
)
def test_the_table_means_what_style_says(name: str, target: str, is_forbidden: bool) -> None:
    """Worked examples of arrows, so that a slip in the table shows."""
    assert forbidden(name, target) == is_forbidden


def test_imports_are_found_wherever_they_stand(tmp_path: Path) -> None:
    """Relative, nested, conditional and for type checking: each is seen, with whether it runs."""
    path = tmp_path / "module.py"
    path.write_text(
        "import zmq.asyncio\n"
        "from router import policies, Unknown\n"
        "from . import wire\n"
        "from .wire import Kind\n"
        "if TYPE_CHECKING:\n    import torch\nelse:\n    import time\n"
        "def f():\n    import random\n"
        "class C:\n    import socket\n"
    )
    assert list(imports("superserve.module", path)) == [
        Import("zmq.asyncio", 1, at_import=True),
        Import("router.policies", 2, at_import=True),
        Import("router", 2, at_import=True),
        Import("superserve.wire" if "superserve.wire" in MODULES else "superserve", 3, at_import=True),
        Import("superserve.wire", 4, at_import=True),
        Import("torch", 6, at_import=False),
        Import("time", 8, at_import=True),
        Import("random", 10, at_import=False),
        Import("socket", 12, at_import=True),
    ]
