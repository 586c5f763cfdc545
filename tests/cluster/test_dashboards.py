"""The dashboard, the alert rules and docs/metrics.md name what is exported, and all of it is explained."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from ruamel.yaml import YAML

from gpu_worker.serve.metrics import METRICS as OF_WORKERS
from router.report.metrics import METRICS as OF_ROUTER
from tests.metrics import exported

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / "cluster" / "dashboards"
DASHBOARD = json.loads((FOLDER / "superserve.json").read_text())
METRICS = {metric.name: metric for metric in (*OF_ROUTER, *OF_WORKERS)}
LABELS = {name: set(metric.labels) for metric in METRICS.values() for name in exported(metric)}
EXPORTED = set(LABELS)
# What an expression may hold beside names: functions, keywords, and labels that Prometheus adds.
LANGUAGE = {
    "sum", "by", "rate", "increase", "histogram_quantile", "max", "min", "le", "job", "up",
}  # fmt: skip


def words(expression: str) -> set[str]:
    """Return every identifier of an expression, outside of strings and ranges."""
    bare = re.sub(r'"[^"]*"|\[[^\]]*\]', " ", expression)
    return set(re.findall(r"[A-Za-z_:][A-Za-z0-9_:]*", bare))


def unknown(expression: str) -> set[str]:
    """Return what an expression names that is neither exported, nor a label of it, nor the language."""
    named = words(expression)
    labels = set().union(*(LABELS[name] for name in named & EXPORTED))
    return named - EXPORTED - labels - LANGUAGE


def expressions() -> Iterator[tuple[str, str]]:
    """Yield every expression of the dashboard, with where it stands."""
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]


def rules() -> list[dict[str, Any]]:
    """Return the alert rules."""
    groups = YAML(typ="safe").load((FOLDER / "alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def test_every_expression_of_the_dashboard_names_what_is_exported() -> None:
    """A renamed metric would leave a panel empty without a word."""
    found = dict.fromkeys(expressions())

    assert len(found) > 40
    assert {f"{where}: {expr}": bad for where, expr in found if (bad := unknown(expr))} == {}
    assert all(words(expr) & EXPORTED for _, expr in found)


def test_every_alert_names_what_is_exported_and_says_what_is_wrong() -> None:
    """An alert on a name that is not there never fires."""
    assert len(rules()) >= 5
    assert {rule["alert"]: bad for rule in rules() if (bad := unknown(rule["expr"]))} == {}
    assert all(rule["annotations"]["summary"] and rule["labels"]["severity"] for rule in rules())


@pytest.mark.parametrize(
    "expression",
    ["superserve_router_queue_len", "rate(superserve_router_queries_answered[5m])",
     'sum by (subnet) (superserve_router_queue_length{job="x"})',
     'superserve_router_queue_length{status="ok"}'],
)  # fmt: skip
def test_the_check_sees_a_name_or_a_label_that_is_not_exported(expression: str) -> None:
    """A counter without its suffix, and a label of another metric, are mistakes that it finds."""
    assert unknown(expression)


def test_every_panel_has_a_source_that_the_user_picks_and_a_place_of_its_own() -> None:
    """It imports into any Grafana: no source is named, no two panels overlap, no number is used twice."""
    variables = {variable["name"]: variable["type"] for variable in DASHBOARD["templating"]["list"]}
    panels = DASHBOARD["panels"]
    cells = [
        (place["x"] + dx, place["y"] + dy)
        for place in (panel["gridPos"] for panel in panels)
        for dx in range(place["w"])
        for dy in range(place["h"])
    ]

    assert variables["datasource"] == "datasource"
    assert all(
        part["datasource"]["uid"] == "${datasource}"
        for panel in panels
        if panel["type"] != "row"
        for part in (panel, *panel["targets"])
    )
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in panels}) == len(panels)


def test_the_page_has_a_row_for_every_metric_and_for_no_other() -> None:
    """docs/metrics.md: name, labels and kind of each, as exported."""
    text = (ROOT / "docs" / "metrics.md").read_text()
    rows = dict(re.findall(r"^\| `(superserve_\w+)(?:\{[\w,]+\})?` \| (\w+) \|", text, re.MULTILINE))
    labels = dict(re.findall(r"^\| `(superserve_\w+)\{([\w,]+)\}` \|", text, re.MULTILINE))
    suffix = {"counter": "_total", "info": "_info"}
    expected = {name + suffix.get(metric.kind, ""): metric for name, metric in METRICS.items()}

    assert rows == {name: metric.kind for name, metric in expected.items()}
    assert labels == {name: ",".join(m.labels) for name, m in expected.items() if m.labels}
