"""Batches that are brought to the device by a thread of their own, while the one before runs."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pytest

from gpu_worker.serve.compute import ComputeGpu
from profiles.table import load_profile
from superserve.clock import MS, SECOND
from superserve.wire import Status
from tests.clock import VirtualClock
from tests.gpu_worker.serve.test_emulated import WAIT_S, Doubler, directive, payload

if TYPE_CHECKING:
    from collections.abc import Sequence

PROFILE = load_profile("cnn-8gpu-modelled")


class FakeDevice(Doubler):
    """A device with two buffers, that runs staged batches when the test opens it; counts what happens."""

    def __init__(self) -> None:
        super().__init__()
        self.free = threading.Semaphore(2)
        self.staged = threading.Semaphore(0)
        self.open = threading.Event()
        self.n_run = self.n_discarded = 0
        self.fails_to_stage = False

    def stage(self, batch: npt.NDArray[Any] | Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
        """Take a buffer."""
        if self.fails_to_stage:
            raise MemoryError("no room")
        assert self.free.acquire(timeout=WAIT_S)
        self.staged.release()
        return np.array(batch)

    def run(self, subnet: int, staged: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Wait for the test, run, and give the buffer back."""
        assert self.open.wait(WAIT_S)
        self.n_run += 1
        self.free.release()
        return super().execute(subnet, staged)

    def discard(self, staged: npt.NDArray[Any]) -> None:
        """Give the buffer back."""
        assert staged is not None
        self.n_discarded += 1
        self.free.release()


@pytest.fixture
def woken() -> threading.Semaphore:
    """Released for each report."""
    return threading.Semaphore(0)


def gpu_of(device: FakeDevice, clock: VirtualClock, woken: threading.Semaphore) -> ComputeGpu:
    """Return a GPU with both its threads running."""
    gpu = ComputeGpu(device, PROFILE, clock, woken.release, stager=device)
    gpu.start()
    return gpu


def test_the_next_batch_is_staged_while_one_runs(woken: threading.Semaphore) -> None:
    """The second batch is on the device before the first has ended, and both answer in order."""
    device, clock = FakeDevice(), VirtualClock()
    gpu = gpu_of(device, clock, woken)
    try:
        for number in (1, 2):
            gpu.submit(directive(number, 0, (SECOND,) * 2, [payload(number)] * 2), clock.now_ns())
        for _ in range(2):
            assert device.staged.acquire(timeout=WAIT_S)
        assert device.n_run == 0
        device.open.set()
        for _ in range(2):
            assert woken.acquire(timeout=WAIT_S)
        first, second = gpu.finish_due(clock.now_ns())
    finally:
        device.open.set()
        gpu.close()

    assert np.frombuffer(first.row.output, "<f4").tolist() == [2] * 4
    assert np.frombuffer(second.row.output, "<f4").tolist() == [4] * 4
    assert (device.n_run, device.n_discarded) == (2, 0)


def test_every_buffer_comes_back(woken: threading.Semaphore) -> None:
    """Of twelve batches, some expired, some of a wrong size, some at fault: none keeps a buffer."""
    device, clock = FakeDevice(), VirtualClock()
    gpu = gpu_of(device, clock, woken)
    kinds = ["good", "expired", "short", "bad"] * 3
    try:
        for number, kind in enumerate(kinds, start=1):
            slack_ns = 1 * MS if kind == "expired" else 10 * SECOND
            sent = {"short": b"abc", "bad": payload(-1)}.get(kind, payload(1))
            gpu.submit(directive(number, 0, (slack_ns,) * 2, [payload(1), sent]), clock.now_ns())
            clock.advance(2 * MS if kind == "expired" else 0)
            device.open.set()
            assert woken.acquire(timeout=WAIT_S)
        found = gpu.finish_due(clock.now_ns())
    finally:
        gpu.close()

    assert [bytes(one.row.statuses or bytes(2))[1] for one in found if one.n_run] == [
        {"good": Status.OK, "short": Status.INVALID, "bad": Status.FAILED}[kind]
        for kind, one in zip(kinds, found, strict=True)
        if one.n_run
    ]
    assert device.free.acquire(timeout=0)
    assert device.free.acquire(timeout=0)
    assert not device.free.acquire(blocking=False)


def test_what_is_forgotten_is_discarded(woken: threading.Semaphore) -> None:
    """A staged batch that another worker has got now gives its buffer back without running."""
    device, clock = FakeDevice(), VirtualClock()
    gpu = gpu_of(device, clock, woken)
    try:
        for number in (1, 2):
            gpu.submit(directive(number, 0, (SECOND,), [payload(1)]), clock.now_ns())
            assert device.staged.acquire(timeout=WAIT_S)
        gpu.forget_held()
        device.open.set()
        for _ in range(2):
            assert woken.acquire(timeout=WAIT_S)
    finally:
        device.open.set()
        gpu.close()

    assert device.n_run + device.n_discarded == 2
    assert device.n_discarded >= 1


def test_a_batch_that_cannot_be_staged_is_run_from_here(woken: threading.Semaphore) -> None:
    """No room on the device for a whole batch costs it the head start, not its answers."""
    device, clock = FakeDevice(), VirtualClock()
    device.fails_to_stage = True
    gpu = gpu_of(device, clock, woken)
    try:
        gpu.submit(directive(1, 0, (SECOND,), [payload(3)]), clock.now_ns())
        assert woken.acquire(timeout=WAIT_S)
        (only,) = gpu.finish_due(clock.now_ns())
    finally:
        gpu.close()

    assert np.frombuffer(only.row.output, "<f4").tolist() == [6, 6]
    assert (device.n_run, device.n_discarded) == (0, 0)


def test_the_model_is_prepared_in_the_thread_that_runs_it(woken: threading.Semaphore) -> None:
    """What a library keeps for each thread is then there when the first batch comes."""
    device, clock = FakeDevice(), VirtualClock()
    device.open.set()
    names: list[str] = []
    gpu = ComputeGpu(device, PROFILE, clock, woken.release, stager=device)
    gpu.start(lambda: names.append(threading.current_thread().name))
    try:
        assert names == ["compute"]
        gpu.submit(directive(1, 0, (SECOND,), [payload(3)]), clock.now_ns())
        assert woken.acquire(timeout=WAIT_S)
    finally:
        gpu.close()


def test_a_model_that_cannot_be_prepared_starts_nothing(woken: threading.Semaphore) -> None:
    """Its error reaches whoever started it, and no thread is left."""
    before = threading.active_count()

    def fail() -> None:
        raise MemoryError("160 graphs do not fit")

    device = FakeDevice()
    with pytest.raises(MemoryError, match="160 graphs"):
        ComputeGpu(device, PROFILE, VirtualClock(), woken.release, stager=device).start(fail)

    assert threading.active_count() == before
