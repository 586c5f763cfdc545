"""YAML as plain data with line numbers: where each value is, and every key that appears twice.

Aliases and merge keys (`<<: *shared`) work. Anything that could grow without bound through them is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, ScalarNode, SequenceNode

from superserve.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

Where = tuple[str | int, ...]
"""The path to a value: keys, and indices of lists, from the top."""

MAX_BYTES = 1 << 20  # a file with 1,024 hosts takes far less; a larger one is not a hosts file
_MAX_NODES = 100_000  # lists of lists of aliases make billions from a kilobyte
_MERGE = "tag:yaml.org,2002:merge"


@dataclass(slots=True)
class Located:
    """A file's data.

    Attributes:
        data: Dictionaries, lists and scalars.
        lines: The line of each value, from 1; for a value in a mapping, its key's line.
        twice: Keys that appear in a mapping more than once: line, path, line of the first.
    """

    data: Any = None
    lines: dict[Where, int] = field(default_factory=dict)
    twice: list[tuple[int, Where, int]] = field(default_factory=list)

    def line(self, where: Where) -> int:
        """Return the line of a value, or of the nearest thing around it."""
        while where and where not in self.lines:
            where = where[:-1]
        return self.lines.get(where, 1)


def read_located(path: Path) -> Located:
    """Read a YAML file.

    Raises:
        ConfigError: It cannot be read or is not YAML; the error names the line.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        text = raw.decode()
    except OSError as error:
        raise ConfigError(f"{path}: expected a file that can be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path}:{line}: expected UTF-8, got byte 0x{raw[error.start]:02x}") from error
    if len(raw) > MAX_BYTES:
        raise ConfigError(f"{path}: expected at most {MAX_BYTES} bytes")
    try:
        yaml = YAML(typ="safe", pure=True)
        return _Reader(yaml, path).read(yaml.compose(text))
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = 1 if mark is None else mark.line + 1
        context = f" {error.context}" if error.context else ""
        raise ConfigError(f"{path}:{line}: expected YAML: {error.problem}{context}") from error
    except YAMLError as error:
        raise ConfigError(f"{path}: expected YAML: {str(error).splitlines()[0]}") from error


class _Reader:
    def __init__(self, yaml: YAML, path: Path) -> None:
        self._yaml = yaml
        self._path = path
        self._n_nodes = 0
        self._open: list[int] = []  # the ids of the enclosing nodes
        self._located = Located()

    def read(self, root: Any) -> Located:
        if root is not None:
            self._located.data = self._value(root, (), root)
        return self._located

    def _value(self, node: Any, where: Where, at: Any) -> Any:
        """Return a node's data; `at` is the node whose line people would look at."""
        line = at.start_mark.line + 1
        self._n_nodes += 1
        if self._n_nodes > _MAX_NODES or id(node) in self._open:
            raise ConfigError(
                f"{self._path}:{line}: expected aliases that end: this one holds itself, or far too much"
            )
        self._located.lines.setdefault(where, line)
        self._open.append(id(node))
        try:
            if isinstance(node, MappingNode):
                return self._mapping(node, where)
            if isinstance(node, SequenceNode):
                return [self._value(item, (*where, i), item) for i, item in enumerate(node.value)]
            return self._scalar(node)
        finally:
            self._open.pop()

    def _mapping(self, node: MappingNode, where: Where) -> dict[str, Any]:
        found: dict[str, Any] = {}
        first: dict[str, int] = {}
        merged: list[Any] = []
        for key_node, value_node in node.value:
            if str(key_node.tag) == _MERGE:
                merged += value_node.value if isinstance(value_node, SequenceNode) else [value_node]
                continue
            key, line = str(key_node.value), key_node.start_mark.line + 1
            if key in first:
                self._located.twice.append((line, (*where, key), first[key]))
                continue
            first[key] = line
            found[key] = self._value(value_node, (*where, key), key_node)
        for other in merged:
            more = self._value(other, where, other)
            if not isinstance(more, dict):
                line = other.start_mark.line + 1
                raise ConfigError(
                    f"{self._path}:{line}: <<: expected a mapping, or a list of them, got {more!r}"
                )
            found = more | found
        return found

    def _scalar(self, node: ScalarNode) -> Any:
        value = self._yaml.constructor.construct_object(node, deep=True)
        # YAML reads 2026-11-24 as a date; here it is text.
        return value if value is None or isinstance(value, bool | int | float | str) else str(node.value)
