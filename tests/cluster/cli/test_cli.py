"""Options become a plan, wrong ones one clear line; tables say what is there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest
from click.testing import CliRunner

from cluster.cli import cli
from cluster.operate.down import Down
from cluster.operate.health import problems
from cluster.show import tables as show
from cluster.spec import plan as plans
from cluster.spec.plan import Options, Plan, differences, make_plan, python_path
from cluster.spec.roles import routers_file
from profiles.table import load_profile
from superserve.errors import ConfigError
from superserve.hello import ModelSpec
from superserve.roles import local
from superserve.roles.local import STATE_VARIABLE, LocalCluster, Phase, ProcessId, Role, RoleState
from superserve.status import BatchCounts, EndCounts, QueueStatus
from tests.gpu_worker.family.models import linear, written
from tests.superserve.statuses import gpu, queries, status

KEEPER = ProcessId(4_000_000, 1)  # nobody's
GPU = gpu(batches=1_000, queries=2_500, slowdown=1.25)
STATUS = status(
    *(replace(GPU, name=name) for name in ("worker-0", "worker-0", "worker-1")),
    queries=queries(received=5_010, in_flight=10, answered=EndCounts(ok=4_990, expired=10)),
    queue=QueueStatus(3, 12.34, 3 << 20),
    batches=BatchCounts(2_000, 1, 0),
    clients=2,
    model=ModelSpec(),
)


@pytest.fixture(autouse=True)
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep state in a folder of the test's own; return it."""
    monkeypatch.setenv(STATE_VARIABLE, str(tmp_path / "state"))
    monkeypatch.setattr(plans, "n_cuda_devices", lambda: 0)
    return tmp_path / "state"


def example(**worker: Any) -> LocalCluster:
    """Return a cluster of two workers, the second as given."""
    roles = (
        Role("router", "router", RoleState.RUNNING, "policy slackfit", "/r.log", ProcessId(11, 1)),
        Role("worker-0", "worker", RoleState.RUNNING, "2 emulated GPUs", "/0.log", ProcessId(12, 1)),
        Role("worker-1", "worker", RoleState.RUNNING, "[one] more", "/1.log", ProcessId(13, 1)),
    )
    roles = (*roles[:2], replace(roles[2], **worker))
    return LocalCluster(
        "default", Phase.RUNNING, "here", local.boot_id(), KEEPER, "2026-01-01", {"policy": "slackfit"},
        "tcp://127.0.0.1:5555", "tcp://127.0.0.1:5556", roles,
    )  # fmt: skip


# --- options ----------------------------------------------------------------------------------


def planned(**options: Any) -> Plan:
    """Return the plan for some options."""
    return make_plan("default", Options(**options), 60.0)


def test_emulated_gpus_are_dealt_out_to_the_processes() -> None:
    """Seven in two processes are four and three."""
    plan = planned(emulate="cnn-8gpu-modelled", n_gpus=7, workers=2)

    assert [role.name for role in plan.roles] == ["router", "worker-0", "worker-1"]
    assert [role.serves for role in plan.roles[1:]] == [
        "4 emulated GPUs of cnn-8gpu-modelled",
        "3 emulated GPUs of cnn-8gpu-modelled",
    ]
    assert plan.roles[2].argv[-4:] == ("--emulate", "cnn-8gpu-modelled", "--gpus", "3")


def test_more_emulated_gpus_than_a_process_holds_take_more_processes() -> None:
    """1,025 are two processes."""
    assert len(planned(emulate="cnn-8gpu-modelled", n_gpus=1_025).roles) == 3


def test_without_a_gpu_one_worker_serves_digits_on_the_cpu() -> None:
    """The plain `cluster up` of a laptop."""
    plan = planned()

    assert [role.serves for role in plan.roles] == ["policy planfit", "digits on cpu"]
    assert "--client-endpoint {client}" in " ".join(plan.roles[0].argv)


