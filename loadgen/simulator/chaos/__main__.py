"""`python -m loadgen.simulator.chaos`."""

from loadgen.simulator.chaos import main

if __name__ == "__main__":
    main(prog_name="python -m loadgen.simulator.chaos")
