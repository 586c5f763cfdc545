"""The page of one run or of several: panels, tables, and in plain words whether the run counts.

One HTML file without scripts, network or further files. It is made only from run results, so the
same results give the same bytes. All text from outside is escaped here.
"""

from __future__ import annotations

from html import escape
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from loadgen.results.plots import MAX_RUNS, Shown, draw
from loadgen.results.result import LATENCY_QUANTILES, OUTCOMES, load_run
from loadgen.results.style import check_installed, figure, percent
from loadgen.results.timeline import timeline_from
from superserve.errors import ConfigError
from superserve.files import write_whole

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from loadgen.results.canvas import Panel
    from loadgen.results.result import RunResult

MEANINGS = {
    "ok": "answered in time, by the load generator's own clock",
    "late": "answered, after the deadline",
    "expired": "the deadline passed in the queue",
    "infeasible": "no subnet could meet the slack any more; refused at once",
    "overloaded": "a bound on what may wait was reached",
    "failed": "the model raised on this query",
    "worker_lost": "its worker was lost, and no slack was left",
    "invalid": "not what the model takes",
    "cancelled": "cancelled, or its client was gone",
    "draining": "the router took no new work",
    "unanswered": "no answer came",
    "unsent": "the load generator never sent it",
}
FEW_RUNS = 3
"""At most this many are named in the headline."""

_NOTHING = "-"
_STYLE = (Path(__file__).parent / "report.css").read_text(encoding="utf-8")
_PAGE = Template((Path(__file__).parent / "report.html").read_text(encoding="utf-8"))


def write_report(path: Path, results: Sequence[RunResult], labels: Sequence[str] | None = None) -> None:
    """Write the page of these runs.

    Args:
        path: Where; its folder is there.
        results: As in their files, with their timelines.
        labels: Their names, all different; by default, their policies.

    Raises:
        ConfigError: matplotlib is missing, a timeline is malformed, there are more runs than
            `MAX_RUNS`, or the file cannot be written.
    """
    check_installed()
    text = page(results, labels)
    try:
        write_whole(path, text)
    except OSError as error:
        raise ConfigError(f"{path}: expected a path that can be written: {error.strerror}") from error


def load_runs(paths: Sequence[Path]) -> tuple[list[RunResult], list[str]]:
    """Read run results, and name each by its policy, or by its file if policies are the same."""
    results = [load_run(path) for path in paths]
    for names in ([result.policy for result in results], [path.stem for path in paths]):
        if len(set(names)) == len(names):
            return results, names
    return results, [f"run {i}" for i in range(1, len(results) + 1)]


def page(results: Sequence[RunResult], labels: Sequence[str] | None = None) -> str:
    """Return the page as HTML; see `write_report`."""
    if not 1 <= len(results) <= MAX_RUNS:
        raise ConfigError(f"report: expected 1 to {MAX_RUNS} runs, got {len(results)}")
    labels = list(labels or (result.policy for result in results))
    named = list(zip(labels, results, strict=True))
    shown = [
        Shown(label, result, timeline_from(result.timeline), place)
        for place, (label, result) in enumerate(named)
        if result.timeline is not None
    ]
    _check_sums(shown)
    parts = [
        _header(named),
        *_notices(named),
        _comparison(named) if len(named) > 1 else _figures(named),
        _panels(shown, named),
        _load(named),
        _outcomes(named),
        _shares(shown, named),
        *(_environment(label, result, only=len(named) == 1) for label, result in named),
    ]
    title = escape(f"SuperServe: {', '.join(labels)}")
    return _PAGE.substitute(title=title, style=_STYLE, body="\n".join(part for part in parts if part))