def test_a_models_folder_and_its_options_reach_the_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder is named by its full path; what is neither a file nor a folder is refused."""
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    options = {"supernet": "bert-encoder@length=64,dim=8", "profile": "digits-cpu", "device": "cpu"}
    argv = planned(weights="model", **options).roles[1].argv

    assert argv[argv.index("--weights") + 1] == str(tmp_path / "model")
    assert argv[argv.index("--supernet") + 1] == "bert-encoder@length=64,dim=8"
    with pytest.raises(
        ConfigError, match="--weights: expected a checkpoint's file, a folder or 'random', got 'no'"
    ):
        planned(weights="no", **options)
    with pytest.raises(
        ConfigError, match=r"--supernet: expected one of .*bert-encoder.*, got 'bert-encode@length=4'"
    ):
        planned(**{**options, "supernet": "bert-encode@length=4"})


def test_a_family_is_named_by_its_full_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a worker elsewhere finds it; a profile of something else is refused before anything starts."""
    linear(tmp_path / "a.onnx")
    written(tmp_path, "name: digits, model: a.onnx, accuracy: 1")
    profile = load_profile("digits-cpu")
    row = replace(profile.subnets[0], name="digits")
    fitting = replace(profile, supernet="tiny", subnets=(row,))
    (tmp_path / "mine.json").write_bytes(fitting.to_json())
    monkeypatch.chdir(tmp_path)
    family = Path("family.yaml")
    plan = planned(family=family, profile="mine.json")

    assert plan.roles[1].argv[6:10] == (
        "--family", str(tmp_path / "family.yaml"), "--profile", str(tmp_path / "mine.json"),
    )  # fmt: skip
    with pytest.raises(ConfigError, match="profile 'digits-cpu': expected one of the family 'tiny', got one"):
        planned(family=family, profile="digits-cpu")
    (tmp_path / "mine.json").write_bytes(replace(fitting, subnets=profile.subnets[:1]).to_json())
    with pytest.raises(ConfigError, match=r"family.yaml: no member is called 'digits-[\d.]+'"):
        planned(family=family, profile="mine.json")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "--profile: a family comes without one: expected one, from `profiles measure --family`"),
        ({"profile": "digits-cpu", "supernet": "digits"}, "--supernet and --family: expected one of them"),
        ({"profile": "digits-cpu", "weights": "random"}, "--weights and --family: expected one of them"),
        ({"emulate": "cnn-8gpu-modelled"}, "--family and --emulate: expected one of them, got both"),
    ],
)
def test_what_means_nothing_to_a_family_is_refused(options: dict[str, Any], message: str) -> None:
    """Each option is named."""
    with pytest.raises(ConfigError, match=message):
        planned(family=Path("family.yaml"), **options)


def test_with_gpus_each_has_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that torch sees, or those that are named."""
    monkeypatch.setattr(plans, "n_cuda_devices", lambda: 4)

    def devices(**options: Any) -> list[str]:
        return [role.serves.removeprefix("digits on ") for role in planned(**options).roles[1:]]

    assert devices() == ["cuda:0", "cuda:1", "cuda:2", "cuda:3"]
    assert devices(gpus=(3, 1)) == ["cuda:3", "cuda:1"]
    assert devices(device="cuda", workers=2) == ["cuda:0", "cuda:1"]
    assert devices(device="cpu", workers=2) == ["cpu", "cpu"]


def test_a_placed_plan_has_each_port_once() -> None:
    """A named port is used as given; any other is a free one, and workers receive the router's."""
    ports = iter((6_001, 6_002, 6_003))
    plan = planned(emulate="cnn-8gpu-modelled", n_gpus=1, client_port=5_555, metrics=True)
    (router, worker), (client_endpoint,), (worker_endpoint,) = plan.placed(lambda: next(ports), "/f")

    assert (client_endpoint, worker_endpoint) == ("tcp://127.0.0.1:5555", "tcp://127.0.0.1:6001")
    assert {client_endpoint, worker_endpoint, "6002"} <= set(router.argv)
    assert {worker_endpoint, "6003"} <= set(worker.argv)
    assert not [word for word in (*router.argv, *worker.argv) if "{" in word]


def test_of_several_routers_each_worker_begins_with_another() -> None:
    """Each router has its ports and the list of all; workers know them all, in turn."""
    ports = iter(range(6_001, 7_000))
    plan = planned(emulate="cnn-8gpu-modelled", n_gpus=3, workers=3, routers=2)
    roles, clients, workers = plan.placed(lambda: next(ports), "/f")

    assert [role.name for role in roles] == ["router-0", "router-1", "worker-0", "worker-1", "worker-2"]
    assert len({*clients, *workers}) == 4
    for i, role in enumerate(roles[:2]):
        assert {clients[i], workers[i], "/f/files/routers.json"} <= set(role.argv)
    connects = [role.argv[role.argv.index("--connect") + 1] for role in roles[2:]]
    a, b = workers
    assert connects == [f"{a},{b}", f"{b},{a}", f"{a},{b}"]
    assert orjson.loads(routers_file(clients, workers))["routers"][1] == {"client": clients[1], "worker": b}


def test_fixed_ports_are_those_of_one_router() -> None:
    """Two routers cannot have the same."""
    with pytest.raises(ConfigError, match="expected without --routers"):
        planned(emulate="cnn-8gpu-modelled", n_gpus=1, client_port=5_555, routers=2)


