"""What is run in hostile environments: every subcommand, and short runs of those that start processes."""

from __future__ import annotations

from dataclasses import dataclass, field

EMULATED = "cnn-8gpu-modelled"


@dataclass(frozen=True, slots=True)
class Step:
    """One command line, and what shows that it worked.

    Attributes:
        argv: The command; `{out}` is the folder of results, `{in}` that of inputs, `{port}` a port that the
            test listens at.
        stdout: A pattern that its output holds, if it worked.
        codes: The exit codes of a command that worked.
        verdict: A further exit code, with the same output, for what it may find wrong where something is.
        stderr: A pattern of its error line, where working means to refuse.
        serves: How to see that it serves, if only SIGTERM ends it: it "listens", or "connects" to `{port}`.
        starts: Whether what it has started goes on without it, from when all of `stdout` is printed.
        files: What it writes into `{out}`: the name, and what a whole one begins and ends with.
    """

    argv: tuple[str, ...]
    stdout: str = ""
    codes: tuple[int, ...] = (0,)
    verdict: int = 0
    stderr: str = ""
    serves: str = ""
    starts: bool = False
    files: dict[str, tuple[str, str]] = field(default_factory=dict)


JSON, HTML, SVG = ("{", "}"), ("<!doctype html>", "</html>"), ("<?xml", "</svg>")
ANY = ("", "")


def step(line: str, stdout: str = "", **more: object) -> Step:
    """Return a step of a line whose words have no spaces."""
    return Step(tuple(line.split()), stdout, **more)  # type: ignore[arg-type]  # forwards Step's own fields


def helps(line: str) -> tuple[Step, ...]:
    """Return a command that shows its help, whole."""
    return (step(f"{line} --help", r"(?s)Usage: .*--help"),)


def refused(line: str) -> tuple[Step, ...]:
    """Return a command that needs a cluster, where none runs."""
    return (step(line, codes=(1,), stderr=r"no cluster 'default' runs on this machine"),)


_PAGE = "loadgen report {in}/result.json --output {out}/r.html"
_RUN = f"--trace poisson:rate=60 --duration 0.25 --emulate {EMULATED}:1 --slo-ms 500"

COMMANDS: dict[str, tuple[Step, ...]] = {
    "cluster help": helps("cluster"),
    "cluster up help": helps("cluster up"),
    "cluster status": refused("cluster status"),
    "cluster top": refused("cluster top"),
    "cluster doctor": refused("cluster doctor"),
    "cluster drain": refused("cluster drain worker-0"),
    "cluster restart": refused("cluster restart worker-0"),
    "cluster logs": (step("cluster logs", codes=(1,), stderr=r"there are no logs"),),
    "cluster down": (step("cluster down", "nothing to stop"),),
    "cluster config": (step("cluster config {in}/hosts.yaml", "hosts"),),
    "cluster render": (
        step("cluster render kubernetes {in}/hosts.yaml", r"(?s)kind: StatefulSet.*NetworkPolicy"),
    ),
    "cluster render out": (
        step("cluster render compose {in}/hosts.yaml --out {out}/r", "wrote", files={"r/compose.yaml": ANY}),
    ),
    "cluster keys": (
        step(
            "cluster keys --out {out}/keys make",
            "made",
            files={"keys/router.key": ANY, "keys/operator.key": ANY},
        ),
        step("cluster keys --out {out}/keys list", "operator"),
    ),
    "cluster up": (
        step(
            f"cluster up --emulate {EMULATED}:1 --ready-timeout-s 25",
            r"(?s)is up.*worker-0.*Stop it",
            starts=True,
        ),
        step("cluster status", r"(?s)router.*worker-0", verdict=1),
        step("cluster down", r"(?s)router.*worker-0|stopped"),
    ),
    "loadgen help": helps("loadgen"),
    "trace info": (step("loadgen trace info poisson:rate=200 --duration 1", r"(?s)poisson:rate=200.*q/s"),),
    "trace info file": (step("loadgen trace info {in}/trace.npz", "q/s"),),
    "trace make": (
        step(
            "loadgen trace make poisson:rate=200 --duration 1 --out {out}/r.npz",
            "written",
            files={"r.npz": ANY},
        ),
    ),
    "simulate": (
        step(
            f"loadgen simulate --trace poisson:rate=200 --duration 0.5 --emulate {EMULATED}:1"
            " --json {out}/r.json",
            r"(?s)SLO attainment.*digest",
            files={"r.json": JSON},
        ),
    ),
    "search": (
        step(
            f"loadgen search --simulate --emulate {EMULATED}:1 --duration 0.2 --start 200 --max-probes 2"
            " --tolerance 1 --json {out}/r.json",
            codes=(0, 1),
            files={"r.json": JSON},
        ),
    ),
    "compare": (
        step(
            f"loadgen compare --simulate --trace poisson:rate=100 --duration 0.3 --seeds 1"
            f" --emulate {EMULATED}:1 --policy mincost --processes 2 --no-bound --json {{out}}/r.json",
            "mincost",
            files={"r.json": JSON},
        ),
    ),
    "run": (
        step(
            f"loadgen run {_RUN} --json {{out}}/r.json",
            r"(?s)queries.*no violations",
            codes=(0, 1),
            files={"r.json": JSON},
        ),
    ),
    "report": (step(_PAGE, "written", files={"r.html": HTML}),),
    "calibrate": (step("loadgen calibrate --trace poisson:rate=60 --json-lines", r"\{", codes=(0, 1)),),
    "agent": (step("loadgen agent", serves="listens"),),
    "profiles help": helps("profiles"),
    "profiles measure help": helps("profiles measure"),
    "profiles show": (step(f"profiles show {EMULATED}", r"(?s)cnn-73\.82.*cnn-80\.16"),),
    "profiles picture": (step(f"profiles show {EMULATED} --picture {{out}}/r.svg", files={"r.svg": SVG}),),
    "profiles search help": helps("profiles search"),
    "profiles accuracy help": helps("profiles accuracy"),
    "profiles calibrate help": helps("profiles calibrate"),
    "profiles train help": helps("profiles train"),
    "profiles exits help": helps("profiles exits"),
    "profiles advise help": helps("profiles advise"),
    "router help": helps("superserve-router"),
    "router": (step("superserve-router", serves="listens"),),
    "router metrics": (step("superserve-router --metrics-port 0", serves="listens"),),
    "router record": (
        step("superserve-router --record {out}/r.log", serves="listens", files={"r.log": ("{", "]")}),
    ),
    "router replay": (step("superserve-router replay {in}/router.log", "are the same"),),
    "worker help": helps("superserve-worker"),
    "worker": (
        step(f"superserve-worker --connect tcp://127.0.0.1:{{port}} --emulate {EMULATED}", serves="connects"),
    ),
    "worker log": (
        step(
            f"superserve-worker --connect tcp://127.0.0.1:{{port}} --emulate {EMULATED}"
            " --event-log {out}/r.log",
            serves="connects",
            files={"r.log": ANY},
        ),
    ),
}
