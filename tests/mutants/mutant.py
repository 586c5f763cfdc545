"""What a mutant is: a snippet of the code, what stands there instead, and the tests that must notice."""

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
        where: The folder or file that it breaks, from the root of the tree. A folder where it will do:
            then a line may move between the folder's files.
        old: What stands there now: whole lines or a part of one, found exactly once.
        new: What stands there instead.
        tests: Files or folders of tests, at least one of which must fail. They run in this order.
    """

    name: str
    where: str
    old: str
    new: str
    tests: tuple[str, ...]

    def applied(self, root: Path) -> tuple[Path, str]:
        """Return the file that it breaks, and the text of the broken file.

        Raises:
            StaleError: The snippet is not there exactly once, or the result is not Python.
        """
        place = root / self.where
        paths = sorted(place.rglob("*.py")) if place.is_dir() else [place] if place.is_file() else []
        texts = {path: path.read_text(encoding="utf-8") for path in paths}
        counts = {path: n for path, text in texts.items() if (n := text.count(self.old))}
        if sum(counts.values()) != 1:
            n_found = sum(counts.values())
            raise StaleError(f"{self.where}: expected once, found {n_found} times: {self.old!r}")
        [path] = counts
        broken = texts[path].replace(self.old, self.new)
        if broken == texts[path]:
            raise StaleError(f"{self.where}: it changes nothing")
        try:
            compile(broken, str(path), "exec")
        except SyntaxError as error:
            raise StaleError(f"{self.where}: not Python any more: {error}") from error
        return path, broken


class StaleError(Exception):
    """The code has changed under a mutant: it says nothing until its snippet is brought up to date."""
