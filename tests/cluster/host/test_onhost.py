"""What the launcher does on a host, with a real supervisord and roles that only wait."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from cluster.host.onhost import do
from cluster.remote.ask import answer, checked
from cluster.remote.shell import Completed
from cluster.spec.roles import HostPlan, HostRole, Timing
from superserve.roles.local import ProcessId

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[3]
WAIT_S = 60.0
_ASK_EVERY_S = 0.02
# Like every role: it dies with its parent, and ends with code 0 on SIGTERM.
BEGINS = (
    "import os, signal, sys, time; from superserve.roles.processes import announce_ready, die_with_parent; "
    "die_with_parent(); "
)
WAITS = BEGINS + (
    "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); announce_ready({}); print('waits', flush=True); "
    "[signal.pause() for _ in iter(int, 1)]"
)
QUICK = Timing(first_backoff_s=0.05, most_restarts=3, good_service_s=30.0, worker_stop_s=1.0)


class OneHost:
    """A folder of a host, and the module that works there."""

    def __init__(self, name: str = "") -> None:
        self.base = Path(tempfile.mkdtemp(prefix="ss", dir="/tmp"))
        self.folder = self.base / name
        self.folder.mkdir(exist_ok=True)
        self.timing = QUICK

    def plan(self, **codes: str) -> dict[str, Any]:
        """Return a plan of a role for each keyword: its name, and what Python it runs."""
        roles = tuple(
            HostRole(name, "router" if name == "router" else "worker", ("-c", code), (), "waiting")
            for name, code in codes.items()
        )
        plan = HostPlan(str(self.folder), sys.executable, str(ROOT), roles, 1 << 20, 1, timing=self.timing)
        return asdict(plan)

    def ask(self, verb: str, **asked: Any) -> dict[str, Any]:
        """Do a verb; what starts a keeper, in a process of its own as over ssh: the keeper outlives it."""
        asked = {"folder": str(self.folder), **asked}
        if verb != "apply":
            return checked("here", json.loads(json.dumps(do(verb, asked))))
        done = subprocess.run(
            [sys.executable, "-P", "-m", "cluster.host.onhost", verb], cwd=ROOT, text=True, check=True,
            input=json.dumps(asked), capture_output=True,
        )  # fmt: skip
        return answer("here", Completed(done.returncode, done.stdout.encode(), done.stderr))

    def apply(self, files: dict[str, str] | None = None, **codes: str) -> dict[str, str]:
        """Have roles run; return what changed."""
        changed: dict[str, str] = self.applied(files or {}, **codes)["changed"]
        return changed

    def applied(self, files: dict[str, str], **codes: str) -> dict[str, Any]:
        """Have roles run, with files beside them; return what changed of both."""
        return self.ask("apply", plan=self.plan(**codes), files=files)

    def pids(self) -> dict[str, int]:
        """Return the process of each role that has one."""
        return {role["name"]: role["pid"] for role in self.ask("states")["roles"] if role["pid"]}

    def running(self, *names: str) -> dict[str, int]:
        """Wait until exactly these roles have processes; return them."""
        give_up_s = time.monotonic() + WAIT_S
        while (found := self.pids()).keys() != set(names):
            assert time.monotonic() < give_up_s, self.ask("states")
            time.sleep(_ASK_EVERY_S)
        return found

    def state(self, name: str, wanted: str) -> dict[str, Any]:
        """Wait until supervisor reports this state of a role; return its report."""
        give_up_s = time.monotonic() + WAIT_S
        while True:
            roles: list[dict[str, Any]] = self.ask("states")["roles"]
            found = next(role for role in roles if role["name"] == name)
            if found["state"] == wanted:
                return found
            assert time.monotonic() < give_up_s, found
            time.sleep(_ASK_EVERY_S)


@pytest.fixture
def host() -> Iterator[OneHost]:
    """Give a host; everything on it is stopped."""
    here = OneHost("a b;%#'c" + "d" * 90)  # a name with a meaning elsewhere, too long for a socket
    try:
        yield here
    finally:
        here.ask("down")
        shutil.rmtree(here.base)


def test_only_what_differs_is_touched(host: OneHost) -> None:
    """The same plan again changes nothing; one role more, changed or fewer, changes that one."""
    assert host.apply(router=WAITS, one=WAITS) == {"router": "started", "one": "started"}
    first = host.running("router", "one")
    assert host.apply(router=WAITS, one=WAITS) == {}
    assert host.pids() == first

    assert host.apply(router=WAITS, one=WAITS, two=WAITS) == {"two": "started"}
    assert first.items() <= host.running("router", "one", "two").items()

    assert host.apply(router=WAITS, one=WAITS + " ", two=WAITS) == {"one": "restarted"}
    third = host.running("router", "one", "two")
    assert third["router"] == first["router"]
    assert third["one"] != first["one"]

    assert host.apply(router=WAITS, two=WAITS) == {"one": "stopped"}
    assert host.running("router", "two")["two"] == third["two"]


def test_what_ran_before_comes_back(host: OneHost) -> None:
    """`undo` after a change puts it back; after a first start nothing is left."""
    host.apply(one=WAITS)
    before = host.running("one")
    host.apply(one=WAITS, two=WAITS)
    host.running("one", "two")
    host.ask("undo")
    assert host.running("one") == before

    host.ask("down")
    host.apply(one=WAITS)
    host.ask("undo")
    assert host.ask("states")["supervisord"] is None


def test_down_ends_every_process_and_says_which(host: OneHost) -> None:
    """Only the router first, if asked; then all, supervisord included; a second time changes nothing."""
    host.apply(router=WAITS, one=WAITS)
    pids = host.running("router", "one")
    supervisord = host.ask("states")["supervisord"]

    assert host.ask("down", kind="router")["stopped"] == [["router", pids["router"]]]
    assert host.ask("down")["stopped"] == [["one", pids["one"]]]
    assert [pid for pid in (supervisord, *pids.values()) if ProcessId.of(pid) is not None] == []
    assert host.ask("down")["stopped"] == []


def test_a_role_that_was_drained_stays_away_and_up_starts_it(host: OneHost) -> None:
    """Exit code 0 is no crash; the next `apply` starts it again, and says what it was."""
    host.apply(one=WAITS)
    pid = host.state("one", "RUNNING")["pid"]
    host.ask("stop", role="one")
    assert host.state("one", "STOPPED")["pid"] is None
    assert host.apply(one=WAITS) == {"one": "started (was STOPPED)"}
    assert host.running("one")["one"] != pid


def test_a_role_that_cannot_start_is_given_up_with_its_last_words(host: OneHost) -> None:
    """What ends before it was ever ready is FATAL at once, and `states` has the end of its log."""
    host.apply(one="print('no memory for %s; really' % '[weights]'); raise SystemExit(7)")
    found = host.state("one", "FATAL")
    assert found["tail"] == ["no memory for [weights]; really"]
    assert "ended with exit code 7 before it was ready; its log" in found["why"]
    assert (found["restarts"], found["exit"]) == (0, 7)


def test_a_role_that_serves_for_a_while_and_crashes_each_time_is_given_up(host: OneHost) -> None:
    """Supervisor would start it for ever: it lives longer than any start takes. Its lives are in its log."""
    host.apply(one=BEGINS + "announce_ready({}); print('life', flush=True); time.sleep(0.3); sys.exit(9)")
    found = host.state("one", "FATAL")
    assert found["restarts"] == QUICK.most_restarts
    assert "ended with exit code 9 while it was needed" in found["why"]
    assert (host.folder / "one.log").read_text().count("life") == QUICK.most_restarts + 1


def test_good_service_forgets_crashes(host: OneHost) -> None:
    """A role that was ready for long enough begins again at the first back-off."""
    host.timing = replace(QUICK, good_service_s=0.1, most_restarts=1)
    host.apply(one=BEGINS + "announce_ready({}); time.sleep(0.3); sys.exit(9)")
    give_up_s = time.monotonic() + WAIT_S
    while host.ask("states")["roles"][0]["restarts"] < 3:
        assert time.monotonic() < give_up_s
        time.sleep(_ASK_EVERY_S)


def test_a_role_that_is_started_again_and_hangs_is_ended(host: OneHost) -> None:
    """It was ready once: now it counts as crashed when it is not ready in time."""
    host.timing = replace(QUICK, ready_timeout_s=0.5, most_restarts=1)
    path = host.base / "once"
    host.apply(
        one=BEGINS
        + f"""