def _check_sums(shown: Iterable[Shown]) -> None:
    """Refuse a timeline that belongs to another run than its figures."""
    for run in shown:
        queries, timeline = run.result.queries, run.timeline
        for name in OUTCOMES:
            if int(timeline.of(name).sum()) != queries[name]:
                raise ConfigError(
                    f"{run.label}: timeline.queries.{name}: expected counts that sum to {queries[name]}, "
                    f"as in queries, got {int(timeline.of(name).sum())}"
                )
        lasts_ms, width_ms = run.result.duration_s * 1e3, timeline.bin_ms
        if not width_ms * (timeline.n_bins - 1) < lasts_ms <= width_ms * timeline.n_bins * (1 + 1e-9):
            raise ConfigError(
                f"{run.label}: timeline.bin_ms: expected {timeline.n_bins} bins to be the run's "
                f"{lasts_ms:g} ms, got {width_ms:g} ms each"
            )


# --- in words ---------------------------------------------------------------------------------


def headline(named: Sequence[tuple[str, RunResult]]) -> str:
    """Return the page's first sentence: how many queries were answered in time."""
    if len(named) == 1:
        result = named[0][1]
        ok, total = result.queries["ok"], result.queries["total"]
        if not ok and total == 1:
            return f"The only query was not answered within {result.slo_ms:g} ms."
        if not ok:
            return f"None of {total:,} queries was answered within {result.slo_ms:g} ms."
        if ok == total:
            them = f"All {total:,} queries were" if total > 1 else "The only query was"
            return f"{them} answered within {result.slo_ms:g} ms."
        return f"{percent(100 * ok / total)} of {total:,} queries were answered within {result.slo_ms:g} ms."
    if len(named) > FEW_RUNS:
        shares = sorted(result.slo_attainment or 0.0 for _, result in named)
        low, high = percent(100 * shares[0]), percent(100 * shares[-1])
        return f"{len(named)} runs: from {low} to {high} of the queries were answered in time."
    parts = [f"{label} answered {_share(result)} in time" for label, result in named]
    return f"{'; '.join(parts)}."


def _queries(n: int) -> str:
    return "1 query" if n == 1 else f"{n:,} queries"


def _share(result: RunResult) -> str:
    return "nothing" if not result.queries["ok"] else percent(100 * (result.slo_attainment or 0.0))


def subline(named: Sequence[tuple[str, RunResult]]) -> str:
    """Return the second sentence: what was offered, and what attainment cost in accuracy."""
    result = named[0][1]
    offered = (
        f"{_queries(result.queries['total'])} in {result.duration_s:g} s, {figure(result.offered_qps)} a "
        f"second on average, each due back within {result.slo_ms:g} ms."
    )
    if len(named) == 1:
        mean = result.mean_accuracy
        said = "" if mean is None else f" Mean profiled accuracy of the answers in time: {mean:.2f} %."
        return f"Offered: {offered}{said}"
    first, *others = named
    gains = [_trade(first, other) for other in others] if len(named) <= FEW_RUNS else []
    return " ".join([f"Each was offered {offered}" if _is_alike(named) else "", *gains]).strip()


def _trade(ours: tuple[str, RunResult], theirs: tuple[str, RunResult]) -> str:
    """Return what one run gained over another in attainment, and what that cost, in words."""
    (label, one), (other_label, other) = ours, theirs
    if one.mean_accuracy is None or other.mean_accuracy is None:
        return ""
    points = one.mean_accuracy - other.mean_accuracy
    attained = 100 * ((one.slo_attainment or 0.0) - (other.slo_attainment or 0.0))
    return (
        f"Compared with {other_label}, {label} answered {abs(attained):.2f} points "
        f"{'more' if attained >= 0 else 'less'} in time, at {abs(points):.2f} points "
        f"{'more' if points >= 0 else 'less'} accuracy."
    )


def _is_alike(named: Sequence[tuple[str, RunResult]]) -> bool:
    loads = {
        (one.trace, one.slo_ms, one.duration_s, one.queries["total"], str(_due(one))) for _, one in named
    }
    return len(loads) == 1


def _due(result: RunResult) -> list[int]:
    """Return how many queries were due in each bin; nothing if the run kept no timeline."""
    return [] if result.timeline is None else timeline_from(result.timeline).due.tolist()