def test_a_profile_in_a_file_is_named_by_its_full_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a process elsewhere finds it, and the same file is the same plan."""
    text = (Path(plans.__file__).parents[2] / "profiles/data/cnn-8gpu-modelled.json").read_bytes()
    (tmp_path / "mine.json").write_bytes(text)
    monkeypatch.chdir(tmp_path)

    assert planned(emulate="mine.json").profile == str(tmp_path / "mine.json")


def test_the_same_options_do_not_differ_and_others_are_named() -> None:
    """A port that was not asked for may be any."""
    running = planned(emulate="cnn-8gpu-modelled", n_gpus=2, client_port=5555).options
    asked = planned(emulate="cnn-8gpu-modelled", n_gpus=2).options

    assert differences(running, asked) == []
    assert differences(asked, running) == ["client_port: it runs with 0, asked for 5555"]
    assert differences(asked, planned().options) == [
        "profile: it runs with cnn-8gpu-modelled, asked for digits-cpu",
        "threads: it runs with none, asked for 1",
        "workers: it runs with 2 emulated GPUs of cnn-8gpu-modelled in 1 process, asked for digits on cpu",
    ]


def test_children_find_the_package_that_runs_here_and_the_users_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under -P the current folder is no place to look; PYTHONPATH is, in its order, each place once."""
    root = str(Path(plans.__file__).parents[2])
    for own in ("/mine:/other", f"/mine:{root}:/other"):
        monkeypatch.setenv("PYTHONPATH", own)
        assert python_path() == f"{root}:/mine:/other"
    monkeypatch.delenv("PYTHONPATH")
    assert python_path() == root


EMULATE = ("--emulate", "cnn-8gpu-modelled:2")
WRONG = [
    (("up", "--emulate", "cnn-8gpu-modeled:2"), "cnn-8gpu-modelled"),
    (("up", "--emulate", "cnn-8gpu-modelled"), "--emulate: expected PROFILE:N"),
    (("up", "--emulate", "cnn-8gpu-modelled:0"), "--emulate: expected PROFILE:N"),
    (("up", *EMULATE, "--device", "cpu"), "--device and --emulate: expected one of them"),
    (("up", *EMULATE, "--gpus", "0"), "--gpus and --emulate: expected one of them"),
    (("up", *EMULATE, "--workers", "3"), "--workers: expected 1 to 2 processes"),
    (("up", *EMULATE, "--workers", "0"), "--workers"),
    (("up", *EMULATE, "--policy", "slakfit"), "slackfit"),
    (("up", *EMULATE, "--policy", "fixed:none"), "none"),
    (("up", *EMULATE, "--margin-ms", "nan"), "--margin-ms: expected 0 to"),
    (("up", *EMULATE, "--ready-timeout-s", "0"), "--ready-timeout-s: expected seconds above 0"),
    (("up", *EMULATE, "--ready-timeout-s", "nan"), "--ready-timeout-s: expected seconds above 0"),
    (("up", *EMULATE, "--client-port", "70000"), "--client-port"),
    (("up", *EMULATE, "--client-port", "7000", "--worker-port", "7000"), "expected two ports"),
    (("up", *EMULATE, "--name", "../x"), "--name: expected"),
    (("up", "--gpus", "0"), "GPU 0: expected CUDA devices that torch sees, and it sees 0"),
    (("up", "--gpus", "0,0"), "--gpus: expected each device once"),
    (("up", "--gpus", "first"), "--gpus: expected numbers"),
    (("up", "--gpus", "0", "--workers", "1"), "--gpus: one worker on each"),
    (("up", "--device", "cuda"), "it sees 0; try --device cpu"),
    (("up", "--device", "toaster"), "--device"),
    (("up", "--supernet", "none"), "--supernet: expected one of digits, ofa-resnet50, dynabert"),
    (("up", "--profile", "none"), "none"),
    (("status",), "no cluster 'default' runs on this machine: start one with `cluster up`"),
    (("status", "--name", "other"), "no cluster 'other' runs"),
    (("down", "--timeout-s", "0"), "--timeout-s: expected seconds above 0"),
    (("logs",), "there are no logs"),
    (("sprint",), "sprint"),
]


@pytest.mark.parametrize(("args", "message"), [pytest.param(*case, id=" ".join(case[0])) for case in WRONG])
def test_wrong_input_is_one_clear_line(base: Path, args: tuple[str, ...], message: str) -> None:
    """No traceback, an exit code, and nothing was started or written."""
    result = CliRunner().invoke(cli, args)

    assert isinstance(result.exception, SystemExit), result.exc_info
    assert result.exit_code != 0
    assert message in result.stderr.splitlines()[-1]
    assert not base.exists()


