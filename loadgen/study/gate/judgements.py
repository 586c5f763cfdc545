"""The list of judgements: each one that was made, also those that failed, and the page that shows them.

A policy is tuned on seeds 1 to 20. A judgement takes seeds that no tuning has seen: from 21 on, and none
that an earlier judgement of the list has used.
"""

from __future__ import annotations

import subprocess
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

import orjson

from superserve.errors import ConfigError
from superserve.files import write_whole

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from loadgen.study.gate.run import Judged

LAST_TUNING_SEED = 20
N_SEEDS = 5


@dataclass(frozen=True, slots=True)
class Judgement:
    """One judgement.

    Attributes:
        date: When, ISO 8601, UTC.
        commit: Of the code; with "+" behind it, files differed from the commit.
        policy: The candidate.
        baseline: What it was to replace.
        seeds: Those used.
        n_cells: Cells that were played.
        n_skipped: Cells that could not be.
        holds: Whether every line held in all of them.
        fails: By cell the lines that failed, and by how much.
    """

    date: str
    commit: str
    policy: str
    baseline: str
    seeds: tuple[int, ...]
    n_cells: int
    n_skipped: int
    holds: bool
    fails: dict[str, list[str]] = field(default_factory=dict)


def judgement_of(
    judged: Sequence[Judged], *, n_skipped: int, policy: str, baseline: str, date: str, commit: str
) -> Judgement:
    """Return what a run says."""
    fails = {one.of.name: [str(line) for line in one.fails] for one in judged if one.fails}
    return Judgement(
        date, commit, policy, baseline, judged[0].result.seeds, len(judged), n_skipped, not fails, fails
    )


def read_judgements(path: Path) -> list[Judgement]:
    """Read a list; a file that is not there is an empty one.

    Raises:
        ConfigError: It is no such list.
    """
    try:
        body = orjson.loads(path.read_bytes())
    except FileNotFoundError:
        return []
    except (OSError, orjson.JSONDecodeError) as error:
        raise ConfigError(f"{path}: expected a list of judgements: {error}") from error
    names = {one.name for one in fields(Judgement)}
    if not isinstance(body, list) or any(not isinstance(one, dict) or one.keys() != names for one in body):
        raise ConfigError(f"{path}: expected a list of judgements, each with {', '.join(sorted(names))}")
    return [_read(one, f"{path}: judgement {i + 1}") for i, one in enumerate(body)]


def _read(body: dict[str, Any], where: str) -> Judgement:
    seeds = body["seeds"]
    if not isinstance(seeds, list) or not seeds or any(type(seed) is not int for seed in seeds):
        raise ConfigError(f"{where}: seeds: expected a list of integers, got {seeds!r}")
    return Judgement(**(body | {"seeds": tuple(seeds)}))


def append_judgement(path: Path, judgement: Judgement) -> Path:
    """Add a judgement to a list, and write its page beside it; return the page's path.

    Raises:
        ConfigError: The list is none, or cannot be written.
    """
    known = [*read_judgements(path), judgement]
    page = path.with_suffix(".md")
    option = orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE
    try:
        write_whole(path, orjson.dumps([asdict(one) for one in known], option=option))
        write_whole(page, "\n".join(page_lines(known)) + "\n")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from error
    return page


def page_lines(judgements: Sequence[Judgement]) -> list[str]:
    """Return the page: a row for each judgement, then where each failed one failed."""
    found = [
        "# Judgements", "",
        "Every judgement of `loadgen gate --judgement`, as they were made. The command writes this page;",
        "[gate.md](gate.md) explains what is judged.", "",
        "| | date | commit | policy | in place of | seeds | cells | skipped | verdict |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for i, one in enumerate(judgements, start=1):
        verdict = "holds" if one.holds else f"fails in {len(one.fails)}"
        found.append(
            f"| {i} | {one.date} | {one.commit} | `{one.policy}` | `{one.baseline}` | "
            f"{min(one.seeds)} to {max(one.seeds)} | {one.n_cells} | {one.n_skipped} | {verdict} |"
        )
    for i, one in enumerate(judgements, start=1):
        if one.fails:
            found += ["", f"## {i}: `{one.policy}`, {one.date}", "", "| cell | fails by |", "|---|---|"]
            found += [f"| {cell} | {'; '.join(lines)} |" for cell, lines in one.fails.items()]
    return found


def tuning_seeds(text: str | None) -> tuple[int, ...]:
    """Return the seeds of a run that is no judgement.

    Raises:
        ConfigError: They are none, or are kept for judgements.
    """
    seeds = parse_seeds(text or f"1:{N_SEEDS}")
    if seeds[-1] > LAST_TUNING_SEED:
        raise ConfigError(
            f"--seeds: expected seeds from 1 to {LAST_TUNING_SEED} without --judgement, got {text}: "
            "later ones are for judgements, which are all listed"
        )
    return seeds


def fresh_seeds(text: str | None, judgements: Sequence[Judgement]) -> tuple[int, ...]:
    """Return the seeds of a judgement: those asked for, or the first that no earlier one has used.

    Raises:
        ConfigError: They are none, are for tuning, or an earlier judgement has used one.
    """
    used = {seed for one in judgements for seed in one.seeds}
    first = max(used, default=LAST_TUNING_SEED) + 1
    seeds = parse_seeds(text or f"{first}:{N_SEEDS}")
    if seeds[0] <= LAST_TUNING_SEED:
        raise ConfigError(
            f"--seeds: expected seeds from {LAST_TUNING_SEED + 1} on for a judgement, got {text}: "
            "earlier ones are for tuning"
        )
    if used & set(seeds):
        raise ConfigError(
            f"--seeds: an earlier judgement has used {min(used & set(seeds))}: "
            f"expected fresh ones, from {first} on"
        )
    return seeds


def parse_seeds(text: str) -> tuple[int, ...]:
    """Return the seeds of FIRST:N.

    Raises:
        ConfigError: It is not such a text.
    """
    first, colon, n = text.partition(":")
    if not (colon and first.isdecimal() and n.isdecimal() and int(first) >= 1 and 1 <= int(n) <= 1000):
        raise ConfigError(f"--seeds: expected FIRST:N, both from 1 on, such as 1:5, got {text!r}")
    return tuple(range(int(first), int(first) + int(n)))


def commit_of(folder: Path) -> str:
    """Return the commit of the tree that a folder lies in, with "+" if files differ; "" if it has none."""
    try:
        name = _git(folder, "rev-parse", "--short=12", "HEAD")
        return name + ("+" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def _git(folder: Path, *arguments: str) -> str:
    found = subprocess.run(
        ["git", "-C", str(folder), *arguments],  # noqa: S607  # whichever git the user has
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    return found.stdout.strip()
