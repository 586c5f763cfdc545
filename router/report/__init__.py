"""What the router reports on itself: STATUS, metrics, health, and the recent past they are judged by.

Imports `router.core`, not `router.serve`: the loop passes what only it knows, as values. Reads the
core's counters and never changes them.
"""
