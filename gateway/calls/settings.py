"""What a gateway is given, checked once, as every process of it reads it."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson

from superserve.errors import ConfigError

if TYPE_CHECKING:
    from typing import Self

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewaySettings:
    """A gateway's settings.

    Attributes:
        connect: The router's client endpoint, passed on as it is.
        keys: As for `AsyncClient`.
        model: The model's name; None for its supernet's.
        default_slo_ms: For requests without a time; None refuses them.
        tokenizer: The model's tokenizer.json, for requests with texts; None refuses them.
        address: Where it listens.
        http_port: 0 is any free port; None serves no HTTP.
        grpc_port: As for HTTP.
        n_http: Processes that serve HTTP.
        n_grpc: Processes that serve gRPC.
        tls_cert: The server's certificate chain; None serves without TLS.
        tls_key: Its key.
        client_ca: Certificates must be signed by one of these; None asks for no certificate.
        callers: The file of callers; None lets anyone call.
        is_open: Whether anyone may call from other machines.
        max_body_bytes: Most bytes of a request.
        max_connections: Of one process.
        max_outstanding: Queries of one process without an answer.
        head_s: How long a head may take.
        body_s: How long a body may take.
        idle_s: How long an idle connection is kept.
        notice_s: On SIGTERM, how long readiness says no while requests are still taken.
        drain_s: After that, how long answers may take.
        board: The file with the shared counters; set by the watcher.
    """

    connect: str
    keys: str | None = None
    model: str | None = None
    default_slo_ms: float | None = None
    tokenizer: str | None = None
    address: str = LOOPBACK
    http_port: int | None = 0
    grpc_port: int | None = None
    n_http: int = 1
    n_grpc: int = 1
    tls_cert: str | None = None
    tls_key: str | None = None
    client_ca: str | None = None
    callers: str | None = None
    is_open: bool = False
    max_body_bytes: int = 64 << 20
    max_connections: int = 16_384
    max_outstanding: int = 20_000
    head_s: float = 10.0
    body_s: float = 60.0
    idle_s: float = 300.0
    notice_s: float = 0.5
    drain_s: float = 10.0
    board: str = ""

    def check(self) -> None:
        """Refuse settings that exclude each other, or that would open the gateway by accident.

        Raises:
            ConfigError: The first such setting, by its option.
        """
        if self.http_port is None and self.grpc_port is None:
            raise ConfigError("--http-port and --grpc-port: expected at least one of them")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigError("--tls-cert and --tls-key: expected both or none")
        if self.client_ca is not None and self.tls_cert is None:
            raise ConfigError("--client-ca: expected --tls-cert and --tls-key with it")
        if self.default_slo_ms is not None and not 0 < self.default_slo_ms <= 86_400_000:
            raise ConfigError(
                f"--default-slo-ms: expected milliseconds above 0 and up to a day, got {self.default_slo_ms}"
            )
        if self.tokenizer is not None and self.http_port is None:
            raise ConfigError("--tokenizer: expected HTTP with it: texts are not part of the gRPC protocol")
        is_guarded = self.callers is not None or self.client_ca is not None
        if not is_loopback(self.address) and not is_guarded and not self.is_open:
            raise ConfigError(
                f"--address {self.address}: other machines could call without a name: expected --callers or "
                f"--client-ca, or --security none if the network keeps strangers out"
            )

    def to_json(self) -> str:
        """Return the settings as one word of a command line."""
        return orjson.dumps({name: getattr(self, name) for name in self.__slots__}).decode()

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote."""
        found: dict[str, Any] = orjson.loads(text)
        return cls(**found)


def is_loopback(address: str) -> bool:
    """Return whether only this machine reaches an address."""
    if address == "localhost":
        return True
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False
