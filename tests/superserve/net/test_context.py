"""ZeroMQ is asked for nothing that this process cannot give it: libzmq would abort."""

from __future__ import annotations

import resource
import threading
from pathlib import Path

import pytest

from superserve.errors import ConfigError
from superserve.net import context


def test_no_threads_left_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a container or a user may have so many processes: an error, and what to raise."""
    started: list[threading.Thread] = []
    start = threading.Thread.start

    def refuse_the_second(thread: threading.Thread) -> None:
        if started:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse_the_second)
    with pytest.raises(ConfigError, match=r"ZeroMQ needs 2 threads, .*`ulimit -u`"):
        context.new_context()
    assert not started[0].is_alive()


def test_few_descriptors_are_an_error() -> None:
    """Named with the limit, in every role: without, it shows as an error of some call or an abort."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    n_open = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (n_open + 4, before[1]))
    try:
        with pytest.raises(ConfigError, match=r"ZeroMQ: needs 16 file descriptors, .* `ulimit -n`"):
            context.new_context()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_threads_that_were_tried_are_gone() -> None:
    """Asking leaves none behind."""
    before = threading.active_count()
    assert context.has_threads(3)
    assert threading.active_count() == before
    context.new_context().term()
