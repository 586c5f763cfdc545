"""What renderers return: files with a name and a text, and YAML that every version of YAML reads alike."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ruamel.yaml import YAML
from ruamel.yaml.representer import SafeRepresenter

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ruamel.yaml.nodes import ScalarNode

# Anything else is quoted: engines read YAML 1.1, in which `on` is a truth, 22:22 a number and 1_0 ten.
_PLAIN = re.compile(r"[A-Za-z/][A-Za-z0-9/._-]*")
_LINE = re.compile(r"([!-~]|[!-~][ -~]*[!-~])?")  # of a block: no space at either end, nothing odd
_WORDS = frozenset({"y", "n", "yes", "no", "on", "off", "true", "false", "null"})
_WIDTH = 1_000  # lines are not folded: people search for command lines


@dataclass(frozen=True, slots=True)
class Rendered:
    """A file for an engine.

    Attributes:
        name: Relative to the folder that it is written to: "compose.yaml", "keys/router.key".
        text: Its content; not shown, since it may be a secret.
        is_secret: Whether it is for its owner only, and never printed.
        is_beside: Whether the engine is given another file, which reads this one: it is not printed either.
    """

    name: str
    text: str = field(repr=False)
    is_secret: bool = False
    is_beside: bool = False


def yaml_text(*documents: Any, head: Iterable[str] = ()) -> str:
    """Return YAML documents in the order of their keys, after lines of comments."""
    yaml = YAML(typ="safe", pure=True)
    yaml.Representer = _Representer
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # it is typed as None
    yaml.width = _WIDTH
    text = io.StringIO()
    yaml.dump_all(documents, text)
    return "".join(f"# {line}\n" for line in head) + text.getvalue()


class _Representer(SafeRepresenter):
    """Quotes text that is not plainly text."""

    def represent_str(self, data: str) -> ScalarNode:
        """Return a node for text: several lines as a block, a plain word as it is, all else in quotes."""
        is_plain = _PLAIN.fullmatch(data) is not None and data.lower() not in _WORDS
        is_block = "\n" in data and all(_LINE.fullmatch(line) for line in data.split("\n"))
        style = "|" if is_block else None if is_plain else '"'
        node: ScalarNode = self.represent_scalar("tag:yaml.org,2002:str", data, style=style)
        return node

    def ignore_aliases(self, _data: object) -> bool:
        """Write everything out: not every engine reads aliases."""
        return True


_Representer.add_representer(str, _Representer.represent_str)
