"""A cluster on two hosts with keys: only listed clients are served, and `up` sends new lists."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tests.e2e.netns import Net, net
from tests.e2e.test_hosts import pids, up, write

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture
def hosts() -> Iterator[Net]:
    """Give two hosts, an operator, and a third host that has a client's key and nothing else of ours."""
    with net("a", "b", "c") as here:
        yield here


def load(here: Net, *keys: str, host: str = "c") -> tuple[bool, str]:
    """Offer a little load to the router from a host; return whether it was served, and what was printed.

    A busy machine makes the run invalid; here it counts that it was answered.
    """
    router = f"{here.address('a')}:5555"
    path = here.folder / "run.json"
    path.unlink(missing_ok=True)
    _, output = here.loadgen(
        "run", "--connect", router, "--trace", "poisson:rate=100",
        "--duration", "1", "--slo-ms", "10000", "--json", str(path), *keys, host=host,
    )  # fmt: skip
    if path.exists():
        queries = json.loads(path.read_text())["queries"]
        assert queries["total"] == queries["ok"] > 0, output
    return path.exists(), output


def received(here: Net) -> int:
    """Return how many queries have ever reached the router."""
    code, output = here.cluster("status", "--json")
    assert code == 0, output
    return int(json.loads(output)["status"]["queries"]["received"])


def modes(folder: Path) -> set[int]:
    """Return the modes of a folder's files."""
    return {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()}


def test_only_listed_clients_are_served_and_a_later_up_revokes(hosts: Net) -> None:
    """From `up` to `revoke` and `up`: two hosts serve whom the folder lists; lists restart nothing."""
    ring = hosts.folder / "ring"
    for args in (("make",), ("add", "client", "web")):
        code, output = hosts.cluster("keys", "--out", str(ring), *args)
        assert code == 0, output
    file = write(hosts, "a", "b", security="keys", head="keys: ring")

    output = up(hosts, file)
    assert f'superserve.Client("tcp://{hosts.address("a")}:5555", keys="NAME.key")' in output
    for made in ("operators/cluster-up", "workers/a", "workers/b"):
        assert f"made {ring / made}.key" in output
    roles = pids(hosts)
    assert roles.keys() == {"router", "worker-a-0", "worker-b-0"}
    assert modes(hosts.state("a") / ".hosts/default/a/keys") == {0o600}
    (own,) = [path for path in (hosts.state("b") / ".hosts").rglob("*") if path.match("keys/*")]
    assert own.read_bytes() == (ring / "workers/b.key").read_bytes()

    web = ring / "clients/web.key"
    is_served, output = load(hosts, "--keys", str(web))
    assert is_served, output
    is_served, output = load(hosts, host="op")  # the operator's own key, which `up` has made and remembers
    assert is_served, output

    before = received(hosts)
    is_served, output = load(hosts)
    assert not is_served
    assert "key" in output
    assert received(hosts) == before

    kept = hosts.folder / "kept.key"
    web.rename(kept)  # as its owner has it
    code, output = hosts.cluster("keys", "--out", str(ring), "revoke", "web")
    assert code == 0, output
    output = up(hosts, file)
    assert "nothing was restarted; new files for a\n" in output
    assert pids(hosts) == roles
    hosts.until(lambda: not load(hosts, "--keys", str(kept))[0])  # the router looks at its lists
    before = received(hosts)
    assert not load(hosts, "--keys", str(kept))[0]
    assert received(hosts) == before

    assert "nothing was changed" in up(hosts, file)
    assert hosts.cluster("down")[0] == 0
    assert hosts.processes() == []
