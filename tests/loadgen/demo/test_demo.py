"""The demo end to end: its cluster is its own, it serves what it reports, and a broken serve fails it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from loadgen.demo import demo, serve
from loadgen.results.result import load_run
from profiles.table import load_profile
from superserve.errors import ProcessError
from superserve.roles import local

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.e2e
@pytest.mark.timeout(120)
def test_the_demos_cluster_is_gone_however_its_block_ends(tmp_path: Path) -> None:
    """Interrupted, it leaves no process; what an earlier demo left when it was killed goes first."""
    profile = tmp_path / "profile.json"
    profile.write_bytes(load_profile("digits-cpu").to_json())
    serve.run_cluster(tmp_path / "cluster", "up", "--emulate", "cnn-8gpu-modelled:1")
    seen = [local.running(tmp_path / "cluster")]

    def use() -> None:
        with serve.serving("maxacc", profile, margin_ms=10.0) as cluster:
            assert not seen[0].keeper.is_alive()
            seen.append(local.running(tmp_path / "cluster"))
            assert cluster.client_endpoint == seen[1].client_endpoint
            assert "policy maxacc" in seen[1].roles[0].serves
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        use()

    processes = [seen[1].keeper, *(role.process for role in seen[1].roles)]
    assert [process.is_alive() for process in processes if process] == [False] * 3
    assert local.names(tmp_path / "cluster") == []


@pytest.mark.e2e
def test_a_demo_whose_cluster_does_not_start_says_why(tmp_path: Path) -> None:
    """The error has what `cluster up` said."""
    serving = serve.serving("slackfit", tmp_path / "none.json", margin_ms=10.0)

    with pytest.raises(ProcessError, match=r"cluster up: exit code 1:\n.*none.json"), serving:
        pytest.fail("it serves")


def failed(output: str) -> list[str]:
    """Return the lines of what failed."""
    return [line for line in output.splitlines() if line.startswith("FAILED")]


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.e2e
@pytest.mark.timeout(600)
def test_the_demo_serves_each_policy_and_every_answer_is_what_it_says(tmp_path: Path) -> None:
    """Results are written and checks made; a machine that is busy gives warnings, at most."""
    done = CliRunner().invoke(demo.cli, ["--out", str(tmp_path), "--seconds", "6"])

    for policy, name in demo.FILES.items():
        assert load_run(tmp_path / name).policy.startswith(policy.partition(":")[0]), done.output
        assert policy in (tmp_path / "report.html").read_text()
    assert (tmp_path / "profile.json").exists()
    for words in ("SLO attainment", "Labels that came back", "are its own", "Next: "):
        assert words in done.output
    assert not (tmp_path / "cluster").exists()
    assert failed(done.output) == []
    assert done.exit_code == 0


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.timeout(600)
def test_a_worker_with_other_weights_fails_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It answers in time, and what it answers is wrong: labels and outputs both show it."""
    monkeypatch.setattr(serve, "OPTIONS", (*serve.OPTIONS, "--weights", "random"))
    monkeypatch.setattr(demo, "profiled", lambda out: demo.measure_here("digits-cpu", out / "profile.json"))
    done = CliRunner().invoke(demo.cli, ["--out", str(tmp_path), "--seconds", "2"])

    lines = failed(done.output)
    assert [line for line in lines if "labels of" in line], done.output
    assert [line for line in lines if "outputs of" in line and "are not that subnet's" in line]
    assert done.exit_code == 1
