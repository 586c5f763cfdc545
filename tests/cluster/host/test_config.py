"""The files of supervisor on a host: nothing that a file may say breaks out of them."""

from __future__ import annotations

import configparser
import itertools
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

from cluster.host.config import kept_digests, script, supervisord_conf
from cluster.spec.roles import HostPlan, HostRole
from superserve.fields import read_file

PRINT = "import os, sys; print(sys.argv[1:], os.environ['A'], os.environ['PYTHONPATH'])"
HOSTILE = ("a b", "c'd", "$(exit 3)", "%(here)s", "; rm", '"', "*")
ROLE = HostRole("worker-a-0", "worker", ("-c", PRINT, *HOSTILE), (("A", "x 'y' ;%"),), "nothing")
PLAN = HostPlan("/state/.hosts/c/a", sys.executable, "/state/code", (ROLE,), 10 << 20, 3)


def conf(plan: HostPlan) -> configparser.RawConfigParser:
    """Return supervisor's configuration as read."""
    read = configparser.RawConfigParser(inline_comment_prefixes=(";", "#"), strict=True)
    read.read_string(supervisord_conf(plan, min_files=1_024))
    return read


def test_a_role_gets_its_words_and_variables_as_they_are(tmp_path: Path) -> None:
    """The script hands every word on, whatever a shell or an .ini file would make of it."""
    path = tmp_path / "role.sh"
    path.write_text(script(ROLE, PLAN))
    done = subprocess.run(["sh", str(path)], capture_output=True, text=True, check=True)
    assert done.stdout == f"{list(HOSTILE)} x 'y' ;% /state/code\n"


def test_a_change_of_a_role_is_a_change_of_its_program_and_of_no_other() -> None:
    """`update` compares programs, which would not see that a script beside them has changed."""
    two = replace(PLAN, roles=(replace(ROLE, name="router", kind="router"), ROLE))
    other = replace(two, roles=(two.roles[0], replace(ROLE, argv=("-c", "pass"))))

    before, after = conf(two), conf(other)
    assert dict(before["program:router"]) == dict(after["program:router"])
    differing = {key for key in before["program:worker-a-0"]
                 if before["program:worker-a-0"][key] != after["program:worker-a-0"][key]}  # fmt: skip
    assert differing == {"environment"}


def _connected(*routers: str) -> HostPlan:
    """Return a plan of a worker that connects to these."""
    role = replace(ROLE, argv=("-m", "gpu_worker", "--connect", ",".join(routers), "--name", "w"))
    return replace(PLAN, roles=(role,))


def _after(before: HostPlan, config: str, plan: HostPlan) -> tuple[str, bool]:
    """Return supervisor's configuration for another plan, and whether the role runs on."""
    after = supervisord_conf(plan, min_files=1_024, digests=kept_digests(before, config, plan))
    return after, after == config


def test_a_role_runs_on_while_it_can_hear_of_other_routers() -> None:
    """From list to list, as long as one router is on both; not with other words, and not where none stays."""
    plans = [_connected("r1"), _connected("r1", "r2"), _connected("r3", "r2"), _connected("r4")]
    config = supervisord_conf(plans[0], min_files=1_024)
    for before, plan in itertools.pairwise(plans[:3]):
        config, is_same = _after(before, config, plan)
        assert is_same
    assert _after(plans[2], config, plans[2])[1]
    assert not _after(plans[2], config, plans[3])[1]
    assert not _after(plans[2], config, replace(plans[2], code="/other"))[1]
    named = replace(plans[2].roles[0], argv=(*plans[2].roles[0].argv[:-1], "v"))
    assert not _after(plans[2], config, replace(plans[2], roles=(named,)))[1]


def test_logs_are_bounded_and_only_a_crash_is_started_again() -> None:
    """An end with code 0 is a role that was drained, and stays away."""
    program = conf(PLAN)["program:worker-a-0"]
    assert (program["stdout_logfile_maxbytes"], program["stdout_logfile_backups"]) == (str(10 << 20), "3")
    assert (program["autorestart"], program["exitcodes"]) == ("unexpected", "0")


def test_a_plan_survives_the_way_to_the_host() -> None:
    """It is read there as it was written here."""
    assert read_file(HostPlan, asdict(PLAN), "plan") == PLAN


def test_a_role_runs_where_it_is_told_to_and_finds_no_module_there(tmp_path: Path) -> None:
    """A user's file with a module's name is not that module; a folder that is gone is no obstacle."""
    (tmp_path / "router.py").write_text("raise SystemExit('shadowed')")
    role = replace(ROLE, argv=("-c", "import os, router; print(os.getcwd())"), env=())
    plan = replace(PLAN, code=str(Path(__file__).parents[3]), cwd=str(tmp_path))
    path = tmp_path / "role.sh"
    path.write_text(script(role, plan))
    done = subprocess.run(["sh", str(path)], capture_output=True, text=True, check=True)
    assert done.stdout == f"{tmp_path}\n"

    path.write_text(script(role, replace(plan, cwd=str(tmp_path / "gone"))))
    assert subprocess.run(["sh", str(path)], capture_output=True, text=True, check=True).stdout == "/\n"
