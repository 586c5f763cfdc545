"""hosts.yaml: every error at once, with its line and the nearest right key; every default filled in."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from cluster.cli import cli
from cluster.spec.hosts import Hosts, load_hosts
from cluster.spec.hosts_file import dump
from gpu_worker.models.names import SHIPPED_SUPERNETS
from router.policies.registry import known_policies
from superserve.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from tests.cluster.machine import Machine

GOOD = """\
router: {host: a}
hosts:
  - {name: a, address: 10.0.0.1, gpus: [0, 1], env: {OMP_NUM_THREADS: 1}}
  - {name: b, user: serve, workers: 2, device: cpu}
"""


def _written(folder: Path, text: str) -> Path:
    path = folder / "hosts.yaml"
    path.write_text(text)
    return path


def _errors(folder: Path, text: str) -> list[str]:
    """Return the errors of a file, without its name."""
    path = _written(folder, text)
    with pytest.raises(ConfigError) as caught:
        load_hosts(path)
    lines = str(caught.value).splitlines()
    assert all(line.startswith(f"{path}:") for line in lines), lines
    return [line.removeprefix(f"{path}:") for line in lines]


def test_every_default_is_filled_in(tmp_path: Path) -> None:
    """Who uses the dataclasses need not know a default: addresses, devices, ports and counts stand there."""
    hosts = load_hosts(_written(tmp_path, GOOD))

    a, b = hosts.hosts
    assert (hosts.router_address, hosts.router.client_port, hosts.router.worker_port) == (
        "10.0.0.1",
        5555,
        5556,
    )
    assert (a.devices, a.worker_names) == (("cuda:0", "cuda:1"), ("worker-a-0", "worker-a-1"))
    assert a.env == {"OMP_NUM_THREADS": "1"}
    assert (b.address, b.devices, b.user) == ("b", ("cpu", "cpu"), "serve")
    assert (hosts.serves, hosts.supernet, hosts.security) == ("digits-cpu", "digits", "keys")


def test_the_effective_file_says_the_same(tmp_path: Path) -> None:
    """What `config --effective` prints is a hosts file, and means what the short one means."""
    path = _written(tmp_path, GOOD)

    done = CliRunner().invoke(cli, ["config", str(path), "--effective"])

    assert done.exit_code == 0
    assert load_hosts(_written(tmp_path, done.output)) == load_hosts(_written(tmp_path, GOOD))
    assert "client_port: 5555\n" in done.output


def test_a_right_file_is_said_to_be_right(tmp_path: Path) -> None:
    """`config` exits 0 and counts what would run."""
    path = _written(tmp_path, GOOD)

    done = CliRunner().invoke(cli, ["config", str(path)])

    words = "no errors: cluster 'default', the router on a, 4 workers on 2 hosts"
    assert (done.exit_code, done.output) == (0, f"{path}: {words}\n")


def test_all_errors_are_told_at_once(tmp_path: Path) -> None:
    """Errors of one value do not hide those of several together; `config` exits 1 with each line."""
    path = _written(
        tmp_path,
        """\
router: {host: z, clientport: 5556}
client_port: 3
hosts:
  - {name: a, address: 10.0.0.1, gpus: [0, 0]}
  - name: a
    address: 10.0.0.1
    wokers: 4
    workers: "4"
supernet: digit
policy: demandfi
profile: digits-cpu
profile: digits-cpu
""",
    )

    done = CliRunner().invoke(cli, ["config", str(path)])

    assert done.exit_code == 1
    supernets, policies = (
        ", ".join((*SHIPPED_SUPERNETS, "or package.module:attribute")),
        ", ".join(known_policies()),
    )
    lines = done.output.removeprefix("Error: ").splitlines()
    assert [line.removeprefix(f"{path}:") for line in lines] == [
        "1: router.clientport: unknown key; did you mean 'client_port'?",
        "1: router.host: expected the name of a host: a, got 'z'",
        "2: client_port: unknown key here; it belongs in router",
        "4: hosts[0].gpus: expected each device once, got 0 twice",
        "5: hosts[1].name: expected each host once, and hosts[0] is 'a' too",
        "6: hosts[1].address: expected each address once, and hosts[0] has '10.0.0.1' too",
        "7: hosts[1].wokers: unknown key; did you mean 'workers'?",
        "8: hosts[1].workers: expected a whole number, got '4'",
        f"9: supernet: expected one of {supernets}, got 'digit'; did you mean 'digits'?",
        f"10: policy: policy 'demandfi' is unknown: expected one of {policies}; did you mean 'demandfit'?",
        "12: profile: expected once, is on line 11 too",
    ]


# Some files, and how their one error begins; HOSTS stands for hosts that are right.
HOSTS = "hosts: [{name: a, workers: 2}]"
CASES = """\
=> 1: expected a mapping with router and hosts, got nothing

