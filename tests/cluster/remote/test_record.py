"""What an operator's machine remembers of a cluster on several hosts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from cluster.operate.engine import open_cluster
from cluster.remote import record as records
from cluster.remote.record import KnownHost, Record
from cluster.spec.roles import Target
from superserve.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

HOST = KnownHost("b", Target("10.0.0.2", "serve", 2222), "/s/b", "python3", "/s/code", ("worker-b-0",))
RECORD = Record(
    "prod", "/hosts.yaml", "/ssh_config", "a", "tcp://a:5555", "tcp://a:5556", "cnn-8gpu-modelled",
    (HOST,), (("worker-b-0", 1),), (("c", "refused"),),
)  # fmt: skip


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep the records of a test to itself."""
    monkeypatch.setenv("SUPERSERVE_STATE", str(tmp_path))
    return tmp_path


def test_it_is_read_as_it_was_written_by_this_user_alone() -> None:
    """And is gone once forgotten."""
    records.save(RECORD)
    assert records.load("prod") == RECORD
    assert records.path_of("prod").stat().st_mode & 0o777 == 0o600
    assert records.names() == ["prod"]

    records.forget("prod")
    assert records.load("prod") is None
    records.forget("prod")


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"schema": 1}', '{"schema": 9}', '{"schema": 1, "hosts": [1]}']
)
def test_a_malformed_one_is_an_error_that_says_how_to_go_on(text: str) -> None:
    """The error names the file; `up` writes it again."""
    records.save(RECORD)
    records.path_of("prod").write_text(text)
    with pytest.raises(ConfigError, match=r"prod\.json: .*(cluster up|another version)"):
        records.load("prod")


def test_hosts_and_roles_are_found_by_name() -> None:
    """Unknown ones are errors that list the known."""
    assert RECORD.host("b") == RECORD.host_of("worker-b-0") == HOST
    with pytest.raises(ConfigError, match="x: expected a host of 'prod': b"):
        RECORD.host("x")
    with pytest.raises(ConfigError, match="x: expected a role of 'prod': worker-b-0"):
        RECORD.host_of("x")


def test_a_cluster_that_is_not_known_says_how_it_becomes_so() -> None:
    """Its hosts file makes it known on any operator's machine."""
    records.save(RECORD)
    with pytest.raises(ConfigError, match=r"no cluster 'x' .*known are: prod; `cluster up FILE`"):
        open_cluster("x").__enter__()
