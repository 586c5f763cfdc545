"""`make docs`: a page for each module that users touch, in which every docstring can be read."""

from __future__ import annotations

import html
import importlib.util
import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from router.policies import Choice, Policy, QueueView, WorkerView
from router.policies.registry import make_policy
from tests.paths import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import ModuleType

    from pdoc.doc import Doc

SCRIPT = ROOT / "docs" / "reference.py"
MS = 1_000_000

_WORD = re.compile(r"[\w*<>{}\[\]|]+")
_HEADINGS = {"Args": "Arguments"}  # as the pages call a section


def script() -> ModuleType:
    """Return docs/reference.py as a module."""
    spec = importlib.util.spec_from_file_location("reference", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def built(folder: Path, *python: str) -> str:
    """Run the script, by these words of Python's command line; return what it printed."""
    done = subprocess.run(
        [sys.executable, "-W", "error", *python, str(folder)], cwd=ROOT, env=dict(os.environ),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


def documented(module: Doc[Any]) -> Iterator[Doc[Any]]:
    """Yield a module, and what it and its classes define under public names."""
    yield module
    for member in getattr(module, "own_members", ()):
        if not member.name.startswith("_"):
            yield from documented(member)


def words(text: str) -> list[str]:
    """Return a text's words, with the characters that Markdown or HTML could take for markup."""
    plain = re.sub(r"\*(\w+)\*", r"\1", text.replace("`", ""))  # *emphasis* is meant
    return [_HEADINGS.get(word, word) for word in _WORD.findall(plain)]


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_the_reference_builds_without_a_warning(tmp_path: Path) -> None:
    """Each module has a page, and the index leads to it."""
    printed = built(tmp_path, str(SCRIPT))

    names = script().modules()
    missing = [name for name in names if not (tmp_path / f"{name.replace('.', '/')}.html").exists()]
    assert not missing
    assert f"{len(names)} modules" in printed
    assert 'href="superserve.html"' in (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "AsyncClient" in (tmp_path / "superserve.html").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_without_torch_the_other_pages_are_built(tmp_path: Path) -> None:
    """Nothing else needs torch: a client's environment builds the pages of what it has."""
    run = f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    hidden = f"import runpy, sys; sys.modules['torch'] = None; {run}"

    printed = built(tmp_path, "-c", hidden)

    assert "left out, since torch is not installed: gpu_worker.supernet.insertion" in printed
    assert not (tmp_path / "gpu_worker").exists()
    assert (tmp_path / "loadgen" / "simulator" / "simulate.html").exists()


def test_every_docstring_reads_the_same_on_its_page() -> None:
    """No word of a docstring is lost as markup, such as a `<name>` without backticks."""
    pdoc = pytest.importorskip("pdoc")
    differ, n = [], 0
    reference = script()
    for name in reference.modules():
        for one in documented(pdoc.doc.Module(reference.loaded(name))):
            page = pdoc.render_helpers.to_html(pdoc.docstrings.convert(one.docstring, "google", None))
            n += 1
            if words(one.docstring) != words(html.unescape(re.sub(r"<[^>]*>", " ", str(page)))):
                differ.append(one.fullname)

    assert not differ
    assert n > 400


def test_the_policy_of_the_page_chooses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example in `router.policies` is served as it stands, by the name that the page gives it."""
    import router.policies  # noqa: PLC0415  for its docstring
    from profiles.table import load_profile  # noqa: PLC0415  only here

    text = router.policies.__doc__ or ""
    (example,) = re.findall(r"^    from .*?(?=^\S)", text, re.MULTILINE | re.DOTALL)
    (tmp_path / "my_policy.py").write_text(
        re.sub(r"^    ", "", example, flags=re.MULTILINE), encoding="utf-8"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    profile = load_profile("cnn-8gpu-modelled")
    policy: Policy = make_policy("my_policy:Careful", profile)

    idle = WorkerView(free_at_ns=0, allowance_ns=0, slowdown=1.0)
    wide = policy.choose(QueueView(head_deadline_ns=10_000 * MS, head_floor=0, length=1), idle, 0)
    narrow = policy.choose(QueueView(head_deadline_ns=1, head_floor=0, length=1), idle, 0)
    assert wide == Choice(profile.n_subnets - 1, 1)
    assert narrow is None
