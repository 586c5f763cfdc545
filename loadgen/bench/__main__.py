"""Runs the benchmarks for `python -m loadgen.bench`."""

from loadgen.bench.table import cli

if __name__ == "__main__":
    cli(prog_name="python -m loadgen.bench")