def verdict(result: RunResult) -> str:
    """Return whether a run counts, and why."""
    if not result.valid:
        return f"Invalid, it does not count: {'; '.join(result.invalid_because)}."
    lag, limit = result.send_lag_ms["p99_9"], result.slo_ms / 20
    if lag is None:
        return "Valid."
    measured = f"the p99.9 of send lag was {figure(lag)} ms, {{}} 5 % of the SLO ({figure(limit)} ms)"
    if not result.disturbed:
        return f"Valid: every query was sent, and {measured.format('within')}."
    noise = None if result.timeline is None else timeline_from(result.timeline).noise_p99_9_ms
    saw = "" if noise is None else f" ({figure(noise)} ms)"
    return (
        f"Disturbed: {measured.format('over')}, and the noise probe's lateness{saw} explains it. "
        "The run counts, but other work kept this machine busy: latencies may be too high."
    )


def _notices(named: Sequence[tuple[str, RunResult]]) -> list[str]:
    """Return the boxes at the top: what a reader must know before any figure."""
    boxes = []
    for label, result in named:
        name = f"{label}: " if len(named) > 1 else ""
        if not result.valid or result.disturbed:
            kind = "disturbed" if result.valid else "invalid"
            boxes.append((kind, name + verdict(result)))
        silent = result.queries["unanswered"]
        if silent:
            boxes.append(
                ("disturbed", f"{name}{silent:,} queries got no answer at all; they count as missed.")
            )
        boxes += [("invalid", name + text) for text in _broken(result)]
    if len(named) > 1 and not _is_alike(named):
        boxes.append(
            ("disturbed", "These runs were not offered the same load: see the table before comparing.")
        )
    if not boxes:
        said = verdict(named[0][1]) if len(named) == 1 else "Every run is valid: its load was really offered."
        boxes.append(("valid", said))
    for label, result in named:
        if result.partial:
            name = f"{label}: " if len(named) > 1 else ""
            ended = f"Partial: interrupted after {figure(result.duration_s)} s; all figures are up to there."
            boxes.append(("disturbed", name + ended))
    return [f'<p class="notice {kind}">{escape(text)}</p>' for kind, text in boxes]


def _broken(result: RunResult) -> list[str]:
    """Return what the run's own checks found wrong."""
    environment = result.environment or {}
    found = []
    if environment.get("duplicates"):
        found.append(f"{environment['duplicates']} answers came beyond a query's first: something is broken.")
    if environment.get("violations"):
        found.append(
            f"The GPUs' event logs show {environment['violations']} violations: something is broken."
        )
    return found


# --- parts of the page ------------------------------------------------------------------------


def _header(named: Sequence[tuple[str, RunResult]]) -> str:
    traces = list(dict.fromkeys(result.trace for _, result in named))
    dates = [str(result.environment.get("date", "")) for _, result in named if result.environment]
    facts = [
        ", ".join(traces),
        f"policy {', '.join(dict.fromkeys(one.policy for _, one in named))}",
        *dates[:1],
    ]
    return (
        f'<header><p class="kicker">{escape(" · ".join(fact for fact in facts if fact))}</p>'
        f"<h1>{escape(headline(named))}</h1><p>{escape(subline(named))}</p></header>"
    )


def _data(value: object, text: str) -> str:
    """Return a figure as HTML: the shown text, and the value from the result file."""
    return f'<data value="{escape(str(value))}">{escape(text)}</data>'


def _number(value: float | None, text: Callable[[float], str]) -> str:
    return _NOTHING if value is None else _data(value, text(value))


def _ms(value: float) -> str:
    return f"{figure(value)} ms"


