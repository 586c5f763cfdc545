"""The router's settings in a file, which take effect while it runs: its policy, its margin and its bounds.

    {"policy": "planfit", "margin_ms": null, "max_queries": 200000, "max_bytes": 2147483648}

The file is looked at four times a second. What is wrong with it is logged once, and the last good settings
stay in force: a typing error must not end a router. At the start it is an error.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, fields
from functools import partial
from typing import TYPE_CHECKING

from profiles.table import load_profile
from router.core.events import CoreSettings, Retuned
from router.policies.registry import make_policy
from superserve.clock import MS
from superserve.errors import ConfigError
from superserve.fields import read_file

if TYPE_CHECKING:
    import os
    from pathlib import Path

log = logging.getLogger("router")

LOOK_EVERY_NS = 250 * MS
MAX_MARGIN_MS = 60_000.0
"""A larger one is a mistaken unit."""
_USUAL = CoreSettings()


@dataclass(frozen=True, slots=True)
class RouterSettings:
    """What may change while the router runs.

    Attributes:
        policy: As `router.policies.registry.make_policy` takes it.
        margin_ms: Slack that is held back for late messages; None for what is measured.
        max_queries: Most queries held.
        max_bytes: Most payload bytes held.
    """

    policy: str = "planfit"
    margin_ms: float | None = None
    max_queries: int = _USUAL.max_queries
    max_bytes: int = _USUAL.max_bytes

    def check(self, where: str) -> None:
        """Refuse what no router could run with; which subnets `fixed:` may name, only workers know.

        Raises:
            ConfigError: Names the field.
        """
        for name in ("max_queries", "max_bytes"):
            if (value := getattr(self, name)) < 1:
                raise ConfigError(f"{where}: {name}: expected at least 1, got {value}")
        if self.margin_ms is not None and not 0 <= self.margin_ms <= MAX_MARGIN_MS:  # NaN is not either
            raise ConfigError(f"{where}: margin_ms: expected 0 to {MAX_MARGIN_MS:g} ms, got {self.margin_ms}")
        name, _, subnet = self.policy.partition(":")
        if name != "fixed" or not subnet:
            make_policy(self.policy, load_profile("cnn-8gpu-modelled"))

    def core(self) -> CoreSettings:
        """Return the core's settings."""
        core = CoreSettings(max_queries=self.max_queries, max_bytes=self.max_bytes)
        return core if self.margin_ms is None else core.with_margin(int(self.margin_ms * MS))

    def event(self) -> Retuned:
        """Return what makes a running core take them."""
        return Retuned(self.policy, partial(make_policy, self.policy), self.core())


def read_settings(path: Path) -> RouterSettings:
    """Read a settings file.

    Raises:
        ConfigError: It cannot be read, or a field is unknown or wrong; the error names it.
    """
    try:
        body = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path}: expected JSON: {error}") from error
    known = [field.name for field in fields(RouterSettings)]
    unknown = sorted(set(body) - set(known)) if isinstance(body, dict) else []
    if unknown:
        raise ConfigError(f"{path}: {unknown[0]}: unknown; expected {', '.join(known)}")
    settings = read_file(RouterSettings, body, str(path))
    settings.check(str(path))
    return settings


class SettingsFile:
    """Watches a settings file.

    Args:
        path: Of the file.

    Attributes:
        settings: The last good ones.
        error: What is wrong with the file now; "" if nothing is.
    """

    def __init__(self, path: Path) -> None:
        self.settings = read_settings(path)
        self.error = ""
        self._path = path
        self._look_ns = 0
        self._seen = self._signature()

    def look(self, now_ns: int) -> RouterSettings | None:
        """Return other settings if the file has them now; None otherwise."""
        if now_ns < self._look_ns:
            return None
        self._look_ns = now_ns + LOOK_EVERY_NS
        seen = self._signature()
        if seen == self._seen:
            return None
        self._seen = seen
        try:
            settings = read_settings(self._path)
        except ConfigError as error:
            self.refused(str(error))
            return None
        self.error = ""
        return None if settings == self.settings else settings

    def took(self, settings: RouterSettings) -> None:
        """Note that the router runs with these."""
        log.info("%s: in force: %s", self._path, settings)
        self.settings, self.error = settings, ""

    def refused(self, reason: str) -> None:
        """Note that what the file says cannot be taken."""
        log.error("%s; the earlier settings stay in force", reason)
        self.error = reason

    def _signature(self) -> tuple[int, int, int] | None:
        """Return what differs when the file does, also if a link leads to another one now."""
        try:
            stat: os.stat_result = self._path.stat()
        except OSError:
            return None
        return stat.st_mtime_ns, stat.st_size, stat.st_ino
