"""The live page: a process beside the router that asks it four times a second and shows what happens.

    watch        asks one router for what is new
    feed         STATUS and the flight record in, frames out: what has happened since the last one
    frames       the shape of a frame, and what a miss, a batch and a worker look like in it
    whole        the frames of several routers, made one
    verdict      one sentence on what to do, in doctor's words
    hub          asks each router once, keeps the last two minutes, serves any number of readers
    app          the routes, and who may ask: this machine alone, or who has the token
    recording    the page with its frames inside, which plays back without a server

Read-only: it sends the router nothing but STATUS. However many browsers look, the router is asked once.
Imports `cluster.operate` and below, and `loadgen.study.explain`.
"""
