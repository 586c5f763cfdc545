"""The router's core on a virtual clock, with simulated clients, network, workers, faults; `make chaos`.

Imports `router.core` and `loadgen.traces`. It adds a clock and a model of what surrounds the router; it
contains no decision of the router's.
"""
