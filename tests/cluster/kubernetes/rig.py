"""A Kubernetes of two nodes for a test: the API, controllers and scheduler beside the operator.

Each node is a network namespace, and a namespace of processes and mounts: once its first process is killed,
nothing of it is left. In it run containerd, kubelet and kube-proxy. Pods have addresses of their own, routed
between the nodes. What this leaves out of a real one: TLS is not verified, and everyone may do everything.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

from tests.cluster.engines import runc_without_rlimits
from tests.cluster.kubernetes import names
from tests.e2e.netns import net

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.e2e.netns import Net

NODES = ("n1", "n2")
_OP = "10.77.0.100"
_PROGRAMS = ("etcd", "containerd", "runc", "iptables", "nsenter", "unshare", "openssl")
_PLUGINS = "/usr/lib/cni"
_WAIT_S = 240.0  # until nodes are ready, on a busy machine
PAUSE = "localhost/pause:1"

_NODE = """\
set -e
mount --make-rprivate /
mount -t tmpfs tmpfs /run
mkdir -p /run/netns /run/lock {node}/log /var/log/pods /var/log/containers
mount -t tmpfs tmpfs /var/log
mkdir -p /var/log/pods /var/log/containers
echo 1 > /proc/sys/net/ipv4/ip_forward
{routes}
containerd --config {node}/containerd.toml > {node}/log/containerd 2>&1 &
until ctr --address {node}/c.sock version > /dev/null 2>&1; do sleep 0.2; done
ctr --address {node}/c.sock --namespace k8s.io images import {image} > {node}/log/import 2>&1
{bin}/kube-proxy --kubeconfig={kubeconfig} --hostname-override={name} --proxy-mode=iptables \\
  --cluster-cidr=10.79.0.0/16 --masquerade-all --conntrack-max-per-core=0 \\
  --conntrack-tcp-timeout-established=0 --conntrack-tcp-timeout-close-wait=0 > {node}/log/kube-proxy 2>&1 &
{bin}/kubelet --kubeconfig={kubeconfig} --hostname-override={name} --node-ip={address} \\
  --root-dir={node}/kubelet --cert-dir={node}/pki --volume-plugin-dir={node}/plugins \\
  --container-runtime=remote \\
  --container-runtime-endpoint=unix://{node}/c.sock --cgroup-driver=cgroupfs --cgroups-per-qos=false \\
  --enforce-node-allocatable= --fail-swap-on=false --eviction-hard= --image-gc-high-threshold=100 \\
  --make-iptables-util-chains=false --cluster-dns={op} --cluster-domain=cluster.local --read-only-port=0 \\
  --healthz-port=0 --resolv-conf= --node-status-update-frequency=2s --authorization-mode=AlwaysAllow \\
  --anonymous-auth=true > {node}/log/kubelet 2>&1 &
wait
"""
_CONTAINERD = """\
version = 2
root = "{node}/containerd"
state = "{node}/state"
[grpc]
  address = "{node}/c.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{pause}"
  restrict_oom_score_adj = true
  disable_apparmor = true
  disable_hugetlb_controller = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{plugins}"
    conf_dir = "{node}/cni"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
      BinaryName = "{runtime}"
