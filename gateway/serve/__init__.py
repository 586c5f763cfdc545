"""A gateway's processes: `watcher` keeps them and shows the metrics, `process` is one that serves.

Imports every other part of the gateway.
"""
