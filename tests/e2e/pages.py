"""Compare what a page of docs/ shows for a command with what it printed, masked."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent

# What differs from run to run and from machine to machine, in this order.
_MASKS = (
    (re.compile(r"\S*/\.hosts/"), "STATE/.hosts/"),
    (re.compile(r"\S*/hosts\.yaml"), "hosts.yaml"),
    (re.compile(r"(?<=\()\S*/(?=[\w-]+\.log\))"), "STATE/"),
    (re.compile(r"\S*/(cluster|loadgen) "), r"\1 "),
    (re.compile(r"pid \d+ \([^)]*\)|pid \d+"), "pid N"),
    (re.compile(r"(?<=\s)\d{2,7}(?=\s{2,})"), "N"),  # a cell of its own: a process
    (re.compile(r"\b3\.\d+\.\d+\b"), "3.N.N"),
    (re.compile(r"[\d,]+ GB"), "N GB"),
    (re.compile(r"(?<=\s)(\d{1,3}(,\d{3})+|no limit)(?=\s)"), "N"),  # limits of open files
    (re.compile(r"\b(STARTING|RUNNING)\b"), "RUNNING"),  # which it is after 10 s
    (re.compile(r"(?<=\s)\d+ s(?=\s{2,})"), "N s"),
    (re.compile(r"─+"), "─"),
    (re.compile(r"\b\d+\.\d s\b"), "N s"),
    (re.compile(r"(?<=127\.0\.0\.1:)\d+"), "N"),
    (re.compile(r"\b\d+\.\d+\.\d+\+[0-9a-f]{8}\b"), "VERSION"),
    (re.compile(r"\d+\.\d MB\b"), "N MB"),
    (re.compile(r"(?<=reached: )\S+$", re.MULTILINE), "HOST"),
    (re.compile(r"[ \t]+"), " "),
)


def masked(text: str) -> list[str]:
    """Return the lines of an output without what differs between two runs of the same command."""
    for pattern, instead in _MASKS:
        text = pattern.sub(instead, text)
    return [line.strip() for line in text.strip().splitlines() if line.strip()]


def shown(page: str, name: str) -> str:
    """Return the block of a page that stands below the line `<!-- shows: NAME -->`."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    mark = f"<!-- shows: {name} -->"
    assert mark in text, f"docs/{page}: expected a block below {mark}"
    block: list[str] = []
    for line in text.partition(mark)[2].splitlines()[1:]:
        if line.strip() and not line.startswith("    "):
            break
        block.append(line[4:])
    return "\n".join(block)


def check(page: str, name: str, output: str) -> None:
    """Assert that a page shows what a command printed, as far as that is the same each time."""
    assert masked(output) == masked(shown(page, name)), f"docs/{page}, {name}: it printed\n{output}"
