"""Live runs: private or existing clusters, sender processes, hosts, and what is seen while a run goes on.

Imports `loadgen.results` and `loadgen.traces`. Data: trace -> senders -> columns of outcomes -> results.
"""