- a
=> 1: expected a mapping with router and hosts, got ['a']

router: [}
=> 1: expected YAML: expected the node content, but found '}'

router: {host: a}
=> 1: hosts: expected a list of hosts, got nothing

router: {host: a}
hosts: []
=> 2: hosts: expected at least 1, got 0

HOSTS
=> 1: router: expected {host: NAME}, the host that the router runs on, got nothing

router: a
HOSTS
=> 1: router: expected a mapping of keys and values, got 'a'

router: {host: a, client_port: 0}
HOSTS
=> 1: router.client_port: expected 1 or more, got 0

router: {host: a, client_port: yes}
HOSTS
=> 1: router.client_port: expected a whole number, got 'yes'

router: {host: a, client_port: 7, worker_port: 7}
HOSTS
=> 1: router.worker_port: expected each port once on a host, and router.client_port and router.worker_port

router: {host: a, client_port: 5556}
HOSTS
=> 1: router.worker_port: expected each port once on a host, and router.client_port and router.worker_port

router: {host: a}
metrics: {workers: 5554}
HOSTS
=> 2: metrics.workers: expected each port once on a host, and router.client_port and metrics.workers, of

router: {host: a}
metrics: {workers: 65535}
HOSTS
=> 2: metrics.workers: expected 2 ports from here on, for the workers of one host, up to 65535, got 65535

router: {host: a}
hosts:
- {name: a, gpus: [0], workers: 1}
=> 3: hosts[0].workers: expected gpus or workers, got both: each of the gpus has one worker

router: {host: a}
hosts:
- {name: a, workers: 1}
- {name: b}
=> 4: hosts[1].name: expected gpus: [0, 1] or workers: N on a host without the router, got neither

router: {host: a}
hosts: [{name: a}]
=> 2: hosts: expected a worker on one of them at least, got none

router: {host: a}
emulate: cnn-8gpu-modelled
hosts: [{name: a, gpus: [0]}]
=> 3: hosts[0].gpus: expected workers: N under `emulate`, which uses no device

router: {host: a}
emulate: cnn-8gpu-modelled
profile: digits-cpu
HOSTS
=> 3: profile: expected it or `emulate`, got both

router: {host: a}
supernet: dynabert
HOSTS
=> 2: supernet: dynabert comes without a profile: expected one, from `profiles search`

router: {host: a}
weights: w.safetensors
HOSTS
=> 2: weights: expected 'random' or an absolute path, the same on each host, got 'w.safetensors'

router: {host: a}
family: f.yaml
profile: digits-cpu
HOSTS
=> 2: family: expected an absolute path, the same on each host, got 'f.yaml'

router: {host: a}
family: /srv/f.yaml
HOSTS
=> 2: family: a family comes without one: expected one, from `profiles measure --family`

router: {host: a}
family: /srv/f.yaml
profile: digits-cpu
supernet: digits
HOSTS
=> 4: supernet: expected it or `family`, got both: a family is served instead of a supernet

router: {host: a}
family: /srv/f.yaml
profile: digits-cpu
weights: random
HOSTS
=> 4: weights: expected it or `family`, got both: each model of a family has its own

router: {host: a}
family: /srv/f.yaml
emulate: cnn-8gpu-modelled
HOSTS
=> 2: family: expected it or `emulate`, got both

router: {host: a}
policy: fixed:huge
HOSTS
=> 2: policy: fixed: profile 'digits-cpu' has no subnet 'huge'

router: {host: a}
security: off
HOSTS
=> 2: security: expected 'keys' or 'none', got 'off'

router: {host: a}
security: none
keys: k
HOSTS
=> 3: keys: expected no keys with security: none

router: {host: a}
margin_ms: .inf
HOSTS
=> 2: margin_ms: expected a finite number

router: {host: a}
hosts: [{name: a, workers: 1, env: {A: [1]}}]
=> 2: hosts[0].env.A: expected text (quote it if it looks like something else), got [1]

router: {host: a, address: serve@10.0.0.1}
HOSTS
=> 1: router.address: expected an address alone, got 'serve@10.0.0.1'

router: {host: a}
hosts: [{name: a, workers: 1, address: serve@10.0.0.1}]
=> 2: hosts[0].address: expected an address alone, got 'serve@10.0.0.1'; `user:` is the name to log in as

router: {host: a}
hosts: [{name: a, workers: 1, address: -oProxyCommand=x}]
=> 2: hosts[0].address: expected text without spaces that does not begin with '-', got '-oProxyCommand=x'

