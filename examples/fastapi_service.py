"""A web service in front of a cluster: one AsyncClient, and a status for each way a query can end.

    cluster up
    uvicorn --app-dir examples fastapi_service:app
    curl 'localhost:8000/classify?slo_ms=200' --json '{"pixels": [[0.0, 0.5, ...], ...]}'

It takes the cluster of this machine, or the router that SUPERSERVE_ENDPOINT names.

A request ends within its `slo_ms` and GRACE_MS of being read, whatever became of the cluster:

    200  the answer; `is_late` says whether it came after the deadline
    422  the query is not what the model takes
    502  the model failed on it, or its worker died and no time was left for another
    503  the cluster takes no more now: try again after Retry-After seconds
    504  no answer by the deadline: there was too little time, too long a queue, or no router

Every other status than 200 comes with {"error": class, "detail": text}; FastAPI's own 422 has its own form.
"""

# No `from __future__ import annotations`: FastAPI reads the annotations while it runs.
import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

import numpy as np
from fastapi import FastAPI, Query, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

import superserve
from superserve.roles.local import running

GRACE_MS = 100.0
"""How long past its deadline a request may still get a late answer, instead of a 504."""

HEALTH_SLO_MS = 1_000.0
SIZE = 20  # the digits supernet takes (1, 20, 20)
Row = Annotated[list[float], Field(min_length=SIZE, max_length=SIZE)]

STATUSES: dict[type[Exception], int] = {
    superserve.InvalidQueryError: 422,
    superserve.ModelFailedError: 502,
    superserve.WorkerLostError: 502,
    superserve.OverloadedError: 503,
    superserve.DrainingError: 503,
    superserve.CancelledQueryError: 503,  # this service is shutting down
    superserve.InfeasibleError: 504,
    superserve.ExpiredError: 504,
    superserve.UnansweredError: 504,
}


class Image(BaseModel):
    """A greyscale image: 0 is paper, 1 is ink."""

    pixels: Annotated[list[Row], Field(min_length=SIZE, max_length=SIZE)]


class Answer(BaseModel):
    """The digit, and who read it how fast."""

    digit: int
    logits: list[float]
    subnet: str
    accuracy: float
    is_late: bool
    latency_ms: float


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[dict[str, superserve.AsyncClient]]:
    """Share one client among all requests: what they submit together travels together.

    Without a router the service does not start; with one that is lost later it goes on, and says so.
    """
    endpoint = os.environ.get("SUPERSERVE_ENDPOINT") or running().client_endpoint
    async with superserve.AsyncClient(endpoint) as client:
        yield {"client": client}


app = FastAPI(title="Digits", lifespan=lifespan)


@app.post("/classify")
async def classify(
    image: Image,
    request: Request,
    slo_ms: Annotated[float, Query(gt=0, le=60_000)] = 500.0,
    min_accuracy: Annotated[float | None, Query(ge=0, le=100)] = None,
) -> Answer:
    """Read a digit within `slo_ms`, by a subnet of at least `min_accuracy` percent."""
    pixels = np.array([image.pixels], np.float32)  # (1, H, W)
    query = request.state.client.submit(pixels, slo_ms=slo_ms, min_accuracy=min_accuracy)
    reply = await answered(query, request, slo_ms)
    return Answer(
        digit=int(reply.output.argmax()),
        logits=reply.output.tolist(),
        subnet=reply.subnet,
        accuracy=reply.accuracy,
        is_late=reply.is_late,
        latency_ms=reply.latency_ms,
    )


async def answered(
    query: asyncio.Future[superserve.Reply], request: Request, slo_ms: float
) -> superserve.Reply:
    """Await a query for as long as its answer is worth something, and its caller is there to read it."""
    hang_up = asyncio.create_task(hung_up(request))
    try:
        left_s = (slo_ms + GRACE_MS) / 1000
        await asyncio.wait((query, hang_up), timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
        if not query.done():
            raise superserve.UnansweredError(f"no answer within {slo_ms:g} ms and {GRACE_MS:g} ms of grace")
        return query.result()
    finally:
        hang_up.cancel()
        query.cancel()  # the router drops it and no GPU runs it; does nothing to one that has ended


async def hung_up(request: Request) -> None:
    """Wait until the caller is gone. The server does not cancel a handler for that by itself."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


@app.get("/health")
async def health(request: Request) -> JSONResponse:
    """Ask the cluster a real query: this process may live while nobody is served."""
    blank = np.zeros((1, SIZE, SIZE), np.float32)
    try:
        reply = await request.state.client.infer(blank, slo_ms=HEALTH_SLO_MS)
    except superserve.QueryError as error:
        return JSONResponse(described(error), status_code=503)
    return JSONResponse({"status": "ok", "subnet": reply.subnet, "latency_ms": reply.latency_ms})


@app.exception_handler(superserve.QueryError)
async def refuse(_: Request, error: Exception) -> JSONResponse:
    """Turn the reason why there is no answer into a status and a body that say so."""
    status = STATUSES.get(type(error), 500)
    return JSONResponse(described(error), status, {"Retry-After": "1"} if status == 503 else None)


def described(error: Exception) -> dict[str, str]:
    """Return the body of an answer that is none."""
    return {"error": type(error).__name__, "detail": str(error)}
