"""What was found, to be repeated: a trace file for each of the worst, and the command that plays it."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

from loadgen.study.adversary.evolve import REFERENCES, arrivals
from superserve.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from loadgen.study.adversary.evolve import Question, Scored


def write_worst(folder: Path, question: Question, worst: Sequence[Scored]) -> list[Path]:
    """Write the arrivals of each as a trace file; return their paths, in order.

    Raises:
        ConfigError: The folder cannot be made.
        TraceError: A file cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out: {folder}: cannot be made: {error.strerror}") from error
    paths = [folder / f"worst-{i + 1:02d}.trace" for i in range(len(worst))]
    for path, one in zip(paths, worst, strict=True):
        arrivals(question, one.genome)[0].save(path)
    return paths


def command(question: Question, one: Scored, path: Path) -> str:
    """Return the command that repeats it: same queries, same cluster, same figures."""
    cell = one.genome.cell(str(path), arrivals(question, one.genome)[1])
    words = [".venv/bin/loadgen", "compare", "--simulate", "--seeds", "1"]
    for policy in dict.fromkeys((question.policy, *REFERENCES[question.against])):
        words += ["--policy", policy]
    words += ["--trace", cell.trace, "--emulate", cell.cluster, "--slo-ms", cell.slo_ms]
    if cell.floor is not None:
        words += ["--floor", cell.floor]
    if cell.jitter_ms:
        words += ["--jitter-ms", f"{cell.jitter_ms:g}"]
    if cell.speed != 1:
        words += ["--speed", f"{cell.speed:g}"]
    if cell.warm_up_s:
        words += ["--warm-up", repr(cell.warm_up_s)]
    if question.against != "bound":
        words.append("--no-bound")
    return shlex.join(words)


def lines(question: Question, worst: Sequence[Scored], paths: Sequence[Path]) -> list[str]:
    """Return two lines for each: what it is and how it ended, and the command that repeats it."""
    found = []
    for i, (one, path) in enumerate(zip(worst, paths, strict=True), start=1):
        attained = ", ".join(f"{name} {share:.5f}" for name, share in one.attainments.items())
        found.append(f"{i:2}. behind by {one.gap:.5f}: {one.genome.family}: {attained}")
        found.append(f"    {command(question, one, path)}")
    return found


def to_dict(question: Question, worst: Sequence[Scored], paths: Sequence[Path]) -> dict[str, Any]:
    """Return the file that `--json` writes, without its environment."""
    return {
        "schema": 1,
        "policy": question.policy,
        "against": question.against,
        "again": question.is_again,
        "worst": [
            {
                "gap": one.gap,
                "family": one.genome.family,
                "attainments": one.attainments,
                "genome": repr(one.genome),
                "command": command(question, one, path),
            }
            for one, path in zip(worst, paths, strict=True)
        ],
    }
