"""What the commands of `loadgen` print and write."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import orjson

from loadgen.results.report import write_report
from loadgen.results.result import OUTCOMES
from loadgen.results.style import check_installed
from superserve.errors import ConfigError, SuperServeError
from superserve.files import check_text, write_whole

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from loadgen.results.result import RunResult


def table(result: RunResult) -> list[str]:
    """Return the lines of the final table."""
    queries, latency, lag = result.queries, result.latency_ms, result.send_lag_ms
    ends = ", ".join(f"{name} {queries[name]:,}" for name in OUTCOMES if queries[name])
    attainment = "-" if result.slo_attainment is None else f"{result.slo_attainment:.5f}"
    accuracy = "-" if result.mean_accuracy is None else f"{result.mean_accuracy:.3f} %"
    batch = "-" if result.batch_size_mean is None else f"{result.batch_size_mean:.2f}"
    shares = ", ".join(f"{name} {share:.1%}" for name, share in result.subnet_share.items() if share)
    partial = f"PARTIAL, interrupted after {result.duration_s:.1f} s; " if result.partial else ""
    verdict = "valid" if result.valid else "INVALID: " + "; ".join(result.invalid_because)
    return [
        f"  policy           {result.policy}",
        f"  rate             {result.realised_qps:,.0f} q/s sent of {result.offered_qps:,.0f} offered",
        f"  queries          {queries['total']:,}: {ends}",
        f"  SLO attainment   {attainment} at {result.slo_ms:g} ms",
        f"  mean accuracy    {accuracy}",
        f"  goodput          {result.goodput_qps:,.0f} q/s",
        f"  latency          {_quantiles(latency)}",
        f"  send lag         {_quantiles(lag)}",
        f"  batch size       {batch}",
        f"  subnets          {shares or '-'}",
        f"  run              {partial}{verdict}{' (disturbed by this machine)' if result.disturbed else ''}",
    ]


def _quantiles(values: object) -> str:
    assert isinstance(values, dict), "quantiles come by name"
    parts = [f"{name.replace('_', '.')} {value:.3f}" for name, value in values.items() if value is not None]
    return "  ".join(parts) + " ms" if parts else "-"


def json_line(body: dict[str, Any]) -> str:
    """Return a JSON object in one line."""
    return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY).decode()


def make_folder(path: Path, option: str) -> None:
    """Make a folder that an option names, unless it is there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{option}: {path}: expected a folder that can be made: {error.strerror}"
        ) from error


def check_writable(path: Path, option: str) -> None:
    """Refuse a file that cannot be written, before the run rather than after it."""
    make_folder(path.parent, option)
    was_there = os.path.lexists(path)
    try:
        path.open("ab").close()
        if not was_there:
            path.unlink()  # an empty file must not remain if the run does not finish
    except OSError as error:
        raise ConfigError(
            f"{option}: {path}: expected a path that can be written: {error.strerror}"
        ) from error


def check_outputs(paths: Mapping[str, Path | None]) -> None:
    """Refuse files, by the option that names them, that cannot be written; a page needs matplotlib."""
    if paths.get("--report") is not None:
        check_installed()
    for option, path in paths.items():
        if path is not None:
            check_writable(path, option)


def refuse_bytes() -> None:
    """Refuse a command line that no result file could contain, before anything runs."""
    try:
        check_text(sys.argv[1:])
    except ConfigError as error:
        raise click.ClickException(str(error)) from error


_unread: set[bool] = set()
"""Streams whose reader has gone: False is stdout, True stderr."""


def echo(text: str, *, err: bool = False) -> bool:
    """Print a line; return False once there is no reader any more, as with `loadgen ... | head`.

    The measurements of a run matter more than its last lines: it goes on, to write its files.
    """
    if err in _unread:
        return False
    try:
        click.echo(text, err=err)
    except BrokenPipeError:
        _unread.add(err)
        stream = sys.stderr if err else sys.stdout
        with Path(os.devnull).open("w") as nothing:
            os.dup2(nothing.fileno(), stream.fileno())  # for what Python flushes at exit
        return False
    return True


def write(path: Path, text: str, say: Callable[[str], object] = echo) -> None:
    """Write a file that was found writable, and print that it was."""
    try:
        write_whole(path, text)
    except OSError as error:
        raise click.ClickException(
            f"{path}: expected a path that can be written: {error.strerror}"
        ) from error
    say(f"  written          {path}")


def write_page(
    path: Path,
    results: Sequence[RunResult],
    labels: Sequence[str] | None = None,
    say: Callable[[str], object] = echo,
) -> None:
    """Write the page of runs, and print that it was written."""
    try:
        write_report(path, results, labels)
    except SuperServeError as error:
        raise click.ClickException(str(error)) from error
    say(f"  written          {path}")