_ROWS: tuple[tuple[str, Callable[[RunResult], str]], ...] = (
    ("SLO attainment", lambda one: _number(one.slo_attainment, lambda x: percent(100 * x))),
    ("Mean accuracy", lambda one: _number(one.mean_accuracy, lambda x: f"{x:.2f} %")),
    ("Goodput", lambda one: _number(one.goodput_qps, lambda x: f"{x:,.1f} q/s")),
    *(
        (f"Latency {name.replace('_', '.')}", lambda one, name=name: _number(one.latency_ms[name], _ms))
        for name in LATENCY_QUANTILES
    ),
    ("Batch size, mean", lambda one: _number(one.batch_size_mean, lambda x: f"{x:.2f}")),
)
_LOAD_ROWS: tuple[tuple[str, Callable[[RunResult], str]], ...] = (
    ("Offered", lambda one: _number(one.offered_qps, lambda x: f"{x:,.1f} q/s")),
    ("Sent", lambda one: _number(one.realised_qps, lambda x: f"{x:,.1f} q/s")),
    ("CV² of the gaps", lambda one: _number(one.realised_cv2, lambda x: f"{x:.2f}")),
    ("Queries", lambda one: _number(one.queries["total"], lambda x: f"{x:,.0f}")),
    ("Duration", lambda one: _number(one.duration_s, lambda x: f"{x:g} s")),
    ("SLO", lambda one: _number(one.slo_ms, lambda x: f"{x:g} ms")),
    ("Send lag p50", lambda one: _number(one.send_lag_ms["p50"], _ms)),
    ("Send lag p99.9", lambda one: _number(one.send_lag_ms["p99_9"], _ms)),
    ("Generator alone: lag p99.9", lambda one: _number(_alone_ms(one), _ms)),
    ("Does it count?", lambda one: escape(_word(one))),
)


def _alone_ms(result: RunResult) -> float | None:
    """Return the p99.9 of send lag in the run's calibration, if it had one."""
    lag_ms = (result.calibration or {}).get("lag_ms")
    found = lag_ms.get("p99_9") if isinstance(lag_ms, dict) else None
    return float(found) if isinstance(found, int | float) else None


def _word(result: RunResult) -> str:
    return "invalid" if not result.valid else "valid, disturbed" if result.disturbed else "valid"


def _figures(named: Sequence[tuple[str, RunResult]]) -> str:
    """Return the figures of a single run as a strip, and the load's below."""
    ((_, result),) = named
    cells = "".join(f"<div><dt>{name}</dt><dd>{cell(result)}</dd></div>" for name, cell in _ROWS)
    more = "".join(f"<div><dt>{name}</dt><dd>{cell(result)}</dd></div>" for name, cell in _LOAD_ROWS)
    return f'<dl class="figures">{cells}</dl><dl class="figures small">{more}</dl>'


def _comparison(named: Sequence[tuple[str, RunResult]]) -> str:
    """Return the headline figures of several runs, a row each, to be compared down the columns."""
    rows = [
        [head, *(cell(result) for _, cell in _ROWS)]
        for head, (_, result) in zip(_heads(named), named, strict=True)
    ]
    return _table("", ["", *(name for name, _ in _ROWS)], rows, kind="figures-of-runs")


def _load(named: Sequence[tuple[str, RunResult]]) -> str:
    rows = [[name, *(cell(result) for _, result in named)] for name, cell in _LOAD_ROWS]
    return _table("The load", ["", *_heads(named)], rows) if len(named) > 1 else ""


def _heads(named: Sequence[tuple[str, RunResult]]) -> list[str]:
    """Return column heads: each run's name and the colour of its lines."""
    if len(named) == 1:
        return ["Queries"]
    return [f'<i class="line run{i}"></i>{escape(label)}' for i, (label, _) in enumerate(named)]


def _table(
    title: str, heads: Sequence[str], rows: Sequence[Sequence[str]], *, n_text: int = 1, kind: str = ""
) -> str:
    """Return a table of cells that are already HTML; the first `n_text` columns are words."""

    def cells(tag: str, row: Sequence[str]) -> str:
        kinds = ["" if i < n_text else ' class="n"' for i in range(len(row))]
        return "".join(f"<{tag}{kind}>{cell}</{tag}>" for kind, cell in zip(kinds, row, strict=True))

    body = "\n".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return (
        f'<section>{f"<h2>{escape(title)}</h2>" if title else ""}<div class="wide"><table class="{kind}">'
        f"<thead><tr>{cells('th', heads)}</tr></thead><tbody>\n{body}\n</tbody></table></div></section>"
    )


