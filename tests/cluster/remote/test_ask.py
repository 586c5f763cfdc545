"""An answer is found among whatever a login's shell prints; without one, the command's last words are."""

from __future__ import annotations

import pytest

from cluster.host.bare import marked
from cluster.remote.ask import answer
from cluster.remote.shell import Completed, RemoteError

SAID = {"roles": [], "words": "a\nb :superserve"}


@pytest.mark.parametrize("before", ["", "Welcome!\n", "no newline", '{"error": "noise"}', "<<superserve: "])
@pytest.mark.parametrize("after", ["", "bye", "\nbye\n", '{"error": "noise"}\n'])
@pytest.mark.parametrize("code", [0, 1])
def test_an_answer_is_found_among_noise(before: str, after: str, code: int) -> None:
    """On either side of it, and whatever the shell's own exit code is."""
    assert answer("a", Completed(code, f"{before}{marked(SAID)}{after}".encode(), "")) == SAID


def test_an_error_is_the_hosts() -> None:
    """It names the host."""
    with pytest.raises(RemoteError, match=r"^a: no such role$"):
        answer("a", Completed(0, marked({"error": "no such role"}).encode(), ""))


@pytest.mark.parametrize("text", ["", "Welcome!", "<<superserve:{}", "<<superserve:no json:superserve>>"])
def test_without_an_answer_the_last_words_are_quoted(text: str) -> None:
    """What the command said on stderr, else on stdout, with its exit code."""
    with pytest.raises(RemoteError, match=r"^a: exit code 3: bash: python9: command not found$"):
        answer("a", Completed(3, text.encode(), "bash: python9: command not found\n"))
