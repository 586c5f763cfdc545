"""The load generator: open-loop arrivals, due-time latency, honest reports."""
