"""What is wrong with what was seen of a command. Pure: what was seen comes in, complaints go out."""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection

    from tests.environments.commands import Step
    from tests.environments.hostile import Hostile

_LINE = 2_000  # a line that is longer is a dump
_BROKEN = re.compile(
    r"Traceback \(most recent call last\)|Exception ignored|Fatal Python error|Segmentation fault"
    r"|Assertion failed|core dumped|terminate called|double free"
    r"|(?m:^\w*(?:Error|Exception|Interrupt)(?::|$)(?<!^Error:))"
)
_GUARD = "superserve/roles/command.py"
"""What is in a traceback once a command has begun."""
_USAGE = re.compile(r"Usage: [^\n]*\n(?:  [^\n]*\n)*Try [^\n]*\n\n(?=Error: )")
_TEMPORARY = re.compile(r"\.part$|\.tmp$|^tmp[a-z0-9_]{6,}$|^\.|~$|superserve-")
_KEPT, _STATE = "home/.local", "/default/"  # the second in whatever folder SUPERSERVE_STATE names
_OF_LIBRARIES = "OpenBLAS "  # it prints, and ends the process or has it interrupted
_INTERRUPTED = re.compile(rf"(?<={_OF_LIBRARIES}).*KeyboardInterrupt$", re.DOTALL | re.MULTILINE)
_LOG_LINE = re.compile(r"^(?:\d{4}-\d\d-\d\d \d\d:\d\d:\d\d|\s+[\d.]+ s  \w)")
"""Of a server, and of a command that says how far it is."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What was seen of one step.

    Attributes:
        code: Its exit code, -N by signal N; None if it did not end in time.
        stdout: What it wrote; None where nothing could be read.
        stderr: The same.
        was_serving: Whether it was seen to serve, before it was told to end.
        left: Processes that it left, with their command lines.
        files: What lay there after it and not before, with sizes; None is a folder.
        contents: Of the files that it was to write: how they begin and end.
        sent: Signals that it was sent in its midst.
    """

    code: int | None
    stdout: str | None
    stderr: str | None
    was_serving: bool = False
    left: tuple[str, ...] = ()
    files: dict[str, int | None] = field(default_factory=dict)
    contents: dict[str, str] = field(default_factory=dict)
    sent: tuple[int, ...] = ()


def worked(step: Step, seen: Seen, hostile: Hostile) -> bool:
    """Tell whether a step ended as one that worked."""
    codes = step.codes if hostile.excuse is None else (*step.codes, step.verdict)
    return seen.code in codes and (not step.serves or seen.was_serving)


def complaints(step: Step, seen: Seen, hostile: Hostile, asked: Collection[str] = ()) -> list[str]:
    """Return what is wrong; nothing if the command worked, or refused in one clear line.

    Args:
        step: What was run.
        seen: What was seen of it.
        hostile: Where it was run.
        asked: Files that earlier steps were to write.
    """
    if seen.code is None:
        return ["did not end in time", *_broken(seen)]
    found = _broken(seen)
    if step.starts and -seen.code in seen.sent and re.search(step.stdout, seen.stdout or ""):
        return found  # the signal came when all was done, and is no reason to undo it
    is_unread = hostile.streams.get("stdout") in ("broken", "full")
    # A verdict that could not be printed is none; an expected error goes to stderr.
    is_verdict = bool(step.stderr) or not (is_unread and seen.code)
    if (
        worked(step, seen, hostile)
        and is_verdict
        and not (step.stderr == "" and seen.code != 0 and _is_refusal(seen))
    ):
        found += _half_done(step, seen, hostile)
    else:
        found += _unclear(step, seen, hostile)
        found += [
            f"wrote {name}, and failed"
            for name in step.files
            if name in seen.contents and not seen.sent and not is_unread
        ]
    found += [f"left a process: {words}" for words in seen.left]
    return found + _litter({*asked, *step.files}, seen)


def _broken(seen: Seen) -> list[str]:
    found = []
    for name, text in (("stdout", seen.stdout), ("stderr", seen.stderr)):
        if seen.sent and text and _GUARD not in text:
            continue  # Python itself was still being loaded, and takes Ctrl-C so
        if text and (broken := _BROKEN.search(_INTERRUPTED.sub("", text))):
            found.append(f"{name} has {broken.group()!r}")
    if (
        seen.code is not None
        and seen.code < 0
        and -seen.code not in seen.sent
        and -seen.code != signal.SIGPIPE
    ):
        found.append(f"ended by signal {-seen.code}")
    return found