path = {str(path)!r}
if os.path.exists(path): time.sleep(600)
open(path, "w").close(); announce_ready({{}}); time.sleep(0.2); sys.exit(3)"""
    )
    assert "was not ready again within 0.5 s" in host.state("one", "FATAL")["why"]


def test_a_role_that_does_not_end_is_killed(host: OneHost) -> None:
    """After its grace period, and `states` has that."""
    host.apply(
        one=BEGINS + "signal.signal(signal.SIGTERM, signal.SIG_IGN); announce_ready({}); time.sleep(600)"
    )
    host.state("one", "RUNNING")
    host.ask("stop", role="one")
    assert "did not end in time when asked to stop, and was killed" in host.state("one", "STOPPED")["why"]


def test_a_role_that_leaves_stays_away(host: OneHost) -> None:
    """Exit code 0 of its own accord is no crash."""
    host.apply(one=WAITS)
    os.kill(host.state("one", "RUNNING")["pid"], signal.SIGTERM)
    assert host.state("one", "EXITED")["restarts"] == 0
    assert host.apply(one=WAITS) == {"one": "started (was EXITED)"}


def test_what_concerns_the_keeper_alone_is_closed_to_roles(host: OneHost) -> None:
    """A role has its output and the pipe for its readiness, and no socket of its parent's."""
    host.apply(
        one=BEGINS
        + "print(sorted(os.listdir('/proc/self/fd')), flush=True); announce_ready({}); time.sleep(600)"
    )
    host.state("one", "RUNNING")
    # The last is the descriptor of the listing itself.
    assert host.ask("tail", role="one", lines=1)["lines"] == ["['0', '1', '2', '3', '4']"]


