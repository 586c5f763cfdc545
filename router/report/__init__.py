"""What the router says of itself: STATUS, metrics, health, and the recent past they are judged by.

Imports `router.core`. Reads the core's counters and never changes them.
"""