def _panels(shown: Sequence[Shown], named: Sequence[tuple[str, RunResult]]) -> str:
    without = [label for label, result in named if result.timeline is None]
    told = [f"{label} was saved without a timeline, so it is in the tables only." for label in without]
    figures = "\n".join(_figure(panel, named) for panel in draw(shown)) if shown else ""
    width = f" A step is {shown[0].timeline.bin_ms / 1e3:g} s wide." if shown else ""
    note = f"A query counts at the instant it was due, whenever its answer came.{width}" if shown else ""
    text = escape(" ".join([note, *told]).strip())
    return (
        f'<section><h2>Over time</h2><p class="note">{text}</p><div class="panels">{figures}</div></section>'
    )


def _figure(panel: Panel, named: Sequence[tuple[str, RunResult]]) -> str:
    body = panel.svg or f'<p class="empty">{escape(panel.empty)}</p>'
    if panel.key == "lag":
        verdicts = [(f"{label}: " if len(named) > 1 else "") + verdict(result) for label, result in named]
        body += "".join(f'<p class="note">{escape(text)}</p>' for text in verdicts)
    return (
        f'<figure id="{panel.key}"><figcaption><h3>{escape(panel.title)}</h3><p>{escape(panel.note)}</p>'
        f"</figcaption>{body}</figure>"
    )


def _outcomes(named: Sequence[tuple[str, RunResult]]) -> str:
    """Return how queries ended; ways that never occurred are named below the table."""
    happened = [name for name in OUTCOMES if any(result.queries[name] for _, result in named)]
    rows = []
    for name in happened:
        counts = [_count(result.queries[name], result.queries["total"]) for _, result in named]
        rows.append([escape(name.replace("_", " ")), escape(_meaning(name, named)), *counts])
    totals = [
        _data(one.queries["total"], f"{one.queries['total']:,}") + " <small></small>" for _, one in named
    ]
    rows.append(["total", "", *totals])
    return _table("How the queries ended", ["", "", *_heads(named)], rows, n_text=2)


def _meaning(name: str, named: Sequence[tuple[str, RunResult]]) -> str:
    said = [(result.reasons or {}).get(name.upper()) for _, result in named]
    examples = [text for text in said if text]
    return MEANINGS[name] + (f"; for example: {examples[0]}" if examples else "")


def _count(n: int, total: int) -> str:
    share = f" <small>{percent(100 * n / total)}</small>" if total else ""
    return f"{_data(n, f'{n:,}')}{share}"


def _shares(shown: Sequence[Shown], named: Sequence[tuple[str, RunResult]]) -> str:
    names = list(dict.fromkeys(name for _, result in named for name in result.subnet_share))
    if not names:
        return ""
    known = {one.name: one.accuracy for run in shown for one in run.timeline.subnets}
    rows = []
    for name in names:
        accuracy = f"{known[name]:.2f} %" if name in known else _NOTHING
        cells = [_number(result.subnet_share.get(name), lambda x: f"{100 * x:.2f} %") for _, result in named]
        rows.append([escape(name), accuracy, *cells])
    heads = ["Subnet", "Accuracy", *(["Share of the outputs"] if len(named) == 1 else _heads(named))]
    title = "Subnets, by share of the outputs that came"
    return _table(title, heads, rows)


def _environment(label: str, result: RunResult, *, only: bool) -> str:
    title = "Made by" if only else f"{label}: made by"
    if result.environment is None:
        return f"<section><h2>{escape(title)}</h2><p>The file does not state it.</p></section>"
    facts = dict(result.environment)
    command = facts.pop("command", None)
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{value}</dd>" for name, value in _flat(facts))
    shown = "" if command is None else f"<pre>{escape(str(command))}</pre>"
    return f'<section><h2>{escape(title)}</h2>{shown}<dl class="facts">{rows}</dl></section>'


def _flat(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """Return an environment's facts, nested ones on a line each, as names and HTML."""
    found = []
    for name, value in facts.items():
        if isinstance(value, dict):
            text = escape(", ".join(f"{key} {one}" for key, one in value.items()))
        elif isinstance(value, list):
            text = "<br>".join(escape(str(one)) for one in value)
        else:
            text = escape(str(value))
        found.append((name.replace("_", " "), text))
    return found
