"""`python -m cluster.host.watch CONFIG`: supervisord, as a parent that its roles know and die with.

A role asks the kernel to be killed when its parent ends, and must be sure that the parent had
not ended before it asked: it is told its parent's number beforehand
(`superserve.roles.processes.die_with_parent`). Supervisord tells its children nothing of the kind;
here it finds the variable in its own environment, which they inherit.
"""

from __future__ import annotations

import os
import sys

from supervisor import supervisord  # type: ignore[import-untyped]  # it ships no types

from superserve.roles.processes import PARENT_PID_VARIABLE


def main(config: str) -> None:
    """Run supervisord in this very process until it is shut down."""
    os.environ[PARENT_PID_VARIABLE] = str(os.getpid())
    supervisord.main(["--nodaemon", "--configuration", config])


if __name__ == "__main__":
    main(sys.argv[1])
