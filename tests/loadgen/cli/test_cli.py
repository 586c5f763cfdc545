"""Wrong input to any command: one clear line, an exit code, no traceback, and nothing started."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson
import pytest
from click.testing import CliRunner

from gpu_worker.cli import cli as gpu_worker
from loadgen.cli import cli as loadgen
from loadgen.results.result import load_run
from profiles.cli import cli as profiles
from profiles.table import load_profile
from router.cli import cli as router
from superserve.roles.local import STATE_VARIABLE
from tests.superserve.client.fakes import FakeRouter

if TYPE_CHECKING:
    from pathlib import Path

    import click


SPEC = "poisson:rate=200"
RUN = ("run", "--trace", SPEC, "--duration", "1")
EMULATE = ("--emulate", "cnn-8gpu-modelled:1")


@pytest.fixture(autouse=True)
def _no_cluster_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Look for clusters where none can be: never at the user's own."""
    monkeypatch.setenv(STATE_VARIABLE, str(tmp_path / "state"))


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """Return a folder with what commands may be given by mistake."""
    body = load_profile("cnn-8gpu-modelled").to_dict()
    body["subnets"][0]["latency_ms"][1] = 0.001
    (tmp_path / "broken.json").write_bytes(orjson.dumps(body))
    (tmp_path / "text.json").write_text("no JSON")
    (tmp_path / "trace.csv").write_text("no,trace\n1,2\n")
    (tmp_path / "file").write_text("")
    return tmp_path


LOADGEN = [
    (("compare", "--simulate", "--attempts", "2"), "--attempts and --beside are of live runs"),
    (("compare", "--simulate", "--warm-up", "1"), "--warm-up is of simulated runs without the bound"),
    (
        ("compare", "--trace", "poisson:rate=9", "--no-bound", "--warm-up", "1"),
        "--warm-up is of simulated runs",
    ),
    ((*RUN,), "no cluster runs on this machine: start one with `cluster up`; or give --connect"),
    ((*RUN, "--policy", "maxacc"), "--policy: a running router has its own"),
    ((*RUN, *EMULATE, "--connect", "127.0.0.1:1"), "got both"),
    ((*RUN, "--connect", "{closed}"), "no router answers at tcp://{closed}: start one with"),
    ((*RUN, "--connect", "{closed}", "--policy", "maxacc"), "--policy"),
    ((*RUN, "--connect", "no://such"), "expected tcp://HOST:PORT"),
    (("run", "--trace", "{tmp}/none.csv", *EMULATE), "none.csv: no such file"),
    (("run", "--trace", "{tmp}/trace.csv", *EMULATE), "trace.csv"),
    (("run", "--trace", "{tmp}", *EMULATE), "cannot be read"),
    (("run", "--trace", "poison:rate=10", "--duration", "1", *EMULATE), "poisson"),
    (("run", "--trace", "poisson:rat=10", "--duration", "1", *EMULATE), "rate"),
    (("run", "--trace", "poisson:rate=ten", "--duration", "1", *EMULATE), "rate"),
    (("run", "--trace", SPEC, *EMULATE), "duration_s"),
    ((*RUN, *EMULATE, "--rate", "0"), "rate_qps"),
    ((*RUN, *EMULATE, "--rate", "nan"), "rate_qps"),
    ((*RUN, *EMULATE, "--rate", "fast"), "--rate"),
    ((*RUN, *EMULATE, "--duration", "-1"), "duration_s"),
    ((*RUN, *EMULATE, "--duration", "nan"), "duration_s"),
    ((*RUN, *EMULATE, "--seed", "-1"), "seed"),
    ((*RUN, *EMULATE, "--senders", "0"), "--senders"),
    ((*RUN, *EMULATE, "--slo-ms", "0"), "--slo-ms: expected milliseconds above 0"),
    ((*RUN, *EMULATE, "--slo-ms", "nan"), "--slo-ms: expected milliseconds above 0"),
    ((*RUN, *EMULATE, "--slo-ms", "soon"), "--slo-ms"),
    ((*RUN, *EMULATE, "--policy", "slakfit"), "slackfit"),
    ((*RUN, *EMULATE, "--policy", "fixed:none"), "none"),
    ((*RUN, "--emulate", "cnn-8gpu-modeled:1"), "cnn-8gpu-modelled"),
    ((*RUN, "--emulate", "cnn-8gpu-modelled"), "--emulate: expected PROFILE:N"),
    ((*RUN, "--emulate", "cnn-8gpu-modelled:0"), "--emulate: expected PROFILE:N"),
    ((*RUN, "--emulate", "{tmp}/broken.json:1"), "latency_ms"),
    ((*RUN, "--emulate", "{tmp}/text.json:1"), "expected JSON"),
    ((*RUN, *EMULATE, "--json", "{tmp}/file/run.json"), "--json: {tmp}/file"),
    ((*RUN, *EMULATE, "--json", "/proc/run.json"), "--json: /proc/run.json"),
    ((*RUN, *EMULATE, "--json", "{tmp}"), "--json"),
    ((*RUN, *EMULATE, "--logs", "{tmp}/file/logs"), "--logs: {tmp}/file/logs"),
    (("sprint",), "sprint"),
]
PROFILES = [
    (("measure",), "--out"),
    (("measure", "--out", "{tmp}/out.json", "--batch-sizes", "1,two"), "--batch-sizes"),
    (("measure", "--out", "{tmp}/out.json", "--batch-sizes", "4,2"), "batch"),
    (("measure", "--out", "{tmp}/out.json", "--batch-sizes", "0"), "batch"),
    (("measure", "--out", "{tmp}/out.json", "--repeats", "0"), "expected"),
    (("measure", "--out", "{tmp}/out.json", "--threads", "0"), "threads"),
    (("measure", "--out", "{tmp}/out.json", "--supernet", "{tmp}/none"), "none"),
    (("measure", "--out", "{tmp}/out.json", "--supernet", "{tmp}/text.json"), "text.json"),
    (("measure", "--out", "{tmp}/out.json", "--device", "toaster"), "toaster"),
    (("measure", "--out", "{tmp}"), "--out"),
]
WORKER = [
    ((), "--connect"),
    (("--connect", "tcp://{closed}"), "expected one of --emulate, --supernet and --family"),
    (("--connect", "tcp://{closed}", "--emulate", "x", "--supernet", "digits"), "expected one of"),
    (("--connect", "tcp://{closed}", "--emulate", "cnn-8gpu-modeled"), "cnn-8gpu-modelled"),
    (("--connect", "tcp://{closed}", "--emulate", "{tmp}/broken.json"), "latency_ms"),
    (("--connect", "nonsense", "--emulate", "cnn-8gpu-modelled"), "expected tcp://HOST:PORT"),
    (("--connect", "tcp://{closed}", "--emulate", "cnn-8gpu-modelled", "--gpus", "0"), "--gpus"),
    (("--connect", "tcp://{closed}", "--emulate", "cnn-8gpu-modelled", "--device", "cpu"), "--device goes"),
    (("--connect", "tcp://{closed}", "--supernet", "digits", "--gpus", "2"), "--gpus goes with --emulate"),
    (("--connect", "tcp://{closed}", "--supernet", "{tmp}/none"), "supernet: expected one of digits"),
    (
        ("--connect", "tcp://{closed}", "--emulate", "cnn-8gpu-modelled", "--event-log", "{tmp}/file/log"),
        "{tmp}/file/log",
    ),
]
ROUTER = [
    (("--policy", "slakfit"), "slackfit"),
    (("--policy", "fixed"), "fixed"),
    (("--client-endpoint", "nonsense"), "bind nonsense"),
    (("--worker-endpoint", "tcp://127.0.0.1:none"), "bind tcp://127.0.0.1:none"),
    (("--max-queries", "0"), "--max-queries"),
    (("--max-bytes", "lots"), "--max-bytes"),
    (("--margin-ms", "nan"), "--margin-ms: expected 0 to"),
    (("--margin-ms", "inf"), "--margin-ms: expected 0 to"),
    (("--margin-ms", "-1"), "--margin-ms: expected 0 to"),
    (("--record", "{tmp}/file/log"), "{tmp}/file/log: expected a path that can be written"),
    (("replay",), "FILE"),
    (("replay", "{tmp}/none"), "none"),
    (("replay", "{tmp}/text.json"), "text.json:1: expected a line of JSON"),
]


