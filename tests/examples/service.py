"""The FastAPI example under uvicorn, its callers, and the known answers to compare with."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import httpx
import numpy as np

from gpu_worker.models.digits import held_out
from loadgen.demo.answers import local_forward
from profiles.table import load_profile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
N_AT_ONCE = 64
READY_S = 60.0
HANGS_S = 30.0
"""A caller that waits this long has hit the one failure that must never happen."""

_CLOSE = 1e-4  # a batch's size moves logits by some 1e-6
JSON = {"Content-Type": "application/json"}


@functools.cache
def bodies() -> list[bytes]:
    """Return what asks for each of the first thousand images; made when first needed, not at collection."""
    return [json.dumps({"pixels": pixels[0].tolist()}).encode() for pixels in held_out().pixels[:1000]]


@contextlib.contextmanager
def service(endpoint: str, log_path: Path) -> Iterator[str]:
    """Run the example against the router at `endpoint`; give its base URL."""
    # Idle connections stay open: otherwise one could be closed at the moment of its next use.
    options = ["--port", "0", "--no-access-log", "--timeout-keep-alive", "120"]
    argv = [sys.executable, "-m", "uvicorn", "--app-dir", str(EXAMPLES), *options, "fastapi_service:app"]
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            argv, env={**os.environ, "SUPERSERVE_ENDPOINT": endpoint}, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        yield _url(process, log_path)
    finally:
        process.terminate()
        try:
            process.wait(10.0)
        finally:
            process.kill()
            process.wait()


def _url(process: subprocess.Popen[bytes], log_path: Path) -> str:
    """Wait until uvicorn has written where it listens."""
    give_up_s = time.monotonic() + READY_S
    while time.monotonic() < give_up_s and process.poll() is None:
        found = re.search(r"running on (http://[\d.:]+)", log_path.read_text())
        if found:
            return found[1]
        time.sleep(0.05)
    raise AssertionError(f"uvicorn is not ready; its log:\n{log_path.read_text()}")


class Outcome(NamedTuple):
    """What a caller got for an image.

    Attributes:
        image: Its number.
        slo_ms: What was asked for.
        status: Of HTTP; 0 if the service did not answer in HTTP at all.
        body: The JSON that came.
        elapsed_ms: From the call to the answer.
    """

    image: int
    slo_ms: float
    status: int
    body: dict[str, Any]
    elapsed_ms: float

    @property
    def is_clear_error(self) -> bool:
        """Whether it is a failure of the cluster, named by class and text."""
        return (
            self.status in (502, 503, 504) and bool(self.body.get("error")) and bool(self.body.get("detail"))
        )


def from_threads(
    url: str, slos_ms: Sequence[float], on_outcome: Callable[[Outcome], None] = lambda _: None
) -> list[Outcome]:
    """Send a query for each SLO, from 64 threads."""
    contents = bodies()  # made here: on a query's own time, or by 64 threads at once, it takes seconds
    limits = httpx.Limits(max_connections=N_AT_ONCE)
    with httpx.Client(base_url=url, timeout=HANGS_S, limits=limits) as client:

        def ask(image: int) -> Outcome:
            began_s = time.monotonic()
            response = client.post(
                "/classify", params={"slo_ms": slos_ms[image]}, content=contents[image], headers=JSON
            )
            outcome = _outcome(image, slos_ms[image], response, began_s)
            on_outcome(outcome)
            return outcome

        with concurrent.futures.ThreadPoolExecutor(N_AT_ONCE) as pool:
            return list(pool.map(ask, range(len(slos_ms))))


def from_tasks(
    url: str, slos_ms: Sequence[float], on_outcome: Callable[[Outcome], None] = lambda _: None
) -> list[Outcome]:
    """Send a query for each SLO from a task of its own, over 64 connections."""
    contents = bodies()

    async def ask_all() -> list[Outcome]:
        # A client for each connection: one pool of 64 would look through all of them for each request.
        free: asyncio.Queue[httpx.AsyncClient] = asyncio.Queue()
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(N_AT_ONCE):
                client = httpx.AsyncClient(base_url=url, timeout=HANGS_S, verify=False)  # plain HTTP
                free.put_nowait(await stack.enter_async_context(client))

            async def ask(image: int) -> Outcome:
                client = await free.get()
                began_s = time.monotonic()
                response = await client.post(
                    "/classify", params={"slo_ms": slos_ms[image]}, content=contents[image], headers=JSON
                )
                outcome = _outcome(image, slos_ms[image], response, began_s)
                free.put_nowait(client)
                on_outcome(outcome)
                return outcome

            return await asyncio.gather(*(ask(image) for image in range(len(slos_ms))))

    return asyncio.run(ask_all())


def _outcome(image: int, slo_ms: float, response: httpx.Response, began_s: float) -> Outcome:
    elapsed_ms = (time.monotonic() - began_s) * 1000
    return Outcome(image, slo_ms, response.status_code, response.json(), elapsed_ms)


def wrong(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Return those that are answers, but not what the subnet that they name makes of their image here."""
    names = [subnet.name for subnet in load_profile("digits-cpu").subnets]
    forward, pixels = local_forward("digits-cpu", names), held_out().pixels
    found = []
    for row, name in enumerate(names):
        mine = [one for one in outcomes if one.status == 200 and one.body["subnet"] == name]
        if not mine:
            continue
        expected = forward(row, pixels[[one.image for one in mine]])  # (N, classes)
        for one, logits in zip(mine, expected, strict=True):
            is_close = np.allclose(one.body["logits"], logits, rtol=_CLOSE, atol=_CLOSE)
            if not is_close or one.body["digit"] != int(logits.argmax()):
                found.append(one)
    strangers = [one for one in outcomes if one.status == 200 and one.body["subnet"] not in names]
    return found + strangers


def summary(outcomes: Sequence[Outcome]) -> str:
    """Return how many ended how, and how long the longest took beyond its SLO; print it too."""
    ends = Counter(one.body["subnet"] if one.status == 200 else one.body["error"] for one in outcomes)
    beyond_ms = max(one.elapsed_ms - one.slo_ms for one in outcomes)
    counts = ", ".join(f"{n} {end}" for end, n in sorted(ends.items()))
    line = f"{len(outcomes)} requests: {counts}; the slowest ended {beyond_ms:+.0f} ms from its deadline"
    sys.stdout.write(f"{line}\n")  # pytest -rP shows it
    return line
