"""Asks one router for what is new, and makes frames of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cluster.web.feed import FrameFeed
from loadgen.study.explain.flight import FlightReader, entries_in
from profiles.table import Profile
from superserve.errors import SuperServeError

if TYPE_CHECKING:
    from superserve.status import RouterStatus

_MOST_PAGES = 8
"""Of the flight record, for one frame: a reader that fell behind by more skips to the end."""


@dataclass(frozen=True, slots=True)
class RouterLook:
    """What a look at a router has found.

    Attributes:
        endpoint: The router's client endpoint.
        status: Its STATUS; None if it does not answer.
        frame: Its frame; None if it does not answer.
        why: Why it does not, in words.
    """

    endpoint: str
    status: RouterStatus | None = None
    frame: dict[str, Any] | None = None
    why: str = ""


class RouterWatch:
    """Follows one router; one thread at a time.

    Args:
        name: The cluster's.
        endpoint: The router's client endpoint.
        keys: As for `Client`.
    """

    def __init__(self, name: str, endpoint: str, keys: str) -> None:
        self._endpoint = endpoint
        self._reader = FlightReader(endpoint, keys)
        self._feed = FrameFeed(name)
        self._cursor: int | None = None
        self._epoch: int | None = None

    def close(self) -> None:
        """Close the connection."""
        self._reader.close()

    def look(self) -> RouterLook:
        """Ask for what is new since the last look, and return a frame of it."""
        try:
            return self._look()
        except SuperServeError as error:
            return RouterLook(self._endpoint, why=str(error))

    def _look(self) -> RouterLook:
        feed = self._feed
        asked: dict[str, Any] = {"river": True, "profiles": feed.is_new}
        if self._cursor is not None:
            asked["since"] = self._cursor
        status, found = self._reader.ask(asked)
        if found is None:
            raise SuperServeError("this router keeps no flight record: start it with --flight-mb 16")
        if status.router.epoch != self._epoch:
            if self._epoch is not None:
                feed.reset()
                self._cursor = None
            self._epoch = status.router.epoch
        if found.get("profiles"):
            feed.learn([Profile.from_dict(one) for one in found["profiles"]], found["profile_of"])
        data = [entries_in(found, self._endpoint)]
        page = found
        for _ in range(_MOST_PAGES):
            if not page["more"]:
                break
            _, more = self._reader.ask({"since": page["cursor"]})
            if more is None:
                break
            page = more
            data.append(entries_in(page, self._endpoint))
        self._cursor = None if page["more"] else page["cursor"]
        feed.name_gpus([(name, slot) for name, slot in found["gpus"]])
        return RouterLook(self._endpoint, status, feed.frame(status, found, b"".join(data)))
