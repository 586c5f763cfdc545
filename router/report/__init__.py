"""What the router says of itself: STATUS, metrics, health, and the recent past they are judged by.

Imports `router.core`, not `router.serve`: the loop hands over what only it knows, as values. Reads the
core's counters and never changes them.
"""
