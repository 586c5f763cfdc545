"""`loadgen gate`: whether a policy keeps its promise, in 200 cells."""

from __future__ import annotations

import datetime as dt
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import orjson

from loadgen import options
from loadgen.live.environment import environment_of
from loadgen.results.tables import check_outputs, echo, write
from loadgen.study.gate.cells import chosen_cells, gate_cells, sample
from loadgen.study.gate.draft import CNN
from loadgen.study.gate.judgements import (
    append_judgement,
    commit_of,
    fresh_seeds,
    judgement_of,
    read_judgements,
    tuning_seeds,
)
from loadgen.study.gate.run import BASELINE, PolicyGate
from loadgen.study.gate.show import markdown_lines, summary_lines, table_lines, to_dict
from loadgen.study.gate.store import FigureStore
from profiles.table import load_profile
from router.policies.registry import make_policy
from superserve.errors import ConfigError
from superserve.roles.command import plain_errors

if TYPE_CHECKING:
    from collections.abc import Callable

    from loadgen.study.gate.draft import GateCell
    from loadgen.study.gate.run import Judged

_SAMPLE_SEEDS = "1:2"


@dataclass(frozen=True, slots=True)
class _Asked:
    """What the options ask for."""

    policy: str
    baseline: str
    traces: Path | None
    texts: tuple[str, ...]
    families: tuple[str, ...]
    is_sample: bool
    seeds: str | None
    judgement: Path | None
    cache: Path
    any_version: bool

    def gate(self) -> PolicyGate:
        """Return the gate, its seeds checked.

        Raises:
            ConfigError: The seeds are not for what is asked, a policy is unknown, or options contradict.
        """
        for policy in (self.policy, self.baseline):
            make_policy(policy, load_profile(CNN))
        if self.judgement is None:
            seeds = tuning_seeds(self.seeds or (_SAMPLE_SEEDS if self.is_sample else None))
        else:
            if self.is_sample or self.texts or self.families or self.any_version:
                raise ConfigError(
                    "--judgement: a judgement is of all cells and of today's code: expected no --sample, "
                    "--cell, --family or --any-version"
                )
            seeds = fresh_seeds(self.seeds, read_judgements(self.judgement))
        return PolicyGate(
            self.policy, self.baseline, seeds, FigureStore(self.cache, any_version=self.any_version)
        )

    def cells(self) -> list[GateCell]:
        """Return the cells to play: those for tuning, unless this is a judgement."""
        cells = gate_cells(self.traces)
        if self.judgement is not None:
            return cells
        cells = chosen_cells(
            [cell for cell in cells if not cell.is_held_out], texts=self.texts, families=self.families
        )
        return sample(cells) if self.is_sample else cells


@click.command("gate")
@click.option("--policy", default=options.DEFAULT_POLICY, show_default=True, help="The candidate.")
@click.option("--baseline", default=BASELINE, show_default=True, help="What it is to replace.")
@click.option(
    "--traces", type=click.Path(exists=True, file_okay=False, path_type=Path), metavar="DIR",
    help="Azure's files, under their published names.  [default: skip their cells]",
)  # fmt: skip
@click.option("--cell", "texts", multiple=True, metavar="TEXT", help="Only cells whose name holds this.")
@click.option("--family", "families", multiple=True, metavar="NAME", help="Only cells of this family.")
@click.option("--sample", "is_sample", is_flag=True, help="Some cells of each family and two seeds.")
@click.option(
    "--seeds", metavar="FIRST:N",
    help="1 to 20 for tuning; for a judgement fresh ones.  [default: 1:5; the next five]",
)  # fmt: skip
@click.option(
    "--judgement", type=options.FILE,
    help="Judge on all cells, also those held out, and on fresh seeds; append the verdict to this list.",
)  # fmt: skip
@click.option(
    "--cache", type=options.FOLDER, default=Path("out/gate"), show_default=True,
    help="Where the comparators' figures are kept.",
)  # fmt: skip
@click.option(
    "--any-version", is_flag=True,
    help="Take the comparators' figures also if the core has changed since.",
)  # fmt: skip
@options.processes
@click.option("--json", "json_path", type=options.FILE, help="Write the figures.")
@click.option("--markdown", "page_path", type=options.FILE, help="Write the table, for a page.")
@plain_errors()
def gate_command(processes: int | None, json_path: Path | None, page_path: Path | None, **asked: Any) -> None:
    """Say whether a policy keeps its promise beside slackfit, mincost, the baseline and the bound.

    Without --judgement: the cells for tuning, on seeds for tuning. With it: all cells, on seeds that no
    judgement of the list has used. Exits 1 if a line of the promise fails. See docs/gate.md.
    """
    want = _Asked(**asked)
    check_outputs({"--json": json_path, "--markdown": page_path, "--judgement": want.judgement})
    gate, cells = want.gate(), want.cells()
    skipped = [cell for cell in cells if cell.skipped is not None]
    if len(skipped) == len(cells):
        raise ConfigError(f"--cell: every cell is skipped; {cells[0].name}: {cells[0].skipped}")
    judged = gate.run(cells, n_processes=processes or len(os.sched_getaffinity(0)), say=_progress())
    for line in (*table_lines(gate, judged, skipped), "", *summary_lines(gate, judged, len(skipped))):
        echo(line)
    if want.judgement is not None:
        _append(want.judgement, gate, judged, len(skipped))
    if json_path is not None:
        body = to_dict(gate, judged, skipped) | {"environment": environment_of()}
        write(json_path, orjson.dumps(body, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE).decode())
    if page_path is not None:
        write(page_path, "\n".join(markdown_lines(gate, judged)) + "\n")
    if any(one.fails for one in judged):
        sys.exit(1)


def _append(path: Path, gate: PolicyGate, judged: list[Judged], n_skipped: int) -> None:
    date = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
    made = judgement_of(
        judged, n_skipped=n_skipped, policy=gate.candidate, baseline=gate.baseline, date=date,
        commit=commit_of(Path(__file__).parent),
    )  # fmt: skip
    echo(f"  written          {path}, {append_judgement(path, made)}")


def _progress() -> Callable[[str], object]:
    began_s = time.monotonic()
    return lambda what: echo(f"  {time.monotonic() - began_s:6.1f} s  {what}", err=True)
