"""Runs the demo for `python -m loadgen.demo`."""

import signal
import sys

from loadgen.demo.demo import cli

if __name__ == "__main__":
    # As Ctrl-C does: the cluster is not a child of this process, and would outlive it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    cli(prog_name="python -m loadgen.demo")
