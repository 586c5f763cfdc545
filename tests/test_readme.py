"""What README.md and ARCHITECTURE.md show exists and runs."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import click
import pytest

from cluster.cli import cli as cluster_cli
from gateway.cli import cli as gateway_cli
from gpu_worker.cli import cli as gpu_worker_cli
from gpu_worker.serve.eventlog import cli as eventlog_cli
from loadgen.cli import cli as loadgen_cli
from loadgen.cli.questions.explain import cli as explain_cli
from loadgen.live.run import Emulation, emulated
from loadgen.paper.figures import main as figures_cli
from loadgen.simulator.chaos import main as chaos_cli
from loadgen.simulator.chaos.routers import main as chaos_routers_cli
from loadgen.study.agreement import main as agreement_cli
from loadgen.study.shards import cli as shards_cli
from profiles.cli import cli as profiles_cli
from router.cli import cli as router_cli

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parent.parent
PAGES = (
    "README.md",
    "ARCHITECTURE.md",
    "CHANGELOG.md",
    "docs/demandfit.md",
    "docs/gate.md",
    "docs/metrics.md",
    "docs/operating.md",
    "docs/releases.md",
    "docs/report.md",
    "docs/simulator.md",
    "docs/traces.md",
)
MORE_PAGES = (
    "docs/README.md",
    "docs/demo.md",
    "docs/encoders.md",
    "docs/explain.md",
    "docs/live.md",
    "docs/loadgen.md",
    "docs/policies.md",
    "docs/profiles.md",
    "docs/routers.md",
    "docs/training.md",
    "docs/your-model.md",
)
"""Whose paths and commands are looked up too; they name no make target."""

CLIENT_PAGES = ("README.md", "wheels/client/README.md")
"""The pages whose Python is for applications that have the client alone."""

ENDPOINT = "tcp://127.0.0.1:5555"
COMMANDS: dict[str, click.Command] = {
    ".venv/bin/python -m gateway": gateway_cli,
    ".venv/bin/python -m router": router_cli,
    ".venv/bin/python -m loadgen.study.agreement": agreement_cli,
    ".venv/bin/python -m loadgen.simulator.chaos": chaos_cli,
    ".venv/bin/python -m loadgen.simulator.chaos.routers": chaos_routers_cli,
    ".venv/bin/python -m loadgen.study.shards": shards_cli,
    ".venv/bin/python -m loadgen.paper.figures": figures_cli,
    ".venv/bin/python -m gpu_worker": gpu_worker_cli,
    ".venv/bin/python -m gpu_worker.serve.eventlog": eventlog_cli,
    ".venv/bin/cluster": cluster_cli,
    ".venv/bin/loadgen": loadgen_cli,
    ".venv/bin/profiles": profiles_cli,
    ".venv/bin/superserve": click.Group(commands={"explain": explain_cli}),
    # With the environment activated, as README.md and docs/your-model.md have it.
    "cluster": cluster_cli,
    "loadgen": loadgen_cli,
    "profiles": profiles_cli,
}
"""How the pages call a command, and what then runs."""

# In backticks, with a slash and an ending or a closing slash; or what a link or picture points to.
_PATH = re.compile(r"`([\w.-]+(?:/[\w.-]+)*(?:/[\w-]+\.(?:py|md|json|svg|toml)|/))`|\]\(([\w./-]+)\)")
_MADE_BY_COMMANDS = ("out/", "dist/", ".venv/")


def text_of(page: str) -> str:
    """Return a page's text."""
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    """Return the page's fenced blocks in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text_of(page), re.MULTILINE | re.DOTALL)


def client_snippets() -> list[str]:
    """Return every Python block of the pages for applications; each names ENDPOINT once."""
    return [block for page in CLIENT_PAGES for block in blocks(page, "python")]


def paths(page: str) -> set[str]:
    """Return the paths of this repository that a page names; links count from the page's own folder."""
    folder = PurePosixPath(page).parent
    found = {code or str(folder / link) for code, link in _PATH.findall(text_of(page))}
    return {path for path in found if not path.startswith(_MADE_BY_COMMANDS)}


def shell_lines() -> list[str]:
    """Return every command line of the pages' shell blocks, but for the reader's own programs."""
    pages = (*PAGES, *MORE_PAGES)
    lines = [line for page in pages for block in blocks(page, "sh") for line in block.splitlines() if line]
    return [line for line in lines if not line.startswith("python ")]


