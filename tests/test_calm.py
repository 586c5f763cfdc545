"""A judgement counts on a calm machine; on a busy one it is repeated, and given up after some tries."""

from __future__ import annotations

import pytest

from tests import calm


class Judged:
    """A test that fails so many times."""

    def __init__(self, n_failures: int) -> None:
        self.n_failures = n_failures
        self.n_calls = 0

    def __call__(self) -> None:
        """Fail or pass."""
        self.n_calls += 1
        assert self.n_calls > self.n_failures, "too slow"


def run(test: Judged, monkeypatch: pytest.MonkeyPatch, *, is_calm: bool) -> None:
    """Run a test that is judged live on a machine that is calm, or never is."""
    monkeypatch.setattr(calm, "is_calm", lambda: is_calm)

    def judged() -> None:
        test()

    calm.judged_live(judged)()


def test_a_failure_on_a_calm_machine_counts_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not repeated until it passes."""
    test = Judged(1)
    with pytest.raises(AssertionError, match="too slow"):
        run(test, monkeypatch, is_calm=True)
    assert test.n_calls == 1


def test_a_failure_on_a_busy_machine_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until it passes, and no longer."""
    test = Judged(calm.TRIES - 1)
    run(test, monkeypatch, is_calm=False)
    assert test.n_calls == calm.TRIES


def test_what_fails_each_time_on_a_busy_machine_is_skipped_with_its_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It says how often it ran and what it found."""
    test = Judged(calm.TRIES)
    with pytest.raises(pytest.skip.Exception, match="disturbed each of 3 runs: too slow"):
        run(test, monkeypatch, is_calm=False)
    assert test.n_calls == calm.TRIES