router: {host: a}
routers: [{host: a}]
HOSTS
=> 2: routers: expected router or routers, got both: write all of them as routers

routers: [{host: a}, {host: a, client_port: 5557, worker_port: 5556}]
HOSTS
=> 1: routers[1].worker_port: expected each port once on a host, and routers[0].worker_port and

routers: [{host: a}, {host: z}]
HOSTS
=> 1: routers[1].host: expected the name of a host: a, got 'z'

HOSTS
=> 1: router: expected {host: NAME}, the host that the router runs on, got nothing

router: {host: a}
engine: slurmm
HOSTS
=> 2: engine: expected 'ssh', 'slurm', 'ray' or 'kubernetes', got 'slurmm'

router: {host: a}
ray: {address: auto}
HOSTS
=> 2: ray: expected it with engine: ray only, got engine: ssh

router: {host: a}
engine: slurm
slurm: {partition: gpu}
HOSTS
=> 3: slurm.partition: unknown key; did you mean

router: {host: a}
engine: slurm
slurm: {worker_options: [--partition=gpu, "--time 1:00"]}
HOSTS
=> 3: slurm.worker_options[1]: expected an option of sbatch as one word, such as

router: {host: a}
engine: slurm
slurm: {notice_s: 0}
HOSTS
=> 3: slurm.notice_s: expected 1 to 65535, got 0

router: {host: a}
hosts: &h [*h]
=> 2: expected aliases that end: this one holds itself, or far too much
"""


@pytest.mark.parametrize("case", CASES.split("\n\n"))
def test_what_is_wrong_is_named_with_its_line(tmp_path: Path, case: str) -> None:
    """Each kind of mistake gives one line, which says what was expected."""
    text, _, error = case.partition("=> ")

    found = _errors(tmp_path, text.replace("HOSTS", HOSTS))

    assert len(found) == 1
    assert found[0].startswith(error.strip("\n"))


def test_aliases_may_not_grow_without_bound(tmp_path: Path) -> None:
    """Ten lines that stand for ten billion values are refused, and soon."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]

    found = _errors(tmp_path, "\n".join(lines))

    assert "expected aliases that end" in found[0]


def test_hosts_may_share_keys_by_an_alias(tmp_path: Path) -> None:
    """YAML's merge keys save repetition, and a host's own keys win."""
    text = """\
router: {host: a}
hosts:
  - &all {name: a, user: serve, workers: 2}
  - {<<: *all, name: b, workers: 3}
"""
    hosts = load_hosts(_written(tmp_path, text))

    assert [(host.name, host.user, host.n_workers) for host in hosts.hosts] == [
        ("a", "serve", 2),
        ("b", "serve", 3),
    ]


def test_a_profile_counts_from_the_file(tmp_path: Path) -> None:
    """Paths in the file mean the same wherever the command is typed."""
    with pytest.raises(ConfigError, match=str(tmp_path / "mine.json")):
        load_hosts(_written(tmp_path, GOOD + "profile: mine.json\n"))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    """No traceback for a slip of the finger."""
    with pytest.raises(ConfigError, match=r"none\.yaml: expected a file that can be read: No such file"):
        load_hosts(tmp_path / "none.yaml")


def test_bytes_that_are_no_text_are_located(tmp_path: Path) -> None:
    """A file in another encoding is an error with a line."""
    path = tmp_path / "hosts.yaml"
    path.write_bytes(b"router: {host: a}\n# \xff\n")

    with pytest.raises(ConfigError, match=r":2: expected UTF-8, got byte 0xff"):
        load_hosts(path)


def test_what_is_dumped_can_be_read(tmp_path: Path) -> None:
    """Emulated clusters come back as they were, too."""
    text = "router: {host: a}\nemulate: cnn-8gpu-modelled\nsecurity: none\n" + HOSTS
    hosts = load_hosts(_written(tmp_path, text))

    again = load_hosts(_written(tmp_path, dump(hosts)))

    assert isinstance(again, Hosts)
    assert again == hosts
    assert again.hosts[0].gpus_per_worker == 1


def test_a_cluster_of_this_machine_needs_no_pydantic(here: Machine) -> None:
    """`cluster status` without a hosts file does not pay its import."""
    here.base.mkdir()
    code = (
        "import sys, json, cluster.cli\n"
        "try: cluster.cli.cli(['status'])\n"
        "except SystemExit: print(json.dumps([m for m in ('pydantic', 'ruamel.yaml') if m in sys.modules]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=here.env, capture_output=True, text=True, check=True
    )

    assert "no cluster 'default' runs" in done.stderr
    assert json.loads(done.stdout) == []
