"""Figures kept from run to run, so that tuning a policy simulates that policy alone.

One file for each cell and seed, under a folder, by default out/gate. Its name is a hash of all that the
queries and the GPUs are: the cell's fields, the trace file's bytes, the profiles, the seed. In it are the
figures of each comparator, and of the bound, under the version of the code that gave them: a hash of every
module of the router, the simulator, the traces and the GPUs that the policy reaches by imports, comments and
docstrings aside. So a change of the core asks for new figures, and one of a policy that no other one imports
does not.
"""

from __future__ import annotations

import ast
import hashlib
from dataclasses import asdict, fields
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson

from loadgen.simulator.workloads import parse_cluster
from loadgen.study.compare import Figures, contender
from loadgen.study.gate.draft import CNN
from loadgen.traces.specs import is_spec
from profiles.table import load_profile
from router.policies.registry import make_policy
from superserve.errors import ConfigError
from superserve.files import write_whole

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from loadgen.study.compare import Cell

BOUND = "(bound)"
"""What the bound is called among the policies."""

SCHEMA = 1
"""To be raised whenever `loadgen.study.compare.serve` or `bound_in` makes other figures of the same run."""

_WITHIN = ("router.core", "router.policies", "gpu_worker.core", "loadgen.simulator", "loadgen.traces",
           "loadgen.bound", "profiles.table")  # fmt: skip
_ROOTS = ("loadgen.simulator.simulate", "loadgen.simulator.workloads", "loadgen.traces.trace")
_BOUND_ROOTS = ("loadgen.bound.fluid", "loadgen.simulator.workloads", "loadgen.traces.trace")

# It names every policy and decides nothing: a new policy there changes no other one's figures.
_LEFT_OUT = "router.policies.registry"


class FigureStore:
    """The figures of comparators and of the bound, in a folder.

    Args:
        folder: It is made when the first figures are kept.
        any_version: Whether figures of another version of the code will do where there are none of this.

    Attributes:
        n_stale: Figures that were of another version of the code.
    """

    def __init__(self, folder: Path, *, any_version: bool = False) -> None:
        self._folder = folder
        self._any_version = any_version
        self.n_stale = 0

    def get(self, cell: Cell, seed: int, policy: str) -> Figures | None:
        """Return the figures of a policy, or of `BOUND`; None if they are not known.

        Raises:
            ConfigError: The file is none of ours.
        """
        versions = self._read(cell, seed).get(policy, {})
        found = versions.get(code_version(policy))
        if found is None and versions and self._any_version:
            found = list(versions.values())[-1]
            self.n_stale += 1
        return None if found is None else Figures(**found)

    def put(self, cell: Cell, seed: int, policy: str, figures: Figures) -> None:
        """Keep the figures of a policy, or of `BOUND`."""
        known = self._read(cell, seed)
        known.setdefault(policy, {})[code_version(policy)] = asdict(figures)
        path = self._path(cell, seed)
        body = {"schema": SCHEMA, "cell": cell.name, "seed": seed, "figures": known}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, orjson.dumps(body, option=orjson.OPT_INDENT_2))
        except OSError as error:
            raise ConfigError(f"{path}: cannot be written: {error.strerror}") from error

    def _read(self, cell: Cell, seed: int) -> dict[str, dict[str, Any]]:
        path = self._path(cell, seed)
        try:
            body = orjson.loads(path.read_bytes())
        except FileNotFoundError:
            return {}
        except (OSError, orjson.JSONDecodeError) as error:
            raise ConfigError(f"{path}: expected figures of the gate; remove it: {error}") from error
        names = {field.name for field in fields(Figures)}
        try:
            found: dict[str, dict[str, Any]] = body["figures"]
            if any(one.keys() != names for versions in found.values() for one in versions.values()):
                return {}  # kept by a release with other figures
        except (AttributeError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}: expected figures of the gate; remove it: {error!r}") from error
        return found

    def _path(self, cell: Cell, seed: int) -> Path:
        return self._folder / f"{content_key(cell, seed)}.json"


def content_key(cell: Cell, seed: int) -> str:
    """Return a hash of all that a cell's queries and GPUs are with a seed; its name is no part of it."""
    content = asdict(cell)
    del content["name"]
    if not is_spec(cell.trace):
        content["trace"] = _file_hash(cell.trace)
    profiles = {profile.name: profile for profile in parse_cluster(cell.cluster)}
    hashes = {name: _hash(repr(profile)) for name, profile in profiles.items()}
    return _hash(repr((SCHEMA, np.__version__, sorted(content.items()), sorted(hashes.items()), seed)))


@cache
def _file_hash(path: str) -> str:
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise ConfigError(f"{path}: expected a readable trace: {error.strerror}") from error


@cache
def code_version(policy: str) -> str:
    """Return a hash of the code that gives a policy's figures, or the bound's; see the module's docstring."""
    if policy == BOUND:
        return _version(_BOUND_ROOTS)
    made = make_policy(contender(policy)[0], load_profile(CNN))
    return _version((*_ROOTS, type(made).__module__))


def reached(roots: Sequence[str]) -> dict[str, str]:
    """Return a hash of each module that `roots` reach by imports, those for types included.

    Comments and docstrings are no part of it.
    """
    seen: dict[str, str] = {}
    todo = list(roots)
    while todo:
        name = todo.pop()
        spec = None if name in seen or name == _LEFT_OUT else find_spec(name)
        if spec is None or spec.origin is None:
            continue
        tree = ast.parse(Path(spec.origin).read_bytes())
        seen[name] = _hash(_bare(tree))
        package = name if spec.submodule_search_locations is not None else name.rpartition(".")[0]
        todo += [target for target in _imports(tree, package) if target.startswith(_WITHIN)]
    return seen


@cache
def _version(roots: tuple[str, ...]) -> str:
    return _hash(repr(sorted(reached(roots).items())))


def _imports(tree: ast.Module, package: str) -> Iterator[str]:
    """Yield the modules that a module of `package` may import, and names that may be modules in them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield base
            yield from (name for alias in node.names if _is_module(name := f"{base}.{alias.name}"))


@cache
def _is_module(name: str) -> bool:
    if not name.startswith(_WITHIN):
        return False
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # its parent is no package
        return False


def _bare(tree: ast.Module) -> str:
    """Return the tree as text, without docstrings."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            is_text = [
                isinstance(one, ast.Expr)
                and isinstance(one.value, ast.Constant)
                and isinstance(one.value.value, str)
                for one in body
            ]
            node.body = [one for one, text in zip(body, is_text, strict=True) if not text]  # type: ignore[attr-defined]  # found by name
    return ast.dump(tree)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
