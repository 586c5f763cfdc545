"""A gateway's processes: several on one port, one that dies, a restart under load, and TLS."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import resource
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Any

import psutil  # type: ignore[import-untyped]  # it ships no types
import pytest

from gateway.serve.metrics import METRICS
from superserve.roles.processes import ProcessGroup
from tests.gateway.cases import emulated_gateway, run, served_well
from tests.metrics import exported

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from superserve.roles.processes import RoleProcess

pytestmark = pytest.mark.e2e

BODY = json.dumps({"inputs": [{"name": "input", "shape": [1], "datatype": "BYTES", "data": ["x"]}]}).encode()
INFER = "/v2/models/ofa-resnet50/infer"
SLO = {"superserve-slo-ms": "5000"}


@pytest.fixture(scope="module")
def router() -> Iterator[str]:
    """Serve emulated GPUs."""
    with ProcessGroup() as group:
        one = group.start("router", ["-m", "router"])
        group.wait_ready(30)
        group.start(
            "worker",
            [
                "-m",
                "gpu_worker",
                "--connect",
                one.ready["worker"],
                "--emulate",
                "cnn-8gpu-modelled",
                "--gpus",
                "4",
            ],
        )
        group.wait_ready(30)
        yield one.ready["client"]


@contextlib.contextmanager
def gateway(router: str, *options: str) -> Iterator[RoleProcess]:
    """Start a gateway on a port of its choice."""
    with ProcessGroup() as group:
        one = group.start("gateway", ["-m", "gateway", "--connect", router, "--http-port", "0", *options])
        group.wait_ready(30)
        yield one


def wait_for(is_so: Any, what: str) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def status(
    url: str, data: bytes | None = None, context: ssl.SSLContext | None = None, slo_ms: str = ""
) -> int:
    """Return the status of one request."""
    request = urllib.request.Request(url, data, {"superserve-slo-ms": slo_ms} if slo_ms else {})
    try:
        with urllib.request.urlopen(request, timeout=20, context=context) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def serving(one: RoleProcess) -> list[psutil.Process]:
    """Return the processes that serve."""
    return [child for child in psutil.Process(one.pid).children() if "process" in child.cmdline()]


def scraped(one: RoleProcess) -> dict[str, float]:
    """Return the metrics."""
    with urllib.request.urlopen(f"http://{one.ready['metrics']}/metrics", timeout=20) as page:
        lines = page.read().decode().splitlines()
    return {
        line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")
    }


def test_a_process_that_dies_is_replaced(router: str) -> None:
    """The others serve meanwhile; counts stay; every name is exported."""
    with gateway(router, "--http-processes", "2", "--metrics-port", "0") as one:
        url = one.ready["http"]
        wait_for(lambda: status(url + "/v2/health/ready") == 200, "ready")
        for _ in range(8):
            assert status(url + INFER, BODY, slo_ms="5000") == 200
        counted = 'superserve_gateway_inferences_total{protocol="http"}'
        assert scraped(one)[counted] == 8
        before = serving(one)
        assert len(before) == 2
        before[0].kill()
        wait_for(lambda: scraped(one)["superserve_gateway_restarts_total"] == 1, "restarted")
        wait_for(
            lambda: scraped(one)['superserve_gateway_connected_processes{protocol="http"}'] == 2, "connected"
        )
        assert scraped(one)[counted] == 8
        found = {name.partition("{")[0] for name in scraped(one)}
        assert {name for metric in METRICS for name in exported(metric)} <= found


@pytest.mark.slow
def test_a_restart_under_load_fails_no_request(router: str) -> None:
    """A second gateway takes the port while the first drains; callers on kept connections see no error."""
    failures: list[str] = []
    done = [0]
    ending = threading.Event()

    def call(port: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        while not ending.is_set():
            try:
                connection.request("POST", INFER, BODY, SLO)
                answer = connection.getresponse()
                answer.read()
                if answer.status != 200:
                    failures.append(str(answer.status))
                done[0] += 1
            except OSError as error:
                failures.append(repr(error))
                connection.close()
        connection.close()

    with ProcessGroup() as group:
        old = group.start("old", ["-m", "gateway", "--connect", router, "--http-port", "0"])
        group.wait_ready(30)
        port = old.ready["http"].rpartition(":")[2]
        wait_for(lambda: status(f"http://127.0.0.1:{port}/v2/health/ready") == 200, "ready")
        callers = [threading.Thread(target=call, args=(int(port),)) for _ in range(4)]
        for caller in callers:
            caller.start()
        wait_for(lambda: done[0] > 50, "load")
        new = group.start("new", ["-m", "gateway", "--connect", router, "--http-port", port])
        group.wait_ready(30)
        assert old.stop(20) == 0
        so_far = done[0]
        wait_for(lambda: done[0] > so_far + 50 or failures, "the new one serves")
        ending.set()
        for caller in callers:
            caller.join()
        assert new.poll() is None
    assert failures == []


def test_nothing_is_left_behind(router: str) -> None:
    """A gateway that is killed takes its processes along."""
    with gateway(router, "--http-processes", "2", "--grpc-port", "0") as one:
        children = serving(one)
        assert len(children) == 3
        os.kill(one.pid, signal.SIGKILL)
        _, alive = psutil.wait_procs(children, timeout=10)
        assert not alive


def _openssl(*words: str) -> None:
    subprocess.run(["openssl", *words], check=True, capture_output=True)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with an authority, a server's certificate, and one of the caller `search`."""
    folder = tmp_path_factory.mktemp("keys")
    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2")
    _openssl(
        "req",
        "-x509",
        *curve,
        "-subj",
        "/CN=test authority",
        "-keyout",
        f"{folder}/ca.key",
        "-out",
        f"{folder}/ca.pem",
    )
    for name, subject in (("server", "/CN=localhost"), ("search", "/CN=search")):
        _openssl("req", *curve[:-2], "-subj", subject, "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1",
                 "-keyout", f"{folder}/{name}.key", "-out", f"{folder}/{name}.csr")  # fmt: skip
        _openssl("x509", "-req", "-in", f"{folder}/{name}.csr", "-CA", f"{folder}/ca.pem",
                 "-CAkey", f"{folder}/ca.key", "-days", "2", "-copy_extensions", "copy",
                 "-out", f"{folder}/{name}.pem")  # fmt: skip
    return folder


