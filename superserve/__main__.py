"""`superserve --version`: which release and which code runs here, and whether its core is compiled."""

from __future__ import annotations

import argparse
import platform
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING

from superserve.build import build
from superserve.errors import SuperServeError
from superserve.roles.command import begin, run
from superserve.roles.version import version

if TYPE_CHECKING:
    from typing import NoReturn

_TOLD = """\
commands:
  cluster             start, watch and stop a cluster, here or on other hosts
  loadgen             offer a trace to a router, or simulate that
  profiles            measure a supernet on a device
  superserve-router   one router
  superserve-worker   one worker process
  superserve explain  why a query was late, and what would have helped
"""
_EXPLAIN = "loadgen.cli.questions.explain"


def main() -> None:
    """Print the version, or what commands there are."""
    if sys.argv[1:2] == ["explain"]:
        _explain()
    begin()
    parser = argparse.ArgumentParser(
        "superserve", description=__doc__, epilog=_TOLD, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    if not parser.parse_args().version:
        parser.print_help()
        return
    try:
        text = f"superserve {version()}, {build()} core, Python {platform.python_version()}"
    except (SuperServeError, OSError) as error:
        raise SystemExit(f"Error: {error}") from error
    print(text)  # noqa: T201  a command's only output


def _explain() -> NoReturn:
    """Run the load generator's command: its studies read what the router has recorded."""
    if find_spec("loadgen") is None:
        raise SystemExit(
            "Error: superserve explain: the client alone has no such command: pip install superserve[server]"
        )
    del sys.argv[1]
    run(_EXPLAIN, "superserve explain")


if __name__ == "__main__":
    main()
