"""The engines' own checkers take what is shipped and rendered: helm, promtool, systemd-analyze and more."""

from __future__ import annotations

import itertools
import json
import shutil
import sys
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from cluster.engines import kubernetes, systemd
from cluster.engines.containers import RenderOptions
from tests.cluster.engines.conftest import commands
from tests.cluster.engines.described import ONE_HOST, TWO_HOSTS, TWO_ROUTERS, described, with_keys
from tests.cluster.engines.real import require, run
from tests.paths import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.cluster.engines.real import Tools

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

CHART = ROOT / "deploy" / "chart"
FIRST = {"emulate": "cnn-8gpu-modelled", "security": "none"}

# Each choice once with each other one would be thousands: pairs of what templates branch on.
MATRIX: dict[str, tuple[dict[str, str], ...]] = {
    "served": (
        {"emulate": "cnn-8gpu-modelled", "worker.emulatedGpus": "4"},
        {"supernet": "digits", "worker.gpus": "1", "worker.replicas": "4",
         "worker.runtimeClassName": "nvidia"},
        {"supernet": "dynabert", "profile": "/models/p.json", "weights": "/models/w.safetensors",
         "worker.volumes[0].name": "models", "worker.volumes[0].persistentVolumeClaim.claimName": "models",
         "worker.volumeMounts[0].name": "models", "worker.volumeMounts[0].mountPath": "/models"},
        {"family": "/models/family.yaml", "profile": "/models/p.json",
         "worker.volumes[0].name": "models", "worker.volumes[0].persistentVolumeClaim.claimName": "models",
         "worker.volumeMounts[0].name": "models", "worker.volumeMounts[0].mountPath": "/models"},
    ),
    "joined": (
        {"security": "none"}, {"keys.prefix": "ss", "keys.testSecret": "ss-test"}, {"keys.prefix": "ss"},
    ),
    "scaled": ({}, {"autoscaling.engine": "keda"}, {"autoscaling.engine": "hpa"}),
    "watched": (
        {}, {"podMonitor.enabled": "true", "prometheusRule.enabled": "true", "dashboard.enabled": "true"},
    ),
    "routed": ({}, {"router.replicas": "2", "worker.replicas": "3", "autoscaling.min": "2"}),
    "kept": (
        {}, {"podDisruptionBudget.enabled": "false", "networkPolicy.enabled": "false"},
        {"networkPolicy.clients[0].podSelector.matchLabels.app": "web", "router.nodeSelector.zone": "a",
         "worker.tolerations[0].key": "gpu", "worker.tolerations[0].operator": "Exists", "marginMs": "0.5",
         "router.service.type": "LoadBalancer", "imagePullSecrets[0].name": "registry"},
    ),
}  # fmt: skip


def pairs() -> Iterator[dict[str, str]]:
    """Yield values such that each pair of choices is in one of them."""
    names = list(MATRIX)
    seen: set[tuple[int, int, int, int]] = set()
    for row in itertools.product(*(range(len(MATRIX[name])) for name in names)):
        mine = {(i, row[i], j, row[j]) for i, j in itertools.combinations(range(len(names)), 2)}
        if len(mine - seen) > 2:
            seen |= mine
            yield {
                key: value
                for i, name in zip(row, names, strict=True)
                for key, value in MATRIX[name][i].items()
            }


def options(values: dict[str, str]) -> list[str]:
    """Return values as helm's options."""
    return [word for key, value in values.items() for word in ("--set", f"{key}={value}")]


def template(helm: Path, values: dict[str, str], *more: str) -> str:
    """Return what helm makes of the chart, without its own lines before."""
    words: list[str | Path] = [helm, "template", "ss", CHART, *options(values), *more]
    said = run(words, env={"HOME": str(helm.parent)})
    return said[said.index("---\n") :]


def test_the_chart_is_valid_for_every_pair_of_values(helm: Path, tools: Tools) -> None:
    """Helm's lint passes, and Kubernetes knows every field of what each template becomes."""
    rows = list(pairs())
    assert len(rows) >= 12
    lint: list[str | Path] = [helm, "lint", "--strict", CHART, *options(FIRST)]
    run(lint, env={"HOME": str(helm.parent)})
    tools.validate("---\n".join(template(helm, values) for values in rows))


def test_older_clusters_get_the_versions_that_they_have(helm: Path) -> None:
    """The budget and the autoscaler have had other versions."""
    values = FIRST | {"autoscaling.engine": "hpa"}
    for cluster, wanted in (
        ("1.20.2", {"policy/v1beta1", "autoscaling/v2beta2"}),
        ("1.22.0", {"policy/v1", "autoscaling/v2beta2"}),
        ("1.34.0", {"policy/v1", "autoscaling/v2"}),
    ):
        text = template(helm, values, "--kube-version", cluster)
        versions = {manifest["apiVersion"] for manifest in yaml.safe_load_all(text)}
        assert {each for each in versions if each.startswith(("policy", "autoscaling"))} == wanted


