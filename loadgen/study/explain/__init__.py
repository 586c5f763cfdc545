"""Why a query was late: where its time went, what stood before it, the cause, and what would have helped.

    flight     what a router did: from its event log, from a running router, or from a file
    story      one query's times and the batches around it
    causes     which of the causes it was
    whatif     the same arrivals through the core again, with one thing changed
    show       all of it in words

Reads flight records (`superserve.wire.flight`). A counterfactual runs the router's core on a virtual clock
(`loadgen.simulator`), with the arrivals as recorded and GPUs as slow as they were measured.
"""
