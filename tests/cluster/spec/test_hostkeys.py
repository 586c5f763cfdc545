"""Which keys a host of a file is given: its own, the lists on the router's host, and nobody else's."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING

import pytest

from cluster.spec.hostkeys import OPERATOR, complete
from cluster.spec.hostplan import HostsPlan, plan_of
from cluster.spec.hosts import load_hosts
from superserve.errors import ConfigError
from superserve.net import keys

if TYPE_CHECKING:
    from pathlib import Path

TEXT = """
router: {host: a}
hosts:
  - {name: a, address: 10.0.0.1, workers: 1}
  - {name: b, address: 10.0.0.2, workers: 2}
emulate: cnn-8gpu-modelled
keys: ring
"""


@pytest.fixture
def ring(tmp_path: Path) -> Path:
    """Give a router's folder beside a hosts file, which names it, with a client `web`."""
    (tmp_path / "hosts.yaml").write_text(TEXT)
    keys.make_ring(tmp_path / "ring")
    keys.add_peer(tmp_path / "ring", "client", "web")
    return tmp_path / "ring"


def planned(ring: Path) -> HostsPlan:
    """Return the plan of the file beside the folder, with whatever key it lacks made."""
    path = ring.parent / "hosts.yaml"
    hosts = load_hosts(path)
    complete(hosts)
    return plan_of(hosts, path)


def files(plan: HostsPlan, host: str) -> dict[str, bytes]:
    """Return what a host is given."""
    return {name: base64.b64decode(text) for name, text in plan.files_of(host).items()}


def shown(plan: HostsPlan, host: str, role: str) -> str:
    """Return the argument of a role's --keys, as a path in the cluster's folder."""
    argv = next(found.argv for found in plan.roles_of(host, "/s") if found.name == role)
    return argv[argv.index("--keys") + 1].removeprefix("/s/")


def test_a_host_is_given_its_own_secrets_and_nobody_elses(ring: Path) -> None:
    """Every secret in the folder goes to the hosts that act by it, and to no other."""
    plan = planned(ring)
    holders = {
        ring / "router.key": "a", ring / "operators" / f"{OPERATOR}.key": "a", ring / "workers/a.key": "a",
        ring / "workers/b.key": "b", ring / "clients/web.key": "", ring / "operator.key": "",
    }  # fmt: skip
    assert set(ring.rglob("*.key")) == set(holders)
    for secret, holder in holders.items():
        found = "".join(host for host in "ab" if secret.read_bytes() in files(plan, host).values())
        assert found == holder, secret
    assert list(files(plan, "b")) == [shown(plan, "b", "worker-b-0")] == [shown(plan, "b", "worker-b-1")]
    assert "secret = " not in repr(plan)


def test_what_is_sent_is_what_router_and_workers_read(ring: Path, tmp_path: Path) -> None:
    """The router's folder lists everybody; a worker's file names that router; both from the paths given."""
    plan = planned(ring)
    for host in "ab":
        for name, content in files(plan, host).items():
            path = tmp_path / host / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(0o600)
            path.write_bytes(content)
    folder = tmp_path / "a" / shown(plan, "a", "router")
    listed, problems = keys.read_ring(folder)
    assert problems == []
    assert sorted(listed.workers.values()) == ["a", "b"]
    assert list(listed.clients.values()) == ["web"]
    worker = keys.peer_keys(tmp_path / "b" / shown(plan, "b", "worker-b-0"), "worker")
    assert worker is not None
    assert worker.router == keys.router_keys(folder).public
    assert listed.workers[worker.public] == "b"
    operator = keys.peer_keys(tmp_path / "a" / "keys" / "operator.key")
    assert operator is not None
    assert listed.operators[operator.public] == OPERATOR


def test_a_revoked_name_changes_the_router_s_files_and_no_command_line(ring: Path) -> None:
    """So the next `up` sends the lists, and has nothing to restart."""
    before = planned(ring)
    keys.revoke(ring, "web")
    after = planned(ring)
    assert after.roles == before.roles
    assert [name for name in files(before, "a") if name not in files(after, "a")] == [
        f"{shown(before, 'a', 'router')}/clients/web.pub"
    ]
    assert files(after, "b") == files(before, "b")


def test_another_key_of_a_host_is_another_command_line_there(ring: Path) -> None:
    """A worker reads its key at its start; that of another host is not touched."""
    before = planned(ring)
    keys.revoke(ring, "b")
    after = planned(ring)
    assert shown(after, "b", "worker-b-0") != shown(before, "b", "worker-b-0")
    assert after.roles[0] == before.roles[0]


def test_keys_are_made_once(ring: Path) -> None:
    """The operator's, and one for each host with workers; the second time nothing is missing."""
    hosts = load_hosts(ring.parent / "hosts.yaml")
    assert [path.relative_to(ring).as_posix() for path in complete(hosts)] == [
        f"operators/{OPERATOR}.key", "workers/a.key", "workers/b.key"
    ]  # fmt: skip
    assert complete(hosts) == []


def test_half_a_key_is_refused(ring: Path) -> None:
    """A secret that was taken elsewhere, or was taken off its list by hand, is named with what to do."""
    planned(ring)
    secret, listed = ring / "workers/b.key", ring / "workers/b.pub"
    kept = listed.read_bytes()
    listed.unlink()
    with pytest.raises(ConfigError, match=r"b\.key: not listed any more: remove it"):
        planned(ring)
    listed.write_bytes(kept)
    secret.unlink()
    with pytest.raises(ConfigError, match=r"b\.key: no such file, and b\.pub lists it: .*revoke b"):
        planned(ring)


def test_a_key_of_another_router_or_name_is_refused(ring: Path) -> None:
    """It would be refused by the router, where nobody looks."""
    planned(ring)
    a, b = ring / "workers/a.key", ring / "workers/b.key"
    kept = b.read_bytes()
    b.write_bytes(a.read_bytes())
    with pytest.raises(ConfigError, match=r"b\.key: public: expected the key that b\.pub lists"):
        planned(ring)
    b.write_bytes(kept)
    other = keys.make_ring(ring.parent / "other")[0].parent
    theirs = keys.router_keys(other).public
    ours = keys.router_keys(ring).public
    b.write_bytes(kept.replace(ours.encode(), theirs.encode()))
    with pytest.raises(ConfigError, match=r"b\.key: router: expected the key of .*router\.key"):
        planned(ring)


def test_a_folder_that_is_no_router_s_is_named_with_its_line(tmp_path: Path) -> None:
    """The path is relative to the file; the message shows how to make such a folder."""
    path = tmp_path / "hosts.yaml"
    path.write_text(TEXT)
    with pytest.raises(ConfigError, match=r"hosts\.yaml:7.*keys: .*ring.*cluster keys --out .*ring make"):
        load_hosts(path)


def test_without_keys_both_ways_out_are_named(tmp_path: Path) -> None:
    """A router that other hosts reach has keys, or the file says that all of them may use it."""
    path = tmp_path / "hosts.yaml"
    path.write_text(TEXT.replace("keys: ring\n", ""))
    with pytest.raises(ConfigError, match=r"`cluster keys make`.*`keys: FOLDER`.*`security: none`"):
        plan_of(load_hosts(path), path)
    path.write_text(TEXT.replace("keys: ring\n", "security: none\n"))
    plan = plan_of(load_hosts(path), path)
    argv = plan.roles_of("a", "/s")[0].argv
    assert argv[argv.index("--security") + 1] == "none"
    assert "--keys" not in argv
    assert set(files(plan, "a")) == {"files/router.json"}
