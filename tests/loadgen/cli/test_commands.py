"""Commands are imported when they are run, and are all there for help."""

from __future__ import annotations

import subprocess
import sys

import click
import pytest

from cluster.cli import cli as cluster
from loadgen.cli import cli as loadgen
from tests.paths import ROOT

_SIMULATOR = "loadgen.simulator.world"
_SHOW = "import sys; from {}.cli import cli; cli({!r}, standalone_mode=False); print({!r} in sys.modules)"


@pytest.mark.parametrize("group", [cluster, loadgen], ids=["cluster", "loadgen"])
def test_each_command_is_found_under_its_own_name(group: click.Group) -> None:
    """Help lists it, and the function under a name imports the command of this name."""
    context = click.Context(group)
    names = group.list_commands(context)

    assert len(names) == len(set(names)) > 10
    for name in names:
        command = group.get_command(context, name)
        assert command is not None
        assert command.name == name
        assert command.get_short_help_str()
    assert group.get_command(context, "no-such-command") is None


@pytest.mark.parametrize(
    ("module", "words", "has_simulator"),
    [
        ("cluster", ["status", "--help"], False),
        ("loadgen", ["trace", "--help"], False),
        ("loadgen", ["simulate", "--help"], True),
    ],
)
def test_a_command_imports_what_it_needs(module: str, words: list[str], has_simulator: bool) -> None:
    """`cluster status` is there without the simulator."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", _SHOW.format(module, words, _SIMULATOR)],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip

    assert done.stdout.splitlines()[-1] == str(has_simulator)
