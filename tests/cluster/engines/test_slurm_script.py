"""The heterogeneous job that `cluster render slurm` prints."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest

from cluster.engines.describe import describe
from cluster.engines.slurm_script import MOST_COMPONENTS, render
from cluster.spec.hostkeys import complete
from cluster.spec.hosts import load_hosts
from superserve.errors import ConfigError
from superserve.net.keys import make_ring

if TYPE_CHECKING:
    from pathlib import Path

FILE = """\
router: {host: a}
supernet: digits
security: none
hosts:
  - {name: a, gpus: [0, 1], env: {WORDS: "it's two"}}
  - {name: b, workers: 1, device: cpu}
"""


def _rendered(folder: Path, text: str) -> str:
    path = folder / "hosts.yaml"
    path.write_text(text)
    return render(describe(path))


def test_each_worker_is_a_component_with_its_gpu(tmp_path: Path) -> None:
    """The router is the first; a shell can read it all."""
    text = _rendered(tmp_path, FILE)

    head, *components = text.partition("\nset -eu")[0].split("#SBATCH hetjob\n")
    assert "#SBATCH --requeue" in head
    assert "#SBATCH --signal=B:TERM@60" in head
    assert [part.count("--gres=gpu:1") for part in components] == [1, 1, 0]
    assert (
        "keep 2 env 'WORDS=it'\"'\"'s two' python3 -P -m gpu_worker --connect \"tcp://${router0}:5556\""
        in text
    )
    assert "--name worker-a-1" in text
    assert text.count("--device cuda:0") == 2
    assert "--device cpu" in text
    done = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_several_routers_are_components_that_may_share_a_node(tmp_path: Path) -> None:
    """Each has ports of its own, and the job writes where they are; they drain before the workers."""
    text = _rendered(tmp_path, FILE.replace("router: {host: a}", "routers: [{host: a}, {host: b}]"))

    head = text.partition("\nset -eu")[0]
    assert head.count("#SBATCH hetjob") == 1 + 3
    assert '"client": "tcp://${router1}:5557", "worker": "tcp://${router1}:5558"' in text
    assert "keep 1 python3 -P -m router --client-endpoint tcp://0.0.0.0:5557" in text
    assert '--connect "tcp://${router0}:5556,tcp://${router1}:5558" --name worker-a-0' in text
    assert '--connect "tcp://${router1}:5558,tcp://${router0}:5556" --name worker-a-1' in text
    assert "for component in 0 1; do scancel" in text
    done = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_keys_are_links_and_no_secret_is_printed(tmp_path: Path) -> None:
    """Each role's folder leads to its own keys."""
    keys = tmp_path / "keys"
    make_ring(keys)
    text = FILE.replace("security: none", "keys: keys")
    path = tmp_path / "hosts.yaml"
    path.write_text(text)
    complete(load_hosts(path))

    text = render(describe(path))

    assert f'ln -sfn {keys} "$folder/router/keys"' in text
    assert f'ln -sf {keys}/workers/b.key "$folder/worker-b/keys/worker.key"' in text
    assert '--keys "${folder}/worker-b/keys/worker.key"' in text
    secrets = [line for path in keys.rglob("*.key") for line in path.read_text().split() if len(line) > 30]
    assert secrets
    assert not any(secret in text for secret in secrets)


def test_more_workers_than_components_are_refused(tmp_path: Path) -> None:
    """By file and line, with what to do instead."""
    text = (
        f"router: {{host: a}}\nemulate: cnn-8gpu-modelled\nhosts: [{{name: a, workers: {MOST_COMPONENTS}}}]\n"
    )

    with pytest.raises(ConfigError, match=r"hosts\.yaml:3: hosts: expected at most 127 workers"):
        _rendered(tmp_path, text)