def command_of(words: list[str]) -> tuple[click.Command, list[str]]:
    """Return what a command line runs and its arguments; subcommands are followed."""
    n = 3 if words[1] == "-m" else 1
    command, rest = COMMANDS[" ".join(words[:n])], words[n:]
    while isinstance(command, click.Group) and rest:
        sub = command.get_command(click.Context(command), rest[0])
        if sub is None:
            break
        command, rest = sub, rest[1:]
    return command, rest


@pytest.mark.parametrize("page", [*PAGES, *MORE_PAGES])
def test_every_path_named_exists(page: str) -> None:
    """No page sends its reader to a file or folder that is not there."""
    missing = sorted(path for path in paths(page) if not (ROOT / path).exists())

    assert not missing, missing


def test_paths_are_found_where_they_stand() -> None:
    """The search above is not passed by finding nothing."""
    assert {"docs/picture.svg", "ARCHITECTURE.md", "docs/policies.md"} <= paths("README.md")
    assert {"superserve/wire/", "cluster/", "tests/test_architecture.py"} <= paths("ARCHITECTURE.md")


@pytest.mark.parametrize("page", PAGES)
def test_every_make_target_named_exists(page: str) -> None:
    """`make X` on a page is a target of the Makefile."""
    targets = set(re.findall(r"^([a-z-]+):", text_of("Makefile"), re.MULTILINE))
    named = set(re.findall(r"(?:`|^ {4})make ([a-z]+(?:-[a-z]+)*)", text_of(page), re.MULTILINE))

    assert named
    assert named <= targets


def test_the_index_leads_to_every_page() -> None:
    """docs/README.md links each page beside it, and README.md links the index."""
    linked = set(re.findall(r"\]\(([\w-]+\.md)\)", text_of("docs/README.md")))

    assert linked == {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert "](docs/README.md)" in text_of("README.md")


def test_every_folder_is_on_the_map_in_its_own_words() -> None:
    """ARCHITECTURE.md's map has a row for each folder: the first sentence of its docstring."""
    roles = ("superserve", "router", "gpu_worker", "gateway", "loadgen", "profiles", "cluster")
    rows = set()
    for role in roles:
        for path in (ROOT / role).rglob("__init__.py"):
            words = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
            assert words, f"{path} says nothing"
            rows.add(f"| `{path.parent.relative_to(ROOT)}/` | {words.splitlines()[0]} |")

    assert rows <= set(text_of("ARCHITECTURE.md").splitlines())


@pytest.mark.parametrize("line", shell_lines())
def test_every_command_shown_takes_its_options(line: str) -> None:
    """Commands on the pages parse: their names, subcommands and options exist."""
    command, rest = command_of(shlex.split(line, comments=True))
    # Files and folders are made by the command before, so only the options are looked up.
    known = {option for one in command.params for option in (*one.opts, *one.secondary_opts)}

    assert {word for word in rest if word.startswith("--")} <= known


@pytest.fixture
def endpoint() -> Iterator[str]:
    """Run a router with two emulated GPUs; give its client endpoint."""
    with emulated(Emulation("cnn-8gpu-modelled", 2)) as cluster:
        yield cluster.client_endpoint


def run_snippet(snippet: str, endpoint: str) -> str:
    """Run a page's Python as it stands, but for the endpoint; return what it printed."""
    assert snippet.count(ENDPOINT) == 1
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", snippet.replace(ENDPOINT, endpoint)],
        cwd=ROOT, capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.e2e
def test_the_client_snippet_runs(endpoint: str) -> None:
    """README's Python runs as it stands against a real router, and every query is answered."""
    (snippet,) = blocks("README.md", "python")

    answers = run_snippet(snippet, endpoint).splitlines()
    assert len(answers) == 32
    assert all(re.fullmatch(r"cnn-[\d.]+ \([\d.]+ %\) in [\d.]+ ms", line) for line in answers), answers


def test_the_readme_is_short() -> None:
    """Everything else is on the pages that it leads to."""
    assert len(text_of("README.md").split()) <= 900


@pytest.mark.e2e
def test_the_snippet_on_the_client_s_own_page_runs(endpoint: str) -> None:
    """What the client's wheel shows as its description runs, and prints an answer."""
    (snippet,) = blocks("wheels/client/README.md", "python")

    assert re.search(r" cnn-[\d.]+ [\d.]+$", run_snippet(snippet, endpoint).strip())
