"""Questions asked of many runs: which policy is better, which rate holds, do live and simulated agree.

Imports `loadgen.simulator`, `loadgen.live`, `loadgen.bound` and below.
"""
