"""The GPU worker: one resident supernet, actuated in place, behind a pulling server."""