def test_a_familys_workers_are_given_its_file(helm: Path) -> None:
    """Instead of a supernet."""
    values = {"security": "none", "family": "/models/f.yaml", "profile": "/models/p.json"}
    workers = [
        container["args"]
        for manifest in yaml.safe_load_all(template(helm, values))
        for container in manifest.get("spec", {}).get("template", {}).get("spec", {}).get("containers", ())
        if container["name"] == "worker"
    ]

    (args,) = workers
    assert args[args.index("--family") + 1] == "/models/f.yaml"
    assert args[args.index("--profile") + 1] == "/models/p.json"
    assert "--supernet" not in args


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"emulate": "x"}, "security: expected it or keys.prefix"),
        ({"security": "none"}, "supernet: expected it, family or emulate"),
        (FIRST | {"supernet": "digits"}, "supernet: expected it, family or emulate"),
        (FIRST | {"family": "/models/f.yaml"}, "supernet: expected it, family or emulate"),
        ({"security": "none", "family": "/models/f.yaml"}, "profile: expected one with family"),
        (
            {"security": "none", "family": "/f.yaml", "profile": "/p.json", "weights": "random"},
            "weights: exp",
        ),
        (FIRST | {"keys.prefix": "ss"}, "security: expected it or keys.prefix"),
        (FIRST | {"worker.gpus": "1"}, "worker.gpus: expected 0 with emulate"),
        (FIRST | {"worker.gpu": "1"}, "additional properties 'gpu' not allowed"),
        (FIRST | {"worker.replicas": "many"}, "/worker/replicas': got string, want integer"),
        (FIRST | {"router.terminationGracePeriodSeconds": "5"}, "minimum: got 5, want 11"),
        (FIRST | {"router.replicas": "0"}, "minimum: got 0, want 1"),
        (FIRST | {"router.replicas": "2"}, "router.replicas: expected at most the 1 worker(s)"),
        (
            FIRST | {"router.replicas": "3", "worker.replicas": "9", "autoscaling.engine": "keda"},
            "router.replicas: expected at most the 1 worker(s)",
        ),
        (FIRST | {"autoscaling.min": "9"}, "autoscaling.min: expected at most autoscaling.max"),
    ],
)
def test_wrong_values_are_refused_by_name(helm: Path, values: dict[str, str], expected: str) -> None:
    """Misspelt, of the wrong kind, or against each other."""
    words: list[str | Path] = [helm, "template", "ss", CHART, *options(values)]
    assert expected in run(words, env={"HOME": str(helm.parent)}, fails=True)


def test_the_chart_and_the_renderer_make_the_same_pods(helm: Path, tmp_path: Path) -> None:
    """But for names, labels and how long pods may take to end, which values say."""
    text = "cluster: ss-superserve\n" + ONE_HOST.replace("name: a", "name: pool").replace(
        "host: a", "host: pool"
    )
    two = text.replace("router: {host: pool}", "routers: [{host: pool}, {host: more}]").replace(
        "workers: 2}]", "workers: 2}, {name: more, workers: 0}]"
    )
    for keyed, n in ((False, 1), (True, 1), (False, 2)):
        folder = tmp_path / f"{keyed}-{n}"
        folder.mkdir()
        said = text if n == 1 else two
        description = with_keys(folder, said) if keyed else described(folder, said)
        (rendered, *_) = kubernetes.render(description, RenderOptions("superserve:0.1.0"))
        values = {"emulate": FIRST["emulate"], "worker.replicas": "2", "router.replicas": str(n)}
        values |= {"keys.prefix": "ss-superserve", "keys.worker": "pool"} if keyed else {"security": "none"}
        ours, charts = (_pods(each) for each in (rendered.text, template(helm, values)))
        assert ours == charts


def test_what_is_listed_and_asked_follows_the_number_of_routers(helm: Path) -> None:
    """One has none to name; of several, clients, workers, autoscalers and `helm test` know each pod."""
    values = FIRST | {"worker.replicas": "3", "autoscaling.engine": "hpa", "autoscaling.min": "3"}
    texts = [template(helm, values | {"router.replicas": n}) for n in ("1", "3")]
    found = [{each["kind"]: each for each in yaml.safe_load_all(text)} for text in texts]
    listed = [
        json.loads(each["data"]["routers.json"])["routers"]
        for text in texts
        for each in yaml.safe_load_all(text)
        if each["kind"] == "ConfigMap"
    ]
    pods = [f"ss-superserve-router-{i}" for i in range(3)]

    assert listed[0] == []
    assert [each["client"] for each in listed[1]] == [
        f"tcp://{pod}.ss-superserve-router.default:5555" for pod in pods
    ]
    assert found[0]["StatefulSet"]["spec"]["template"] == found[1]["StatefulSet"]["spec"]["template"]
    assert found[0]["Deployment"] == found[1]["Deployment"]
    for n, each in zip((1, 3), found, strict=True):
        (metric,) = each["HorizontalPodAutoscaler"]["spec"]["metrics"]
        (of_pods,) = metric["external"]["metric"]["selector"]["matchExpressions"]
        assert of_pods == {"key": "pod", "operator": "In", "values": pods[:n]}
        (asks,) = each["Pod"]["spec"]["initContainers"]
        assert asks["args"][2:] == pods[:n]


