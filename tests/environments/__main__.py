"""`python -m tests.environments`: 1,000 commands in hostile environments, by a seed."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections import Counter

import click

from tests.environments.draw import pairs, sample
from tests.environments.runs import inputs, run_all


def main() -> int:
    """Run the pairs; print each that fails, with the command that repeats it, and a summary."""
    parser = argparse.ArgumentParser(prog="python -m tests.environments", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=1_000)
    parser.add_argument(
        "--only", type=int, metavar="K", help="run the pair of this number alone, and show it"
    )
    parser.add_argument("--first", type=int, default=0, metavar="K", help="go on from this number")
    parser.add_argument("--match", default="", help="run those alone whose names hold this")
    parser.add_argument("--sample", action="store_true", help="run those that `make test` runs")
    parser.add_argument("--at-once", type=int, default=len(os.sched_getaffinity(0)))
    asked = parser.parse_args()
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # ignored in a shell's background, by commands too
    drawn = sample() if asked.sample else pairs(asked.seed, max(asked.count, (asked.only or 0) + 1))
    chosen = {
        number: pair
        for number, pair in enumerate(drawn)
        if (number >= asked.first if asked.only is None else number == asked.only)
        and asked.match in str(pair)
    }
    began_s = time.monotonic()
    counts: Counter[str] = Counter()
    with inputs() as folder:
        verdicts = run_all(chosen.values(), folder, asked.at_once)
        for number, verdict in zip(chosen, verdicts, strict=True):
            if sys.stderr.isatty() or counts.total() % 100 == 99:
                click.echo(f"{counts.total() + 1} of {len(chosen)}", err=True)
            counts["skipped" if verdict.skipped else "failed" if verdict.complaints else "passed"] += 1
            if verdict.skipped:
                counts[f"skipped: {verdict.skipped}"] += 1
            if verdict.complaints or asked.only is not None:
                how = "--sample" if asked.sample else f"--seed {asked.seed}"
                click.echo(f"{verdict.pair}\n  python -m tests.environments {how} --only {number}")
                for complaint in verdict.complaints:
                    click.echo(f"  {complaint}")
                for step in verdict.seen:
                    for name, value in step.items():
                        click.echo("    " + f"{name}: {value}".replace("\n", "\n      "))
                sys.stdout.flush()
    click.echo(f"{len(chosen)} pairs in {time.monotonic() - began_s:.0f} s: {dict(counts)}")
    return 1 if counts["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
