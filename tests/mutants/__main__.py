"""`python -m tests.mutants`: run the tests against each mutant; exit 1 if one survives or is stale."""

from __future__ import annotations

import os
import sys
from collections import Counter

import click

from tests.mutants.mutant import Mutant, StaleError
from tests.mutants.run import Fate, Verdict, baseline, fates
from tests.mutants.table import MUTANTS
from tests.paths import ROOT


@click.command()
@click.option("--only", multiple=True, metavar="NAME", help="Only mutants with this in their name or place.")
@click.option("--list", "is_list", is_flag=True, help="List them, and which are stale; run nothing.")
@click.option("--jobs", type=click.IntRange(1), help="Mutants at a time.  [default: one a core]")
def main(only: tuple[str, ...], is_list: bool, jobs: int | None) -> None:
    """Break one line, run the unit tests of its folder, and print which test noticed; for each mutant."""
    mutants = [one for one in MUTANTS if not only or any(part in f"{one.name} {one.where}" for part in only)]
    if not mutants:
        raise click.ClickException(f"no mutant has {' or '.join(only)} in its name or place")
    if is_list:
        lines = [_listed(mutant) for mutant in mutants]
        click.echo("\n".join(lines))
        sys.exit(any(line.startswith(Verdict.STALE.value) for line in lines))
    output = baseline(sorted({test for mutant in mutants for test in mutant.tests}), ROOT)
    if output is not None:
        raise click.ClickException(f"the tests fail before anything is broken:\n{output}")
    counts: Counter[Verdict] = Counter()
    for fate in fates(mutants, ROOT, n_jobs=jobs or len(os.sched_getaffinity(0))):
        click.echo(_line(fate))
        counts[fate.verdict] += 1
    click.echo(f"{len(mutants)} mutants: " + ", ".join(f"{n} {v.value}" for v, n in counts.items()))
    sys.exit(counts[Verdict.KILLED] < len(mutants))


def _line(fate: Fate) -> str:
    mutant = fate.mutant
    return f"{fate.verdict.value:9} {mutant.name} ({mutant.where}): {fate.detail} ({fate.took_s:.1f} s)"


def _listed(mutant: Mutant) -> str:
    try:
        path, _ = mutant.applied(ROOT)
    except StaleError as error:
        return f"{Verdict.STALE.value:9} {mutant.name}: {error}"
    return f"{'':9} {mutant.name} ({path.relative_to(ROOT)})"


if __name__ == "__main__":
    main()
