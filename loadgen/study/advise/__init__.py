"""How many GPUs a load needs, under which policy, and what accuracy more GPUs buy: by simulation.

Imports `loadgen.simulator` and below.
"""
