"""Callers and their rates, the shared counters, and settings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from gateway.calls.access import Access, RateBucket, read_callers
from gateway.calls.board import Board
from gateway.calls.settings import GatewaySettings
from gateway.v2.verdicts import GatewayError
from superserve.errors import ConfigError
from tests.gateway.fakes import reply

if TYPE_CHECKING:
    from pathlib import Path

HASH = "a" * 64
_S = 10**9


def test_a_file_of_callers(tmp_path: Path) -> None:
    """Names, tokens, certificates, rates and comments."""
    path = tmp_path / "callers"
    path.write_text(f"# who\n\napp token:{HASH} rate=20  # quick\nsearch cert:search.internal\n")
    found = read_callers(path)

    assert {key: (one.name, one.rate_qps) for key, one in found.items()} == {
        f"token:{HASH}": ("app", 20.0),
        "cert:search.internal": ("search", None),
    }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "at least one caller"),
        ("app", ":1: expected NAME"),
        (f"app\nb token:{HASH}", ":1: expected NAME"),
        ("app token:short", ":1: expected NAME"),
        (f"app token:{HASH} rate=0", "rate=QUERIES_PER_SECOND"),
        (f"app token:{HASH} speed=5", "rate=QUERIES_PER_SECOND"),
        (f"a token:{HASH}\nb token:{HASH}", ":2: token:.* is listed twice"),
        (f"a token:{HASH} rate=5\na cert:a rate=6", ":2: a has another rate"),
        ("-a cert:x", "expected NAME"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, text: str, words: str) -> None:
    """File and line, and what was expected."""
    path = tmp_path / "callers"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words) as caught:
        read_callers(path)
    assert str(path) in str(caught.value)


def test_a_rate_holds_over_time() -> None:
    """A burst of a second's rate, then as many as time gives."""
    bucket = RateBucket(10.0)
    assert [bucket.take(1, _S) for _ in range(11)] == [True] * 10 + [False]
    assert not bucket.take(1, _S + 50_000_000)
    assert bucket.take(1, _S + 150_000_000)
    taken = sum(bucket.take(1, _S + 10_000_000 * i) for i in range(15, 1_015))
    assert taken == pytest.approx(100, abs=2)


def test_a_request_larger_than_the_burst_needs_a_full_bucket() -> None:
    """It is paid back before the next one."""
    bucket = RateBucket(10.0)
    assert bucket.take(50, _S)
    assert not bucket.take(1, 5 * _S)
    assert bucket.take(1, 6 * _S)


def test_without_callers_anyone_may_call() -> None:
    """No file: no names."""
    assert Access().caller(None, None).name == ""
    assert Access().is_open


def test_rows_of_a_board_add_up(tmp_path: Path) -> None:
    """Each process writes its row; a process that starts again keeps its counts and not its gauges."""
    Board.make(tmp_path / "board", 2)
    one, two = Board(tmp_path / "board", 0), Board(tmp_path / "board", 1)
    one.count_success([reply(b"", batch_size=4)], 3_000_000, 5)
    two.count_success([reply(b"", batch_size=4)] * 3, 12_000_000, 9)
    two.add("connections", 7)
    one.count_status(200)
    two.count_status(200)
    two.count_status(299)

    reader = Board(tmp_path / "board")
    totals = reader.totals()
    assert (totals.success.count, totals.success.ns) == (2, 15_000_000)
    assert (totals.inferences, totals.executions, totals.last_ms) == (4, 1, 9)
    assert (reader.sum("status_200"), reader.sum("status_500")) == (2, 1)
    counts, total_ns = reader.latencies(range(2))
    assert (sum(counts), total_ns) == (2, 15_000_000)

    Board(tmp_path / "board", 1)
    assert reader.sum("connections") == 0
    assert reader.totals().inferences == 4


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"http_port": None}, "at least one"),
        ({"tokenizer": "a", "http_port": None, "grpc_port": 0}, "--tokenizer: expected HTTP"),
        ({"tls_cert": "a"}, "--tls-key"),
        ({"client_ca": "a"}, "--client-ca"),
        ({"default_slo_ms": 0.0}, "--default-slo-ms"),
        ({"default_slo_ms": float("nan")}, "--default-slo-ms"),
        ({"address": "0.0.0.0"}, "--callers"),
        ({"address": "::"}, "--callers"),
        ({"address": "host.example"}, "--callers"),
    ],
)
def test_settings_that_cannot_be_are_refused(changed: dict[str, Any], words: str) -> None:
    """Among them an address that strangers reach."""
    with pytest.raises(ConfigError, match=words):
        GatewaySettings(connect="tcp://127.0.0.1:1", **changed).check()


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"address": "::1"},
        {"address": "0.0.0.0", "callers": "f"},
        {"is_open": True, "address": "10.0.0.1"},
    ],
)
def test_settings_that_hold(changed: dict[str, Any]) -> None:
    """Loopback, or guarded, or open on purpose; and they survive the way to a process."""
    settings = GatewaySettings(connect="tcp://127.0.0.1:1", **changed)
    settings.check()
    assert GatewaySettings.from_json(settings.to_json()) == settings


def test_an_unknown_token_says_nothing_about_others() -> None:
    """One message for every wrong token."""
    access = Access({f"token:{HASH}": read_one()})
    messages = set()
    for token in ("x", HASH, "y" * 500):
        with pytest.raises(GatewayError) as caught:
            access.caller(f"Bearer {token}", None)
        messages.add(str(caught.value))
    assert len(messages) == 1


def read_one() -> Any:
    """Return a caller."""
    from gateway.calls.access import KnownCaller  # noqa: PLC0415

    return KnownCaller("app")
