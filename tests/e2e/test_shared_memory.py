"""Large payloads through shared memory: the answers are the same as in frames, and nothing is left behind."""

from __future__ import annotations

import asyncio
import hashlib
import signal
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import pytest

from superserve.client.aio import AsyncClient
from superserve.client.client import Client
from superserve.net import keys as key_files
from superserve.net.connection import ask_status
from superserve.roles import processes
from superserve.roles.processes import ProcessGroup
from tests.e2e.digest_worker import INPUT
from tests.paths import ROOT
from tests.superserve.client.fakes import WAIT_S, poll
from tests.superserve.shared.descriptors import memories_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

SLO_MS = 60_000.0


class Digests:
    """A router, and workers whose answers depend on every byte of a payload.

    Attributes:
        router: Its process.
        workers: Their processes.
        client_keys: The client's key file, or "".
    """

    def __init__(self, group: ProcessGroup, folder: Path | None, sharing: Sequence[bool]) -> None:
        argv, self.client_keys, worker_keys = ["-m", "router"], "", ""
        if folder is not None:
            key_files.make_ring(folder)
            self.client_keys = str(key_files.add_peer(folder, "client", "c")[0])
            worker_keys = str(key_files.add_peer(folder, "worker", "w")[0])
            argv += ["--keys", str(folder)]
        self.router = group.start("router", argv)
        processes.wait_ready(self.router, WAIT_S)
        self.workers = []
        for i, is_sharing in enumerate(sharing):
            name = f"digests-{i}"
            module = ["-m", "tests.e2e.digest_worker", self.router.ready["worker"], name, worker_keys]
            self.workers.append(
                group.start(name, [*module, str(int(is_sharing))], env={"PYTHONPATH": str(ROOT)})
            )
        for worker in self.workers:
            processes.wait_ready(worker, WAIT_S)

    def counts(self) -> dict[str, int]:
        """Return the router's counts."""
        return ask_status(self.router.ready["client"], timeout_s=WAIT_S, keys=self.client_keys).counts


@contextmanager
def digests(folder: Path | None = None, sharing: Sequence[bool] = (True,)) -> Iterator[Digests]:
    """Run them; all are alive at the end."""
    with ProcessGroup() as group:
        found = Digests(group, folder, sharing)
        yield found
        for role in (found.router, *found.workers):
            assert role.poll() in (None, 0), role.tail()


def payloads(n: int) -> list[np.ndarray]:
    """Return n inputs that differ."""
    rng = np.random.default_rng(7)
    return list(rng.integers(0, 256, (n, *INPUT.shape), dtype=np.uint8))


def expected(inputs: Sequence[np.ndarray]) -> list[bytes]:
    """Return what the model answers."""
    return [hashlib.sha256(one.tobytes()).digest() for one in inputs]


def ask(client: Client, inputs: Sequence[np.ndarray]) -> list[bytes]:
    """Submit all at once, cancel every fifth, and return the answers to the others, in order."""
    futures = [client.submit(one, slo_ms=SLO_MS) for one in inputs]
    for i, future in enumerate(futures):
        if i % 5 == 4:
            future.cancel()
    return [future.result(WAIT_S).output.tobytes() for i, future in enumerate(futures) if i % 5 != 4]


def without_cancelled(answers: list[bytes]) -> list[bytes]:
    """Return what `ask` returns."""
    return [answer for i, answer in enumerate(answers) if i % 5 != 4]


