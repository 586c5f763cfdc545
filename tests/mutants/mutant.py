"""What a mutant is: a snippet of one file, what stands there instead, and the tests that must notice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class Mutant:
    """One fault.

    Attributes:
        name: What the broken code does, in words; unique.
        file: The file that it breaks, from the root of the tree.
        old: What stands there now: whole lines or a part of one, found exactly once in the file.
        new: What stands there instead.
        tests: Files or folders of tests, at least one of which must fail. They run in this order.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def applied(self, root: Path) -> str:
        """Return the text of the broken file.

        Raises:
            StaleError: The snippet is not there exactly once, or the result is not Python.
        """
        path = root / self.file
        if not path.is_file():
            raise StaleError(f"{self.file}: no such file")
        text = path.read_text(encoding="utf-8")
        n_found = text.count(self.old)
        if n_found != 1:
            raise StaleError(f"{self.file}: expected once, found {n_found} times: {self.old!r}")
        broken = text.replace(self.old, self.new)
        if broken == text:
            raise StaleError(f"{self.file}: it changes nothing")
        try:
            compile(broken, self.file, "exec")
        except SyntaxError as error:
            raise StaleError(f"{self.file}: not Python any more: {error}") from error
        return broken


class StaleError(Exception):
    """The code has changed under a mutant: it says nothing until its snippet is brought up to date."""