def _pods(manifests: str) -> dict[str, Any]:
    """Return the specification of each role's pods, in a form that compares."""
    found = {}
    for manifest in yaml.safe_load_all(manifests):
        if manifest["kind"] not in ("StatefulSet", "Deployment"):
            continue
        spec = manifest["spec"]["template"]["spec"]
        del spec["terminationGracePeriodSeconds"]
        (container,) = spec["containers"]
        container["args"] = sorted(container["args"])
        del container["resources"]
        for constraint in spec.get("topologySpreadConstraints", ()):
            assert constraint.pop("labelSelector")["matchLabels"].items() <= (
                manifest["spec"]["template"]["metadata"]["labels"].items()
            )
        found[container["name"]] = {
            **spec, "replicas": manifest["spec"]["replicas"], "strategy": manifest["spec"].get("strategy"),
        }  # fmt: skip
    return found


def test_the_scaled_object_asks_for_what_a_router_exports(helm: Path, tmp_path: Path) -> None:
    """Its query is Prometheus's, and its target is the Deployment, which then has no number of its own."""
    require("promtool")
    manifests = {
        manifest["kind"]: manifest
        for manifest in yaml.safe_load_all(template(helm, FIRST | {"autoscaling.engine": "keda"}))
    }
    scaled = manifests["ScaledObject"]["spec"]
    (trigger,) = scaled["triggers"]

    assert scaled["scaleTargetRef"]["name"] == manifests["Deployment"]["metadata"]["name"]
    assert "replicas" not in manifests["Deployment"]["spec"]
    assert (
        'superserve_router_workers_needed{namespace="default",pod=~"ss-superserve-router-[0-9]+"}'
        in (trigger["metadata"]["query"])
    )
    rule = {"groups": [{"name": "q", "rules": [{"record": "q", "expr": trigger["metadata"]["query"]}]}]}
    (tmp_path / "rule.yaml").write_text(yaml.safe_dump(rule))
    run(["promtool", "check", "rules", tmp_path / "rule.yaml"])


def test_helm_on_the_page_takes_its_options(helm: Path, tools: Tools) -> None:
    """What is shown for `helm install` is a chart that Kubernetes takes."""
    (line,) = (line for line in commands("helm") if line.startswith("helm install"))
    words: list[str | Path] = [helm, "template", *line.split()[2:]]
    said = run(words, env={"HOME": str(helm.parent)})
    text = said[said.index("---\n") :]
    tools.validate(text)
    assert "nvidia.com/gpu: 1" in text
    assert "replicas: 4" in text


def test_rendered_manifests_are_valid(tools: Tools, tmp_path: Path) -> None:
    """With keys and without, strictly; and the keys that are piped to kubectl."""
    (tmp_path / "keyed").mkdir()
    for description in (
        described(tmp_path, TWO_ROUTERS),
        described(tmp_path, TWO_HOSTS),
        with_keys(tmp_path / "keyed", TWO_HOSTS),
    ):
        for file in kubernetes.render(description, RenderOptions()):
            tools.validate(file.text)
    (line,) = (line for line in commands("helm") if "| kubectl apply" in line)
    words = line.partition(" | ")[0].split()
    tools.validate(run([sys.executable, "-P", "-m", *words], cwd=tmp_path / "keyed"))


def test_systemd_takes_the_units(tmp_path: Path) -> None:
    """Verified as units, and judged as confined; nothing here boots with systemd, so that none is started."""
    require("systemd-analyze")
    text = TWO_HOSTS.replace("name: a,", f"name: a, python: {sys.executable},").replace(
        "name: b,", f"name: b, python: {sys.executable},"
    )
    for file in systemd.render(with_keys(tmp_path, text), RenderOptions()):
        path = tmp_path / "units" / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(file.text)
    for host in "ab":
        units = sorted((tmp_path / "units" / host).glob("superserve*.*"))
        assert len(units) == 3
        said = run(["systemd-analyze", "verify", "--man=no", *units])
        # Of the machine: it has no such targets where systemd does not boot it.
        assert "superserve" not in said, said
        for unit in units:
            if unit.suffix == ".service":
                run(["systemd-analyze", "security", "--offline=yes", "--threshold=30", unit])


def test_prometheus_takes_the_rules_and_the_configuration(tmp_path: Path) -> None:
    """Those that are shipped, where the compose file mounts them."""
    require("promtool")
    alerts = ROOT / "cluster/dashboards/alerts.yml"
    run(["promtool", "check", "rules", alerts])
    shutil.copy(alerts, tmp_path)
    shutil.copy(ROOT / "deploy/monitoring/prometheus.yml", tmp_path)
    run(["promtool", "check", "config", tmp_path / "prometheus.yml"])
