"""The judge of commands in hostile environments notices what it is there for."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.environments.commands import JSON, step
from tests.environments.hostile import Hostile
from tests.environments.judge import Seen, complaints

STEP = step("loadgen simulate", "digest", files={"r.json": JSON})
HOSTILE = Hostile("a full disk", excuse="No space left")
WORKED = Seen(0, "digest", "", files={"out/r.json": 9}, contents={"r.json": "{}"})
LINE = "Error: /disk: No space left on device\n"
REFUSED = Seen(1, "", LINE)
USAGE = "Usage: loadgen simulate [OPTIONS]\nTry 'loadgen simulate --help' for help.\n\n"
TRACEBACK = (
    'Traceback (most recent call last):\n  File "superserve/roles/command.py"\nOSError: No space left\n'
)


def judged(seen: Seen, hostile: Hostile = HOSTILE) -> str:
    """Return the complaints in one text."""
    return "; ".join(complaints(STEP, seen, hostile))


@pytest.mark.parametrize(
    "seen", [WORKED, REFUSED, replace(REFUSED, stderr=USAGE + LINE), replace(REFUSED, stderr=None)]
)
def test_what_works_or_refuses_in_one_line_is_right(seen: Seen) -> None:
    """With a command's usage before the line, too, or with nobody to read it."""
    assert judged(seen) == ""


@pytest.mark.parametrize(
    ("seen", "complaint"),
    [
        (replace(REFUSED, code=None), "did not end in time"),
        (replace(REFUSED, stderr=TRACEBACK), "stderr has 'Traceback"),
        (replace(WORKED, stderr="Exception ignored in: <x>\n"), "stderr has 'Exception ignored'"),
        (replace(REFUSED, code=-6, stderr="Too many open files (src/epoll.cpp:65)\n"), "ended by signal 6"),
        (replace(REFUSED, code=-11, stderr=""), "ended by signal 11"),
        (replace(REFUSED, stderr=""), "failed without a word"),
        (replace(REFUSED, stderr="No space left on device\n"), "0 lines begin with 'Error: '"),
        (replace(REFUSED, stderr=LINE + "and more\n"), "more than one line: 'and more'"),
        (replace(REFUSED, stderr="dear me\n" + LINE), "more than its error on stderr"),
        (replace(REFUSED, stderr="Error: something is wrong\n"), "does not speak of 'No space left'"),
        (replace(REFUSED, code=0), "exit code 0, and no 'digest' in its output"),
        (replace(REFUSED, contents={"r.json": "{"}), "wrote r.json, and failed"),
        (replace(WORKED, stdout="dig"), "no 'digest' in its output"),
        (replace(WORKED, contents={}), "exit code 0, and no r.json"),
        (replace(WORKED, contents={"r.json": "{1, 2"}), "r.json is not whole"),
        (replace(WORKED, left=("python -m router",)), "left a process: python -m router"),
        (replace(REFUSED, files={"out/r.json": 0}), "left an empty out/r.json"),
        (replace(WORKED, files={"out/.r.json.1f.part": 7}), "left out/.r.json.1f.part"),
        (replace(REFUSED, files={"tmp/superserve-run-x": None}), "left an empty folder tmp/superserve-run-x"),
        (replace(REFUSED, files={"home/.local/state/default/state.json.tmp": 3}), "left home/.local/state"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(seen: Seen, complaint: str) -> None:
    """Each kind of fault that a command may have."""
    assert complaint in judged(seen)


def test_what_was_started_stays_if_the_signal_came_when_all_was_done() -> None:
    """But not if it came before the command had said so."""
    up = step("cluster up", "is up", starts=True)
    seen = Seen(-15, "cluster 'default' is up", "", sent=(15,), left=("python -m router",))
    hostile = Hostile("a signal", excuse="")

    assert complaints(up, seen, hostile) == []
    assert complaints(up, replace(seen, stdout=""), hostile) == ["left a process: python -m router"]


def test_an_environment_that_excuses_nothing_has_to_be_worked_in() -> None:
    """Refusing in one clear line is not enough where nothing stands in the way."""
    assert "where nothing stood in its way" in judged(REFUSED, Hostile("no colours"))


def test_a_signal_excuses_silence_and_no_traceback() -> None:
    """Its sender knows why the command ended; of a traceback only Python's own start is excused."""
    by_signal = replace(REFUSED, code=-15, stderr="", sent=(15,))
    assert judged(by_signal) == ""
    assert "ended by signal 11" in judged(replace(by_signal, code=-11))
    assert "Traceback" in judged(replace(by_signal, code=1, stderr=TRACEBACK))
    early = 'Traceback (most recent call last):\n  File "site.py"\nKeyboardInterrupt\n'
    assert judged(replace(by_signal, code=-2, stderr=early, sent=(2,))) == ""
