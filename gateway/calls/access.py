"""Who calls, and how often they may: bearer tokens and client certificates, from a file of names.

A line of the file names a caller and how it is known, and may bound its rate:

    checkout  token:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08  rate=200
    search    cert:search.internal

The file holds a token's SHA-256, never the token. `python -m gateway token NAME` makes both. A certificate is
known by its subject's common name, after TLS has verified it. The names are the gateway's: the router does
not see them.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gateway.v2.verdicts import TOO_MANY, UNKNOWN_CALLER, GatewayError
from superserve.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_BURST_S = 1.0
_S = 1_000_000_000
EXPECTED = "expected NAME token:SHA256 or NAME cert:COMMON_NAME, then nothing or rate=QUERIES_PER_SECOND"


@dataclass(frozen=True, slots=True)
class KnownCaller:
    """A caller by name; `rate_qps` bounds its queries a second, over all processes, None for no bound."""

    name: str
    rate_qps: float | None = None


ANYONE = KnownCaller("")


class RateBucket:
    """A token bucket that holds what a second's rate gives.

    Args:
        rate_qps: Queries a second.
    """

    __slots__ = ("_at_ns", "_left", "_most", "_rate")

    def __init__(self, rate_qps: float) -> None:
        self._rate = rate_qps
        self._most = max(rate_qps * _BURST_S, 1.0)
        self._left = self._most
        self._at_ns = 0

    def take(self, n: int, now_ns: int) -> bool:
        """Take `n` queries if as many are left; more than the bucket holds needs a full one."""
        if self._at_ns:
            self._left = min(self._most, self._left + self._rate * (now_ns - self._at_ns) / _S)
        self._at_ns = now_ns
        if self._left < min(n, self._most):
            return False
        self._left -= n
        return True


class Access:
    """Who may call.

    Args:
        callers: By `token:SHA256` and `cert:COMMON_NAME`; empty lets anyone call.
        n_processes: Processes that share a caller's rate: each allows its part.
    """

    def __init__(self, callers: dict[str, KnownCaller] | None = None, n_processes: int = 1) -> None:
        self._callers = callers or {}
        self._buckets = {
            caller.name: RateBucket(caller.rate_qps / n_processes)
            for caller in self._callers.values()
            if caller.rate_qps is not None
        }

    @property
    def is_open(self) -> bool:
        """Whether anyone may call."""
        return not self._callers

    def caller(self, authorization: str | None, common_name: str | None) -> KnownCaller:
        """Return who calls, by their certificate or their token.

        Raises:
            GatewayError: They are not known.
        """
        if not self._callers:
            return ANYONE
        if common_name is not None and (found := self._callers.get(f"cert:{common_name}")) is not None:
            return found
        scheme, _, token = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            raise GatewayError(UNKNOWN_CALLER, "authorization: expected a bearer token")
        # Looked up by its hash: how long that takes says nothing about the tokens that exist.
        digest = hashlib.sha256(token.strip().encode("utf-8", "replace")).hexdigest()
        if (found := self._callers.get(f"token:{digest}")) is None:
            raise GatewayError(UNKNOWN_CALLER, "authorization: this bearer token is not known")
        return found

    def admit(self, caller: KnownCaller, n_rows: int, now_ns: int) -> None:
        """Count a request against its caller's rate.

        Raises:
            GatewayError: The rate is used up.
        """
        bucket = self._buckets.get(caller.name)
        if bucket is not None and not bucket.take(n_rows, now_ns):
            raise GatewayError(
                TOO_MANY, f"{caller.name}: expected at most {caller.rate_qps:g} queries a second"
            )


def read_callers(path: Path) -> dict[str, KnownCaller]:
    """Return the callers in a file, by how they are known.

    Raises:
        ConfigError: It cannot be read, or a line is malformed; the error names file and line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: expected a file that can be read: {error}") from error
    found: dict[str, KnownCaller] = {}
    for number, line in enumerate(lines, start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        key, caller = _read_line(f"{path}:{number}", words)
        if key in found:
            raise ConfigError(f"{path}:{number}: {key:.20}... is listed twice")
        if any(other.name == caller.name and other.rate_qps != caller.rate_qps for other in found.values()):
            raise ConfigError(
                f"{path}:{number}: {caller.name} has another rate above: expected one rate a name"
            )
        found[key] = caller
    if not found:
        raise ConfigError(f"{path}: expected at least one caller: {EXPECTED}")
    return found


def _read_line(where: str, words: list[str]) -> tuple[str, KnownCaller]:
    if not 2 <= len(words) <= 3 or not _NAME.fullmatch(words[0]):
        raise ConfigError(f"{where}: {EXPECTED}")
    kind, _, value = words[1].partition(":")
    if kind not in ("token", "cert") or not value or (kind == "token" and not _SHA256.fullmatch(value)):
        raise ConfigError(f"{where}: {EXPECTED}")
    rate: float | None = None
    if len(words) == 3:
        name, _, text = words[2].partition("=")
        try:
            rate = float(text)
        except ValueError:
            rate = 0.0
        if name != "rate" or not 0 < rate < 1e9:
            raise ConfigError(f"{where}: {words[2]}: expected rate=QUERIES_PER_SECOND, above 0")
    return f"{kind}:{value}", KnownCaller(words[0], rate)
