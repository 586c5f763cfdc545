"""`cluster apply` on an engine that is an object: what is sent, what is waited for, what is an error."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.operate.scaling import tune
from cluster.spec.roles import Tuning
from router.serve.settings_file import RouterSettings
from superserve.errors import ProcessError

USUAL = RouterSettings()


class FakeEngine:
    """A router that takes settings at the second look, or says why not."""

    def __init__(self, settings: RouterSettings = USUAL, error: str = "") -> None:
        self.now, self.error, self.sent = settings, error, []  # type: ignore[var-annotated]
        self.answers = True
        self._next: RouterSettings | None = None

    def tune(self, content: bytes) -> None:
        """Take what is sent."""
        self.sent.append(json.loads(content))
        self._next = RouterSettings(**self.sent[-1])

    def router_status(self) -> Any:
        """Return STATUS; what was sent is in force from the next one on."""
        info = SimpleNamespace(
            **{name: getattr(self.now, name) for name in RouterSettings.__slots__},
            settings_error=self.error if self.sent else "",
        )
        if self._next is not None and not self.error:
            self.now = self._next
        return SimpleNamespace(router=info) if self.answers else None


def _tuned(engine: FakeEngine, tuning: Tuning, timeout_s: float = 5.0) -> list[str]:
    return tune(engine, tuning, timeout_s=timeout_s, pause=lambda _: None)  # type: ignore[arg-type]


def test_what_changed_is_returned_once_it_is_in_force() -> None:
    """What the file leaves out is the router's own default again."""
    engine = FakeEngine(RouterSettings("maxacc", 0.5))
    assert _tuned(engine, Tuning("slackfit", max_queries=7)) == [
        "policy: maxacc -> slackfit", "margin_ms: 0.5 -> as measured", "max_queries: 200000 -> 7",
    ]  # fmt: skip
    assert engine.sent == [{"policy": "slackfit", "max_queries": 7}]
    assert _tuned(engine, Tuning("slackfit", max_queries=7)) == []


def test_a_router_that_refuses_or_does_not_answer_is_an_error() -> None:
    """With its own words; one that is silent is sent nothing."""
    with pytest.raises(ProcessError, match="runs on as before: no such subnet"):
        _tuned(FakeEngine(error="no such subnet"), Tuning("fixed:x"))
    silent = FakeEngine()
    silent.answers = False
    with pytest.raises(ProcessError, match="does not answer, so nothing was changed"):
        _tuned(silent, Tuning("maxacc"))
    assert silent.sent == []
    deaf = FakeEngine()
    deaf.tune = lambda content: None  # type: ignore[method-assign]  # noqa: ARG005
    with pytest.raises(ProcessError, match="did not take them within 0 s: policy"):
        _tuned(deaf, Tuning("maxacc"), 0)
    assert replace(USUAL) == deaf.now