def test_answers_are_those_of_payloads_in_frames() -> None:
    """Burst after burst, with cancels, from both clients, and one that is larger than the memory."""
    inputs = payloads(60)
    right = expected(inputs)
    with digests() as served:
        endpoint = served.router.ready["client"]
        with Client(endpoint, shared_memory=False) as in_frames:
            assert ask(in_frames, inputs) == without_cancelled(right)
        assert served.counts().get("shared_payloads", 0) == 0
        with Client(endpoint) as client:
            for _ in range(12):
                assert ask(client, inputs) == without_cancelled(right)

            async def gather() -> list[bytes]:
                async with AsyncClient(endpoint) as other:
                    replies = [await other.infer(one, slo_ms=SLO_MS) for one in inputs[:20]]
                    return [reply.output.tobytes() for reply in replies]

            assert asyncio.run(gather()) == right[:20]
            burst = inputs * 8  # 72 MB: the memory holds 64
            assert ask(client, burst) == without_cancelled(right * 8)
        counts = served.counts()
        assert counts["shared_payloads"] > 600
        assert counts.get("refused_payloads", 0) == counts.get("malformed", 0) == 0
        assert counts["copied_payloads"] < counts["shared_payloads"] / 4
        poll(lambda: memories_of(served.router.pid) == 0)
        poll(lambda: memories_of(served.workers[0].pid) == 0)


def test_keyed_peers_share_and_a_worker_that_may_not_gets_copies(tmp_path: Path) -> None:
    """With keys as without; of two workers one is as on another host, and both give the right answers."""
    inputs = payloads(40)
    with digests(tmp_path / "keys", sharing=(True, False)) as served:
        with Client(served.router.ready["client"], keys=served.client_keys) as client:
            for _ in range(3):
                assert ask(client, inputs) == without_cancelled(expected(inputs))
        counts = served.counts()
        assert counts["shared_payloads"] > 0
        assert counts["copied_payloads"] > 0
        assert memories_of(served.workers[1].pid) == 0


CLIENT = """
import sys, numpy as np
from superserve.client.client import Client
client = Client(sys.argv[1])
client.connect()
image = np.zeros(150528, np.uint8)
for _ in range(3):
    client.infer(image, slo_ms=60000)
futures = [client.submit(image, slo_ms=60000) for _ in range(200)]
futures[0].result()
print("there", flush=True)
sys.stdin.read()
"""


def test_a_client_that_is_killed_leaves_nothing_behind() -> None:
    """In the middle of a burst: router and worker close its memory, and with that the kernel frees it."""
    with digests() as served:
        endpoint = served.router.ready["client"]
        argv = [sys.executable, "-c", CLIENT, endpoint]
        with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"there\n"
            assert memories_of(served.router.pid) == memories_of(served.workers[0].pid) == 1
            process.send_signal(signal.SIGKILL)
            process.wait()

        poll(lambda: memories_of(served.router.pid) == 0)
        poll(lambda: memories_of(served.workers[0].pid) == 0)
        inputs = payloads(5)
        with Client(endpoint) as client:
            assert ask(client, inputs) == without_cancelled(expected(inputs))


def test_a_worker_in_another_namespace_of_processes_gets_copies() -> None:
    """As in a container of its own: the client's process has another number there, and the nonce tells."""
    if subprocess.run(["unshare", "--pid", "--fork", "true"], check=False, capture_output=True).returncode:
        pytest.skip("this user may make no namespaces")
    inputs = payloads(20)
    with ProcessGroup() as group:
        router = group.start("router", ["-m", "router"])
        processes.wait_ready(router, WAIT_S)
        argv = [
            "unshare", "--pid", "--fork", "--kill-child", "--mount-proc", sys.executable, "-c",
            "import sys; from tests.e2e.digest_worker import main; main(*sys.argv[1:], has_parent=False)",
            router.ready["worker"], "contained", "", "1",
        ]  # fmt: skip
        with subprocess.Popen(argv, cwd=ROOT, stderr=subprocess.DEVNULL) as worker:
            try:
                with Client(router.ready["client"]) as client:
                    poll(lambda: bool(ask_status(router.ready["client"], timeout_s=WAIT_S).workers_ready))
                    for _ in range(3):
                        assert ask(client, inputs) == without_cancelled(expected(inputs))
                counts = ask_status(router.ready["client"], timeout_s=WAIT_S).counts
            finally:
                worker.kill()
    assert counts["shared_payloads"] > 0
    assert counts["copied_payloads"] >= counts["shared_payloads"] * 3 // 5
