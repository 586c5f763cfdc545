"""docs/gateway.md names what is served: every path, method, status, option and metric."""

from __future__ import annotations

import re

import pytest

from gateway.cli import cli
from gateway.http.openapi import description
from gateway.rpc.messages import methods
from gateway.serve.metrics import METRICS
from gateway.v2 import verdicts
from gateway.v2.verdicts import RefusalKind
from tests.metrics import exported
from tests.paths import ROOT

PATHS = description("1", has_text=True)["paths"]
PAGE = (ROOT / "docs" / "gateway.md").read_text(encoding="utf-8")
KINDS = {name: one for name, one in vars(verdicts).items() if isinstance(one, RefusalKind)}


@pytest.mark.parametrize("path", [one for one in PATHS if "/versions/" not in one])
def test_every_path_has_a_row(path: str) -> None:
    """With its method."""
    (method,) = set(PATHS[path]) - {"parameters"}
    assert f"`{method.upper()} {path}`" in PAGE


@pytest.mark.parametrize("name", methods())
def test_every_method_has_a_row(name: str) -> None:
    """Of gRPC."""
    assert f"`{name}`" in PAGE


@pytest.mark.parametrize("name", KINDS)
def test_every_refusal_has_a_row(name: str) -> None:
    """Its HTTP status and its gRPC code stand in one row."""
    kind = KINDS[name]
    rows = [line for line in PAGE.splitlines() if re.search(rf"\| {kind.http}\b", line)]
    assert rows, f"no row for {kind.http}"
    # What only HTTP can see has no code there.
    assert any(kind.grpc in row or row.endswith("| |") for row in rows)


@pytest.mark.parametrize("metric", METRICS, ids=[one.name for one in METRICS])
def test_every_metric_has_a_row(metric: object) -> None:
    """As Prometheus names it."""
    names = exported(metric)  # type: ignore[arg-type]  # a Metric
    assert any(name in PAGE for name in names) or getattr(metric, "name", "") in PAGE


def test_options_on_the_page_exist() -> None:
    """Every option that the page names is one of a command's."""
    known = {option for one in cli.params for option in (*one.opts, *one.secondary_opts)}
    named = set(re.findall(r"`(--[a-z-]+)", PAGE))
    assert named <= {*known, "--cases"}