@pytest.mark.parametrize(
    ("command", "args", "message"),
    [
        pytest.param(command, args, message, id=" ".join((name, *args)))
        for name, command, cases in (
            ("loadgen", loadgen, LOADGEN),
            ("profiles", profiles, PROFILES),
            ("gpu_worker", gpu_worker, WORKER),
            ("router", router, ROUTER),
        )
        for args, message in cases
    ],
)
def test_wrong_input_is_one_clear_line(
    broken: Path, command: click.Command, args: tuple[str, ...], message: str
) -> None:
    """The last line of stderr names what was wrong; only click's own usage may stand above it."""
    fake = FakeRouter()
    fake.close()
    names: dict[str, Any] = {"tmp": broken, "closed": fake.endpoint.removeprefix("tcp://")}
    result = CliRunner().invoke(command, [arg.format(**names) for arg in args])

    assert isinstance(result.exception, SystemExit), result.exc_info
    assert result.exit_code != 0
    errors = [line for line in result.stderr.splitlines() if line]
    assert errors[-1].startswith("Error: "), result.output
    assert all(line.startswith(("Usage:", "Try ")) for line in errors[:-1]), result.output
    assert message.format(**names) in errors[-1]


@pytest.mark.e2e
def test_a_run_prints_a_table_and_writes_a_result_that_loads(tmp_path: Path) -> None:
    """The table names what counts; the file passes its own checks; the logs show no violation."""
    path = tmp_path / "new" / "run.json"
    result = CliRunner().invoke(loadgen, [*RUN, *EMULATE, "--senders", "2", "--json", str(path)])

    for word in ("SLO attainment", "mean accuracy", "latency", "send lag", "router CPU", "no violations"):
        assert word in result.output
    run = load_run(path)
    assert run.valid == (result.exit_code == 0)
    assert (run.queries["unanswered"], run.queries["unsent"]) == (0, 0)
    assert run.policy == "planfit"
