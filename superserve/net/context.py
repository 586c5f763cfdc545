"""Our own ZeroMQ contexts, and a check for free file descriptors and threads before ZeroMQ takes any.

An application may do anything to `zmq.Context.instance()`: terminate it, which blocks while one of our
sockets is open, or give its sockets an identity, which two of ours must not share. So all clients of a
process share a private context. And libzmq aborts the process if it finds no descriptor for its own
threads, or cannot start them, so every place that makes sockets checks here first.
"""

from __future__ import annotations

import os
import resource
import threading

import zmq

from superserve.errors import ConfigError

CONNECTION_DESCRIPTORS = 16
"""The first client of a process takes 10: 5 for ZeroMQ's threads, and 5 for its own sockets, wake-up
and connection. The rest is for other code that opens files at the same moment."""

_ZMQ_THREADS = 2
"""One that moves messages, and one that closes sockets."""

_MAX_SOCKETS = 65_535
"""ZeroMQ's own limit. Its default of 1,023 is reached at 341 clients, as a ZMQError that names no limit."""


def check_descriptors(what: str) -> None:
    """Raise ConfigError, about `what`, unless this process can open the descriptors of a connection."""
    if not has_descriptors(CONNECTION_DESCRIPTORS):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        raise ConfigError(
            f"{what}: needs {CONNECTION_DESCRIPTORS} file descriptors, and fewer are left: this process may"
            f" open {soft} (RLIMIT_NOFILE; it may ask for {hard}): close some, or raise the limit with"
            " `ulimit -n`"
        )


def has_descriptors(n: int) -> bool:
    """Return whether this process can open `n` more file descriptors; opens and closes them to find out."""
    opened: list[int] = []
    try:
        while len(opened) < n:
            opened.append(os.eventfd(0, os.EFD_CLOEXEC))
    except OSError:  # of the process (EMFILE) or the whole machine (ENFILE)
        return False
    finally:
        for fd in opened:
            os.close(fd)
    return True


def new_context() -> zmq.Context[zmq.Socket[bytes]]:
    """Return a context whose threads can be started, and have the descriptors that they need.

    Raises:
        ConfigError: They cannot be started: libzmq would abort the process at its first socket.
    """
    check_descriptors("ZeroMQ")
    if not has_threads(_ZMQ_THREADS):
        raise ConfigError(
            f"ZeroMQ needs {_ZMQ_THREADS} threads, and this user may start no more: end some processes, or "
            f"raise the limit with `ulimit -u`; containers have one of their own"
        )
    return zmq.Context()


def has_threads(n: int) -> bool:
    """Return whether this process can start `n` more threads; starts and ends them to find out."""
    is_over = threading.Event()
    threads: list[threading.Thread] = []
    try:
        while len(threads) < n:
            thread = threading.Thread(target=is_over.wait, daemon=True)
            thread.start()
            threads.append(thread)
    except RuntimeError:  # how Python reports it
        return False
    finally:
        is_over.set()
        for thread in threads:
            thread.join()
    return True


class _Shared:
    """The context that this process's clients share; a forked child makes a new one."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.context: zmq.Context[zmq.Socket[bytes]] | None = None


_shared = _Shared()


def _forget() -> None:
    """Leave the parent's context alone: its threads do not exist in the child, and its lock may be held."""
    global _shared  # noqa: PLW0603  # one a process
    _inherited.append(_shared)  # keep it: destroying it would wait for those threads
    _shared = _Shared()


_inherited: list[_Shared] = []
os.register_at_fork(after_in_child=_forget)


def client_context() -> zmq.Context[zmq.Socket[bytes]]:
    """Return the context that this process's clients share, and nothing else uses.

    Raises:
        ConfigError: Too few file descriptors or threads are left for another client.
    """
    shared = _shared
    with shared.lock:
        check_descriptors("a client")
        if shared.context is None or shared.context.closed:
            shared.context = new_context()
            shared.context.set(zmq.MAX_SOCKETS, _MAX_SOCKETS)
        return shared.context