"""


def why_not(cache: Path) -> str:
    """Return why this machine cannot have one; "" if it can."""
    lacking = [
        name for name in _PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None
    ]
    if lacking:
        return f"{', '.join(lacking)}: not installed"
    return "" if (cache / "bin" / "kube-apiserver").exists() else f"{cache}/bin has no kube-apiserver"


class Kubernetes:
    """A cluster; commands are the operator's.

    Args:
        here: The hosts.
        programs: The folder with Kubernetes' programs, kubectl and helm.
        image: An archive of images: that of the roles, and `PAUSE`.

    Attributes:
        net: The hosts.
    """

    def __init__(self, here: Net, programs: Path, image: Path) -> None:
        self.net = here
        self._bin, self._image = programs, image
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._folder = here.folder / "kubernetes"
        self._kubeconfig = self._folder / "config"
        here.env |= {
            "KUBECONFIG": str(self._kubeconfig),
            "PATH": f"{programs}:{os.environ['PATH']}:/usr/sbin",
        }
        here.env["HOME"] = str(self._folder)

    def open(self) -> None:
        """Start everything; return when every node takes pods."""
        self._folder.mkdir(mode=0o755)
        self.net.folder.chmod(0o755)
        self._configure()
        folder, at = self._folder, f"--kubeconfig={self._kubeconfig}"
        self._start(
            "etcd", "etcd", f"--data-dir={folder}/etcd", "--listen-client-urls=http://127.0.0.1:2379",
            "--advertise-client-urls=http://127.0.0.1:2379", "--listen-peer-urls=http://127.0.0.1:2380",
        )  # fmt: skip
        self._start(
            "apiserver", f"{self._bin}/kube-apiserver", "--etcd-servers=http://127.0.0.1:2379",
            f"--cert-dir={folder}/pki", f"--bind-address={_OP}", f"--advertise-address={_OP}",
            "--secure-port=6443", f"--token-auth-file={folder}/tokens", "--authorization-mode=AlwaysAllow",
            "--service-cluster-ip-range=10.96.0.0/24", "--allow-privileged",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-signing-key-file={folder}/sa.key",
            f"--service-account-key-file={folder}/sa.key",
            "--disable-admission-plugins=ServiceAccount", "--kubelet-preferred-address-types=InternalIP",
        )  # fmt: skip
        self._until(lambda: self._asked("get", "--raw", "/readyz")[0] == 0, "the API")
        self._start(
            "controllers", f"{self._bin}/kube-controller-manager", at, "--leader-elect=false",
            f"--service-account-private-key-file={folder}/sa.key", "--node-monitor-period=2s",
            "--node-monitor-grace-period=12s",
        )  # fmt: skip
        self._start("scheduler", f"{self._bin}/kube-scheduler", at, "--leader-elect=false")
        self._start("names", sys.executable, names.__file__, _OP, str(self._kubeconfig))
        self._start(
            "proxy", f"{self._bin}/kube-proxy", at, "--hostname-override=op", "--proxy-mode=iptables",
            f"--bind-address={_OP}",
            "--masquerade-all", "--conntrack-max-per-core=0", "--conntrack-tcp-timeout-established=0",
            "--conntrack-tcp-timeout-close-wait=0",
        )  # fmt: skip
        for node in NODES:
            self._node(node)
        self._until(lambda: len(self.ready_nodes()) == len(NODES), "its nodes")

    def close(self) -> None:
        """End every daemon, the nodes first."""
        for daemon in reversed(self._daemons):
            daemon.kill()
            daemon.wait()

    # --- commands -----------------------------------------------------------------------------

    def call(self, *argv: str) -> str:
        """Run a command as the operator, which must succeed; return what it printed."""
        code, output = self.net.run(*argv)
        assert code == 0, f"{argv}\n{output}"
        return output

    def get(self, *words: str) -> Any:
        """Return what `kubectl get` prints as JSON."""
        return json.loads(self.call("kubectl", "get", *words, "--output=json"))

    def ready_nodes(self) -> list[str]:
        """Return the nodes that take pods."""
        code, output = self._asked("get", "nodes", "--no-headers")
        lines = [line.split() for line in output.splitlines()] if code == 0 else []
        return [words[0] for words in lines if words[1:2] == ["Ready"]]

    def address(self, service: str) -> str:
        """Return a Service's address."""
        return str(self.get("service", service)["spec"]["clusterIP"])

    def logs(self) -> str:
        """Return the end of every daemon's log, for an error."""
        paths = [*self._folder.glob("*.log"), *self.net.folder.glob("node-*/log/*")]
        return "\n".join(f"== {path}\n{path.read_text(errors='replace')[-1_500:]}" for path in sorted(paths))

    # --- steps --------------------------------------------------------------------------------

    def _asked(self, *words: str) -> tuple[int, str]:
        return self.net.run("kubectl", *words)

    def _until(self, condition: Callable[[], bool], what: str) -> None:
        give_up_s = time.monotonic() + _WAIT_S
        while not condition():
            assert time.monotonic() < give_up_s, f"{what}: not ready within {_WAIT_S:g} s\n{self.logs()}"
            time.sleep(0.5)

    def _configure(self) -> None:
        token = secrets.token_hex(16)
        (self._folder / "tokens").write_text(f"{token},admin,admin,system:masters\n")
        subprocess.run(
            ["openssl", "genrsa", "-out", str(self._folder / "sa.key"), "2048"],
            check=True,
            capture_output=True,
        )
        cluster = {"server": f"https://{_OP}:6443", "insecure-skip-tls-verify": True}
        self._kubeconfig.write_text(
            json.dumps(
                {
                    "apiVersion": "v1", "kind": "Config", "current-context": "rig",
                    "clusters": [{"name": "rig", "cluster": cluster}],
                    "users": [{"name": "admin", "user": {"token": token}}],
                    "contexts": [{"name": "rig", "context": {"cluster": "rig", "user": "admin"}}],
                }
            )
        )  # fmt: skip
        runtime = self._folder / "runc"
        runtime.write_text(f'#!/bin/sh\nexec {sys.executable} {runc_without_rlimits.__file__} "$@"\n')
        runtime.chmod(0o755)
        # Without a route no packet is sent, and so none is sent on to a pod.
        self.call("ip", "route", "add", "10.96.0.0/24", "dev", "br0")
        for i in range(len(NODES)):
            self.call("ip", "route", "add", f"10.79.{i + 1}.0/24", "via", self.net.address(NODES[i]))

    def _node(self, name: str) -> None:
        i = NODES.index(name)
        node = self.net.folder / f"node-{name}"
        (node / "cni").mkdir(parents=True)
        (node / "log").mkdir()
        bridge = {
            "cniVersion": "0.3.1", "name": "pods", "type": "bridge", "bridge": "cni0", "isGateway": True,
            "ipam": {
                "type": "host-local", "dataDir": f"{node}/ipam", "routes": [{"dst": "0.0.0.0/0"}],
                "ranges": [[{"subnet": f"10.79.{i + 1}.0/24"}]],
            },
        }  # fmt: skip
        (node / "cni" / "10-pods.conf").write_text(json.dumps(bridge))
        fields = {"node": node, "pause": PAUSE, "plugins": _PLUGINS, "runtime": self._folder / "runc"}
        (node / "containerd.toml").write_text(_CONTAINERD.format(**fields))
        routes = "\n".join(
            f"ip route add 10.79.{j + 1}.0/24 via {self.net.address(other)}"
            for j, other in enumerate(NODES)
            if other != name
        )
        # Services are reached through this node, pods of others too.
        routes += f"\nip route add default via {_OP}"
        script = _NODE.format(
            node=node, routes=routes, image=self._image, bin=self._bin, kubeconfig=self._kubeconfig,
            name=name, address=self.net.address(name), op=_OP,
        )  # fmt: skip
        argv = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", script)
        self._start(f"node-{name}", *argv, host=name)

    def _start(self, name: str, *argv: str, host: str = "op") -> None:
        enter = ("nsenter", f"--net=/run/netns/{self.net.namespace(host)}")
        with (self._folder / f"{name}.log").open("ab") as log:
            self._daemons.append(
                subprocess.Popen(
                    [*enter, *argv], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                    env={**os.environ, **self.net.env},
                )
            )  # fmt: skip


@contextlib.contextmanager
def kubernetes(programs: Path, image: Path) -> Iterator[Kubernetes]:
    """Give a cluster of two nodes; nothing of it is left."""
    with net(*NODES) as here:
        cluster = Kubernetes(here, programs, image)
        try:
            cluster.open()
            yield cluster
        finally:
            cluster.close()
