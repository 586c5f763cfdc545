"""Asks the routers four times a second, and hands each frame to every reader.

A router is asked once, however many browsers look. A reader that does not keep up loses frames, not the
hub's memory: it gets the newest. Several routers are asked side by side, so that one that is gone or stalls
does not hold up the others.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any

import orjson

from cluster.web.watch import RouterLook, RouterWatch
from cluster.web.whole import WholeFeed, idle
from superserve.net.endpoints import endpoints_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from concurrent.futures import Future

EVERY_S = 0.25
KEPT_S = 120.0
"""How much a browser that opens the page sees at once, and a recording has."""
_WAITING = 8  # frames that a slow reader may be behind
_PATIENCE_S = 0.2
"""How long a frame waits for the routers."""
_GONE_S = 1.5
"""From this on a router that has not answered counts as gone; until then its last frame stays."""


class Asking:
    """Asks several routers side by side.

    Args:
        watches: One for each.
        endpoints: Theirs.
    """

    def __init__(self, watches: Sequence[RouterWatch], endpoints: Sequence[str]) -> None:
        self._watches = watches
        self._pool = ThreadPoolExecutor(len(watches), "router")
        self._asked: list[Future[RouterLook] | None] = [None] * len(watches)
        self._last = [RouterLook(endpoint, why="it has not answered yet") for endpoint in endpoints]
        self._last_s = [time.monotonic()] * len(watches)

    def looks(self) -> list[RouterLook]:
        """Return a look at each router: new, or as it was if it has not answered in time."""
        for i, watch in enumerate(self._watches):
            if self._asked[i] is None:
                self._asked[i] = self._pool.submit(watch.look)
        wait([one for one in self._asked if one is not None], _PATIENCE_S)
        return [self._taken(i) for i in range(len(self._watches))]

    def _taken(self, i: int) -> RouterLook:
        asked, now_s, last = self._asked[i], time.monotonic(), self._last[i]
        if asked is not None and asked.done():
            self._asked[i] = None
            look = asked.result()
            if look.frame is not None:
                self._last[i], self._last_s[i] = look, now_s
            return look
        if last.frame is None or now_s - self._last_s[i] > _GONE_S:
            return RouterLook(last.endpoint, why=last.why or f"no answer for {now_s - self._last_s[i]:.0f} s")
        return RouterLook(last.endpoint, last.status, idle(last.frame))

    def close(self) -> None:
        """Wait for the last answers."""
        self._pool.shutdown()


class FrameHub:
    """Keeps the last frames, and serves them.

    Args:
        name: The cluster's.
        endpoint: Its router's client endpoint; of several, with commas between them.
        keys: As for `Client`.
    """

    def __init__(self, name: str, endpoint: str, keys: str) -> None:
        self.frames: deque[bytes] = deque(maxlen=int(KEPT_S / EVERY_S))
        endpoints = endpoints_of(endpoint)
        self._watches = [RouterWatch(name, one, keys) for one in endpoints]
        self._asking = Asking(self._watches, endpoints) if len(endpoints) > 1 else None
        self._whole = WholeFeed(name)
        self._readers: set[asyncio.Queue[bytes]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="frames", daemon=True)

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Ask the router from now on; readers are in `loop`."""
        self._loop = loop
        self._thread.start()

    def stop(self) -> None:
        """Stop asking."""
        self._is_stopping.set()
        self._thread.join(timeout=5.0)

    async def follow(self) -> AsyncIterator[bytes]:
        """Yield the frames that are kept, and then each as it comes."""
        queue: asyncio.Queue[bytes] = asyncio.Queue(_WAITING)
        kept = list(self.frames)
        self._readers.add(queue)
        try:
            for frame in kept:
                yield frame
            while True:
                yield await queue.get()
        finally:
            self._readers.discard(queue)

    # --- the thread -------------------------------------------------------------------------

    def _run(self) -> None:
        due_s = time.monotonic()
        try:
            while not self._is_stopping.wait(max(0.0, due_s - time.monotonic())):
                due_s = time.monotonic() + EVERY_S  # never sooner: a frame's rates need its time
                frame = self._look()
                frame["wall"] = time.time()
                self._give(orjson.dumps(frame, default=str))
        finally:
            if self._asking is not None:
                self._asking.close()
            for watch in self._watches:
                watch.close()

    def _look(self) -> dict[str, Any]:
        """Return a frame of what is new: of the only router, or of the whole and each."""
        if self._asking is None:
            only = self._watches[0].look()
            return {"gone": only.why} if only.frame is None else only.frame
        looks = self._asking.looks()
        if all(look.frame is None for look in looks):
            return {"gone": "; ".join(look.why for look in looks)}
        return self._whole.frame(looks, time.monotonic() * 1e3)

    def _give(self, frame: bytes) -> None:
        self.frames.append(frame)
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._hand, frame)

    def _hand(self, frame: bytes) -> None:
        for queue in self._readers:
            if queue.full():
                queue.get_nowait()
            queue.put_nowait(frame)
