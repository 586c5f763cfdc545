"""Requests that schemathesis makes from the gateway's description: `python -m tests.gateway.cases --cases N`.

Half of them keep to the description, half break it. None may be answered with 500, hang, or get an answer
that the description does not list; and the gateway serves a proper query after them.
"""

from __future__ import annotations

import collections
import contextlib
import time
import urllib.request
from typing import TYPE_CHECKING, Any

import click
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode

from superserve.roles.processes import ProcessGroup

if TYPE_CHECKING:
    from collections.abc import Iterator

TIMEOUT_S = 20.0
"""An answer that takes longer is a hang."""
_UNSENDABLE = (requests.exceptions.InvalidHeader, requests.exceptions.InvalidURL, UnicodeError)


@contextlib.contextmanager
def emulated_gateway() -> Iterator[str]:
    """Serve emulated GPUs behind a gateway, under the model's name in the description's examples."""
    with ProcessGroup() as group:
        router = group.start("router", ["-m", "router"])
        group.wait_ready(30)
        group.start(
            "worker",
            ["-m", "gpu_worker", "--connect", router.ready["worker"], "--emulate", "cnn-8gpu-modelled",
             "--gpus", "4"],
        )  # fmt: skip
        gateway = group.start(
            "gateway",
            ["-m", "gateway", "--connect", router.ready["client"], "--http-port", "0", "--model", "m",
             "--default-slo-ms", "1000"],
        )  # fmt: skip
        group.wait_ready(30)
        url = gateway.ready["http"]
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/v2/health/ready", timeout=5):
                break
            time.sleep(0.05)
        yield url


def served_well(url: str) -> bool:
    """Return whether a proper query gets its answer."""
    tensor: Any = {"name": "input", "shape": [1], "datatype": "BYTES", "data": ["x"]}
    answer = requests.post(f"{url}/v2/models/m/infer", json={"inputs": [tensor]}, timeout=TIMEOUT_S)
    return answer.status_code == 200


class Judge:
    """Sends cases, and keeps what went wrong.

    Args:
        url: The gateway's.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._session = requests.Session()
        self.statuses: collections.Counter[int] = collections.Counter()
        self.failures: list[str] = []

    def send(self, case: Any) -> None:
        """Send one case, and judge its answer."""
        if "model" in (case.path_parameters or {}) and len(str(case.path_parameters["model"])) % 4:
            case.path_parameters["model"] = "m"  # most requests reach what lies behind the name
            if "version" in case.path_parameters:
                case.path_parameters["version"] = "1"
        try:
            answer = case.call(base_url=self._url, session=self._session, timeout=TIMEOUT_S)
        except _UNSENDABLE:
            self.statuses[0] += 1
            return
        except requests.RequestException as error:
            self.failures.append(f"{case.method} {case.formatted_path}: {error!r:.300}")
            return
        self.statuses[answer.status_code] += 1
        listed = {int(status) for status in case.operation.definition.raw.get("responses", {})}
        if answer.status_code == 500 or answer.status_code not in {*listed, 404}:
            self.failures.append(
                f"{case.method} {case.formatted_path}: {answer.status_code} {answer.text:.300}"
            )


def run(url: str, cases: int, only: str = "") -> Judge:
    """Send about this many cases, half of them malformed, to the operations whose path ends with `only`."""
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    found: Any = schema.get_all_operations()
    operations = [one for one in (each.ok() for each in found) if one.path.endswith(only)]
    judge = Judge(url)
    # Inference has most of what can be wrong: it gets half of all cases.
    weights = [len(operations) if one.path.endswith("/infer") else 2 for one in operations]
    for operation, weight in zip(operations, weights, strict=True):
        n = max(cases * weight // sum(weights) // 2, 1)
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            _send(judge, operation, mode, n)
    return judge


def _send(judge: Judge, operation: Any, mode: GenerationMode, n: int) -> None:
    strategy = operation.as_strategy(generation_mode=mode)

    @settings(
        max_examples=n, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(case=strategy)
    def send(case: Any) -> None:
        judge.send(case)

    with contextlib.suppress(Unsatisfiable):  # a path without parameters has nothing to break
        send()


@click.command()
@click.option("--cases", default=10_000, show_default=True, help="Requests to send, about.")
def main(cases: int) -> None:
    """Send requests made from the gateway's description; exit 1 if one is answered as none should be."""
    with emulated_gateway() as url:
        judge = run(url, cases)
        is_well = served_well(url)
    for failure in judge.failures[:20]:
        click.echo(failure)
    by_status = ", ".join(f"{status}: {n}" for status, n in sorted(judge.statuses.items()))
    click.echo(f"{sum(judge.statuses.values())} requests ({by_status}); {len(judge.failures)} failures")
    if judge.failures or not is_well:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