@pytest.mark.slow
def test_tls_tokens_and_certificates(router: str, keys: Path, tmp_path: Path) -> None:
    """Without a certificate of the authority no request gets through; then a name decides, over gRPC too."""
    callers = tmp_path / "callers"
    callers.write_text("search cert:search\n")
    tls = (
        "--tls-cert",
        f"{keys}/server.pem",
        "--tls-key",
        f"{keys}/server.key",
        "--client-ca",
        f"{keys}/ca.pem",
    )
    with gateway(router, *tls, "--callers", str(callers), "--grpc-port", "0") as one:
        url = one.ready["http"]
        assert url.startswith("https://")
        known = ssl.create_default_context(cafile=f"{keys}/ca.pem")
        with pytest.raises((urllib.error.URLError, ConnectionError)):
            status(url + "/v2", context=known)
        known.load_cert_chain(f"{keys}/search.pem", f"{keys}/search.key")
        wait_for(lambda: status(url + "/v2/health/ready", context=known) == 200, "ready")
        assert status(url + INFER, BODY, known, "5000") == 200
        stranger = ssl.create_default_context(cafile=f"{keys}/ca.pem")
        stranger.load_cert_chain(f"{keys}/server.pem", f"{keys}/server.key")
        assert status(url + "/v2", context=stranger) == 401
        _check_grpc(one.ready["grpc"], keys)


def _check_grpc(where: str, keys: Path) -> None:
    from tritonclient.grpc import InferenceServerClient  # noqa: PLC0415
    from tritonclient.utils import InferenceServerException  # noqa: PLC0415

    def client(name: str) -> Any:
        return InferenceServerClient(
            where, ssl=True, root_certificates=f"{keys}/ca.pem", private_key=f"{keys}/{name}.key",
            certificate_chain=f"{keys}/{name}.pem",
        )  # fmt: skip

    with client("search") as known:
        assert known.get_server_metadata().name == "superserve"
    with client("server") as stranger:
        assert stranger.is_server_live()
        with pytest.raises(InferenceServerException, match="bearer token"):
            stranger.get_server_metadata()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--address", "0.0.0.0"), "--callers"),
        (("--callers", "/dev/null"), "at least one caller"),
        (("--no-http",), "at least one of them"),
        (("--address", "203.0.113.1", "--security", "none"), "cannot listen"),
    ],
)
def test_what_cannot_be_served_is_one_line(options: tuple[str, ...], words: str) -> None:
    """Bad options end with a sentence, not with a traceback."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "gateway", "--connect", "tcp://127.0.0.1:1", "--http-port", "0",
         *options],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert words in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_without_a_router_it_says_so_and_waits() -> None:
    """It lives, is not ready, and answers 503; a router that comes later is found."""
    with ProcessGroup() as group:
        first = group.start("probe", ["-m", "router"])
        group.wait_ready(30)
        client = first.ready["client"]
        first.stop()
    with gateway(client) as one:
        url = one.ready["http"]
        assert status(url + "/v2/health/live") == 200
        assert status(url + "/v2/health/ready") == 503
        assert status(url + INFER, BODY, slo_ms="5000") == 503


@pytest.mark.slow
def test_no_request_made_from_the_description_breaks_it() -> None:
    """As `python -m tests.gateway.cases` does with ten thousand."""
    with emulated_gateway() as url:
        judge = run(url, 30, "models/{model}/infer")
        assert judge.failures == []
        assert judge.statuses[400]
        assert served_well(url)


@pytest.mark.slow
def test_ten_thousand_idle_connections_cost_little(router: str) -> None:
    """They are held, queries are answered meanwhile, and a connection costs a few kilobytes."""
    n = min(10_000, _room())
    with gateway(router) as one:
        url = one.ready["http"]
        port = int(url.rpartition(":")[2])
        wait_for(lambda: status(url + "/v2/health/ready") == 200, "ready")
        (process,) = serving(one)
        before = process.memory_info().rss
        with contextlib.ExitStack() as stack:
            for _ in range(n):
                stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            assert status(url + INFER, BODY, slo_ms="5000") == 200
            wait_for(lambda: process.num_fds() >= n, "accepted")
            assert (process.memory_info().rss - before) / n < 20_000
            assert status(url + INFER, BODY, slo_ms="5000") == 200


def _room() -> int:
    """Return how many connections this process may open, after raising its limit of files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard - 200
