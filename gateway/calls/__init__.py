"""A request's way to the router: who calls, the queries that it becomes, what is counted, and the settings.

`backend` submits a request's rows to the router and gathers their replies. `board` is a mapped file in which
every process of a gateway counts, so that any of them can state the sums. `access` says who calls, and how
often they may. HTTP and gRPC both use all of this.

Imports `gateway.v2` and `superserve`.
"""