def test_a_mangled_state_file_is_named(base: Path) -> None:
    """Whatever the command, the file and its field are in the error, and the file stays."""
    path = base / "default" / "state.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"schema": 2, "name": 7}')

    for args in (("up", *EMULATE), ("status",), ("down",)):
        result = CliRunner().invoke(cli, args)
        assert result.exit_code == 1
        assert f"{path}: name: expected text, got 7" in result.stderr
    assert path.exists()


def test_down_removes_what_no_state_file_names(base: Path) -> None:
    """An `up` that was killed before its keeper began leaves a plan and no state; logs are kept."""
    folder = base / "default"
    folder.mkdir(parents=True)
    for name in ("plan.json", "router.log"):
        (folder / name).write_text("")

    result = CliRunner().invoke(cli, ("down",))

    assert (result.exit_code, "nothing to stop" in result.output) == (0, True)
    assert [path.name for path in folder.iterdir()] == ["router.log"]


# --- tables -----------------------------------------------------------------------------------


def rows(text: str) -> dict[str, list[str]]:
    """Return a table's rows by their first cell."""
    return {line.split()[0]: line.split()[1:] for line in text.splitlines()[2:]}


def test_the_table_of_processes_has_each_with_what_it_serves() -> None:
    """Brackets in a name are printed as they are."""
    found = rows(show.processes(example(state=RoleState.FATAL, process=None, restarts=5)))

    assert found["keeper"][:2] == ["4000000", "running"]
    assert found["worker-0"] == ["12", "RUNNING", "2", "emulated", "GPUs"]
    assert found["worker-1"] == ["-", "FATAL", "(restarted", "5", "times)", "[one]", "more"]
    assert "tcp://127.0.0.1:5555," in found["router"]


def test_the_table_of_status_adds_what_the_router_says() -> None:
    """A process's GPUs are summed up; one that the router does not know has dashes."""
    found = rows(show.roles(example(name="worker-2"), STATUS))

    assert found["worker-0"][-4:] == ["2", "of", "2", "2,000", "5,000", "1.25"][-4:]
    assert found["worker-2"][-4:] == ["-", "-", "-", "-"]
    assert "answered   ok 4,990, expired 10" in show.router(example(), STATUS)


def test_a_cluster_that_is_well_has_no_problems() -> None:
    """The keeper's and the router's views agree."""
    assert problems(example(), STATUS) == []


@pytest.mark.parametrize(
    ("worker", "change", "message"),
    [
        ({"state": RoleState.FATAL, "why": "no memory"}, {}, "worker-1: FATAL: no memory"),
        ({"state": RoleState.STARTING}, {}, "worker-1: STARTING"),
        ({"name": "worker-9"}, {}, "worker-9: runs, and the router does not know it"),
        ({}, {"state": "overrun"}, "worker-1: of 1 GPUs, the router has 1 overrun"),
        ({}, {"process": "suspect"}, "worker-1: of 1 GPUs, the router has 1 suspect"),
    ],
)
def test_what_is_not_well_is_named(worker: dict[str, Any], change: dict[str, Any], message: str) -> None:
    """By the keeper, or by the router, or because one of them does not know."""
    changed = replace(STATUS, workers=(*STATUS.workers[:2], replace(STATUS.workers[2], **change)))

    assert problems(example(**worker), changed) == [message]


def test_a_router_that_does_not_answer_is_a_problem() -> None:
    """Even if its process runs."""
    assert problems(example(), None) == ["router: does not answer at tcp://127.0.0.1:5555"]


def test_what_to_type_next_fits_the_cluster() -> None:
    """A gentle load by the profile, the endpoint for a program, and the name where it is needed."""
    lines = "\n".join(show.what_next(example(), STATUS, "cnn-8gpu-modelled"))
    assert "loadgen run --trace poisson:rate=700 --duration 10 --slo-ms 36\n" in lines
    assert 'superserve.Client("tcp://127.0.0.1:5555")' in lines

    other = replace(example(), name="other")
    lines = "\n".join(show.what_next(other, STATUS, "transformer-8gpu-modelled"))
    assert "--slo-ms 50 --connect 127.0.0.1:5555" in lines
    assert "cluster down --name other" in lines


def test_down_says_what_it_stopped() -> None:
    """Each process by its number."""
    (line,) = show.stopped(Down(example(), was_alive=True))

    assert (
        line
        == "cluster 'default' stopped: router (11), worker-0 (12), worker-1 (13), and its keeper (4000000)"
    )