def test_roles_die_with_their_supervisor_even_by_sigkill(host: OneHost) -> None:
    """No orphan holds a port or a GPU, and the next `apply` starts all roles again."""
    host.apply(one=WAITS)
    pid = host.running("one")["one"]
    role = ProcessId.of(pid)
    assert role is not None
    os.kill(host.ask("states")["supervisord"], signal.SIGKILL)
    give_up_s = time.monotonic() + WAIT_S
    while role.is_alive():
        assert time.monotonic() < give_up_s
        time.sleep(_ASK_EVERY_S)
    assert host.apply(one=WAITS) == {"one": "started"}


def test_files_are_for_this_user_alone_and_no_more_than_told(host: OneHost) -> None:
    """What `up` no longer sends, such as a revoked key, is gone."""
    secret = base64.b64encode(b"secret").decode()
    host.apply(files={"keys/a.key": secret, "keys/workers/b.pub": secret}, one=WAITS)
    path = host.folder / "keys/a.key"
    assert path.read_bytes() == b"secret"
    assert path.stat().st_mode & 0o777 == 0o600
    assert (host.folder / "keys").stat().st_mode & 0o777 == 0o700

    host.apply(files={"keys/workers/b.pub": secret}, one=WAITS)
    assert [file.name for file in host.folder.glob("keys/**/*") if file.is_file()] == ["b.pub"]


def test_other_files_restart_nothing_and_replace_the_old_ones_whole(host: OneHost) -> None:
    """Lists of keys change beside roles that watch them: a reader has the old file or the new one."""
    first, second = (base64.b64encode(text).decode() for text in (b"first", b"second"))
    host.apply(files={"keys/clients/a.pub": first, "keys/clients/b.pub": first}, one=WAITS)
    before = host.running("one")
    path = host.folder / "keys/clients/b.pub"
    with path.open("rb") as reader:
        said = host.applied({"keys/clients/b.pub": second}, one=WAITS)
        assert reader.read() == b"first"
    assert said == {"changed": {}, "files": ["keys/clients/a.pub", "keys/clients/b.pub"]}
    assert path.read_bytes() == b"second"
    assert host.pids() == before
    assert host.applied({"keys/clients/b.pub": second}, one=WAITS) == {"changed": {}, "files": []}