def _is_refusal(seen: Seen) -> bool:
    """Tell whether an exit code that may mean a verdict came with an error line instead."""
    return seen.stderr is not None and ("rror: " in seen.stderr or "Aborted!" in seen.stderr)


def _half_done(step: Step, seen: Seen, hostile: Hostile) -> list[str]:
    found = []
    if seen.stdout is not None and step.stdout and not re.search(step.stdout, seen.stdout):
        found.append(f"exit code {seen.code}, and no {step.stdout!r} in its output")
    if step.stderr and seen.stderr is not None:
        if not re.search(step.stderr, seen.stderr) and not _excused(seen.stderr, hostile):
            found.append(f"no {step.stderr!r} in its error")
        found += _one_line(seen.stderr)
    for name, (begins, ends) in step.files.items():
        text = seen.contents.get(name)
        if text is None and (seen.sent or (step.serves and _excused(seen.stderr or "", hostile))):
            continue  # what serves goes on without its log, and has said so
        if text is None:
            found.append(f"exit code {seen.code}, and no {name}")
        elif not text.lower().startswith(begins) or not text.rstrip().endswith(ends):
            found.append(f"{name} is not whole: {text[:30]!r} ... {text[-30:]!r}")
    return found


def _unclear(step: Step, seen: Seen, hostile: Hostile) -> list[str]:
    if hostile.excuse is None:
        return [f"exit code {seen.code}, where nothing stood in its way"]
    if seen.code == 0:
        return [] if step.serves and seen.sent else ["exit code 0, without having worked"]
    if seen.stderr is None or (seen.sent and not seen.stderr.strip()):
        return []  # nobody could have read it; or a signal ended it, and its sender knows
    if seen.sent and _GUARD not in seen.stderr:
        return []
    if hostile.streams.get("stdout") == "broken" and not seen.stderr.strip():
        return []  # the reader that left knows
    found = _one_line(seen.stderr)
    if not _excused(f"{seen.stderr}\n{seen.stdout or ''}", hostile):  # a table may hold the reason
        found.append(f"the error does not speak of {hostile.excuse!r}")
    return found


def _excused(text: str, hostile: Hostile) -> bool:
    return hostile.excuse is not None and re.search(hostile.excuse, text) is not None


def _one_line(text: str) -> list[str]:
    """Return what is wrong with an error: one line is right, a command's usage before it and logs are too."""
    said = _USAGE.sub("", text)
    lines = [line for line in said.splitlines() if line.strip() and not _LOG_LINE.match(line)]
    if not lines:
        return ["failed without a word"]
    if of_library := [line for line in lines if line.startswith(_OF_LIBRARIES)]:
        # All that there is where it ends the process itself.
        lines = [line for line in lines if line not in of_library] or [f"Error: {of_library[0]}"]
    errors = [line for line in lines if line.startswith(("Error: ", "Aborted!"))]
    # What a role had said before it ended is quoted below the error that names it.
    is_quoting = errors[:1] == lines[:1] and lines[0].rstrip().endswith(":")
    if is_quoting:
        errors, lines = errors[:1], lines[:1]
    if len(errors) != 1:
        return [f"{len(errors)} lines begin with 'Error: '"]
    after = lines[1:]
    if lines[0] != errors[0]:
        return [f"more than its error on stderr: {lines[0][:200]!r}"]
    if after:
        return [f"more than one line: {after[0][:200]!r}"]
    return [f"a line of {len(errors[0])} characters"] if len(errors[0]) > _LINE else []


def _litter(asked: Collection[str], seen: Seen) -> list[str]:
    found = []
    tops = {file.split("/")[0] for file in asked}
    for name, size in seen.files.items():
        if name.startswith(_KEPT) or _STATE in name:
            if (size == 0 and not name.endswith(".log")) or name.endswith((".part", ".tmp", ".sock")):
                found.append(f"left {name}, of {size} bytes")
            continue
        if "/.cache/" in name or "/.config/" in name:
            continue  # fonts that matplotlib has found
        is_asked = not tops.isdisjoint(name.split("/"))
        if size == 0:
            found.append(f"left an empty {name}")
        elif size is not None and seen.stderr is not None and PurePosixPath(name).name in seen.stderr:
            continue  # a log that the error names
        elif size is not None and (not is_asked or _TEMPORARY.search(PurePosixPath(name).name)):
            found.append(f"left {name}")
        elif size is None and not is_asked and not any(other.startswith(f"{name}/") for other in seen.files):
            found.append(f"left an empty folder {name}")
    return found
