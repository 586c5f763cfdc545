"""A network that jitters, on one machine: a router apart, and a relay that delays each packet.

    enter_private_network()              # before ZeroMQ starts its threads
    with apart(4 * MS) as far:
        with far.there():
            router = group.start("router", [..., "--client-endpoint", f"tcp://{far.address}:*"])

The router lives in another network namespace than its clients and workers. What they send each other are
the kernel's own IP packets, through a TUN device in each namespace; between the two, a process holds each
packet for a time drawn uniformly up to the jitter. Packets of one connection and direction keep their order,
as on a wire: TCP would take others for lost. So what is delayed, and how ZeroMQ and TCP respond, is real.

A namespace belongs to a thread, and the threads and processes that it starts inherit it. ZeroMQ's I/O
threads are started with its first socket. Hence this process moves to a namespace first, with all that it
will start. Needs Linux, root (CAP_SYS_ADMIN, CAP_NET_ADMIN) and /dev/net/tun.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import heapq
import os
import random
import select
import socket
import struct
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from superserve.clock import SECOND
from superserve.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE, FAR = "10.99.0.2", "10.99.0.1"
"""Addresses of clients and workers, and of the router. Both namespaces are private: nothing can collide."""

_CLONE_NEWNET = 0x4000_0000  # <sched.h>
_TUNSETIFF = 0x4004_54CA  # <linux/if_tun.h>
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000
_SET_FLAGS, _SET_ADDRESS, _SET_PEER, _SET_MASK = 0x8914, 0x8916, 0x8918, 0x891C  # <linux/sockios.h>
_UP, _POINT_TO_POINT, _RUNNING = 0x1, 0x10, 0x40
_OWN_NAMESPACE = "/proc/thread-self/ns/net"
_MOST_BYTES = 65_536
_ADDRESSES = slice(12, 20)  # of an IPv4 header: source and destination
_N_PORT_BYTES = 4  # both ports come first behind it, in TCP and UDP
_MOST_WAIT_S = 1.0


# --- namespaces ---------------------------------------------------------------------------------


def enter_private_network() -> None:
    """Move this thread, and what it will start, to a network namespace that has a loopback only.

    Nothing can be undone: call it early in a process whose network is nobody else's.

    Raises:
        ConfigError: The kernel refuses.
    """
    _unshare()
    _configure("lo", ((_SET_FLAGS, _flags(_UP | _RUNNING)),))


@dataclass(frozen=True, slots=True)
class Far:
    """The other namespace.

    Attributes:
        address: Of its only host, as this side reaches it.
        namespace: Its file descriptor.
        home: That of this side's namespace.
    """

    address: str
    namespace: int
    home: int

    @contextlib.contextmanager
    def there(self) -> Iterator[None]:
        """Be in the other namespace for a block: this thread, and what it starts meanwhile."""
        _enter(self.namespace)
        try:
            yield
        finally:
            _enter(self.home)


@contextlib.contextmanager
def apart(jitter_ns: int, seed: int = 0) -> Iterator[Far]:
    """Make a namespace beside this thread's, and a relay between them that delays packets.

    Args:
        jitter_ns: Each packet takes up to this much longer, uniformly.
        seed: Of the draws.

    Raises:
        ConfigError: The kernel refuses.
    """
    with contextlib.ExitStack() as stack:
        home = _opened(stack)
        here = _tun(stack, "near", HERE, FAR)
        _unshare()
        stack.callback(_enter, home)
        there = _tun(stack, "far", FAR, HERE)
        far = Far(FAR, _opened(stack), home)
        _enter(home)
        relay = _relay_process(here, there, jitter_ns, seed)
        stack.callback(_end, relay)
        yield far


def _opened(stack: contextlib.ExitStack) -> int:
    descriptor = os.open(_OWN_NAMESPACE, os.O_RDONLY | os.O_CLOEXEC)
    stack.callback(os.close, descriptor)
    return descriptor


def _unshare() -> None:
    _call("unshare", _CLONE_NEWNET)


def _enter(namespace: int) -> None:
    _call("setns", namespace, _CLONE_NEWNET)


def _call(name: str, *arguments: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) != 0:
        raise _refused(name, OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno())))


def _refused(what: str, error: OSError) -> ConfigError:
    return ConfigError(
        f"jitter: {what}: {error.strerror}; live jitter makes network namespaces: expected root, "
        "or a container with CAP_SYS_ADMIN, CAP_NET_ADMIN and /dev/net/tun"
    )


# --- devices ------------------------------------------------------------------------------------


def _tun(stack: contextlib.ExitStack, name: str, own: str, peer: str) -> int:
    """Make a TUN device in this thread's namespace; return what reads and writes its packets."""
    try:
        descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        stack.callback(os.close, descriptor)
        fcntl.ioctl(
            descriptor, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI)
        )  # fmt: skip
    except OSError as error:
        raise _refused("/dev/net/tun", error) from None
    _configure(
        name,
        (
            (_SET_ADDRESS, _address(own)),
            (_SET_PEER, _address(peer)),
            (_SET_MASK, _address("255.255.255.255")),
            (_SET_FLAGS, _flags(_UP | _RUNNING | _POINT_TO_POINT)),
        ),
    )
    return descriptor


def _configure(name: str, requests: tuple[tuple[int, bytes], ...]) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        for number, value in requests:
            try:
                fcntl.ioctl(control.fileno(), number, struct.pack("16s", name.encode()) + value)
            except OSError as error:
                raise _refused(f"device {name}", error) from None


def _address(dotted: str) -> bytes:
    return struct.pack("HH4s16x", socket.AF_INET, 0, socket.inet_aton(dotted))


def _flags(flags: int) -> bytes:
    return struct.pack("H22x", flags)


# --- the relay ----------------------------------------------------------------------------------


class JitteringRelay:
    """What is on its way: packets, each until its instant. Knows no files and no clock.

    Args:
        jitter_ns: A packet takes uniformly up to this.
        seed: Of the draws.
    """

    def __init__(self, jitter_ns: int, seed: int) -> None:
        self._jitter_ns = jitter_ns
        self._draw = random.Random(seed).random
        self._waiting: list[tuple[int, int, int, bytes]] = []
        self._last_ns: dict[bytes, int] = {}
        self._n = 0

    def take(self, packet: bytes, towards: int, now_ns: int) -> None:
        """Let a packet set out at `now_ns`, with where it goes."""
        flow = _flow(packet)
        at_ns = max(now_ns + int(self._jitter_ns * self._draw()), self._last_ns.get(flow, 0))
        self._last_ns[flow] = at_ns
        self._n += 1  # so that packets of one instant keep their order
        heapq.heappush(self._waiting, (at_ns, self._n, towards, packet))

    def due(self, now_ns: int) -> Iterator[tuple[int, bytes]]:
        """Yield what has arrived by `now_ns`: where it goes, and the packet."""
        while self._waiting and self._waiting[0][0] <= now_ns:
            _, _, towards, packet = heapq.heappop(self._waiting)
            yield towards, packet

    def next_ns(self) -> int | None:
        """Return the next arrival's instant, or None if nothing is on its way."""
        return self._waiting[0][0] if self._waiting else None


def _flow(packet: bytes) -> bytes:
    """Return what tells a connection and its direction: addresses and ports of an IPv4 packet."""
    end = (packet[0] & 0x0F) * 4  # the header's length, in words of four bytes
    return packet[_ADDRESSES] + packet[end : end + _N_PORT_BYTES]


def _relay_process(here: int, there: int, jitter_ns: int, seed: int) -> subprocess.Popen[bytes]:
    """Start the relay; it ends when this process closes its standard input, however it ends."""
    return subprocess.Popen(
        [sys.executable, "-m", "loadgen.live.jitter", *map(str, (here, there, jitter_ns, seed))],
        stdin=subprocess.PIPE, pass_fds=(here, there), start_new_session=True,
    )  # fmt: skip


def _end(relay: subprocess.Popen[bytes]) -> None:
    assert relay.stdin is not None
    relay.stdin.close()
    relay.wait()


def _pass_on(here: int, there: int, relay: JitteringRelay) -> None:
    """Pass packets between two devices until standard input ends."""
    opposite, stdin = {here: there, there: here}, sys.stdin.fileno()
    while True:
        next_ns = relay.next_ns()
        wait_s = _MOST_WAIT_S if next_ns is None else max(0, next_ns - time.monotonic_ns()) / SECOND
        # select() takes microseconds, where poll() rounds up to a millisecond.
        readable, _, _ = select.select([here, there, stdin], [], [], wait_s)
        if stdin in readable:
            return
        for device in readable:
            with contextlib.suppress(BlockingIOError):
                while True:
                    relay.take(os.read(device, _MOST_BYTES), opposite[device], time.monotonic_ns())
        for towards, packet in relay.due(time.monotonic_ns()):
            with contextlib.suppress(
                OSError
            ):  # a full queue loses a packet, as a wire does; TCP sends it again
                os.write(towards, packet)


@click.command()
@click.argument("here", type=int)
@click.argument("there", type=int)
@click.argument("jitter_ns", type=int)
@click.argument("seed", type=int)
def main(here: int, there: int, jitter_ns: int, seed: int) -> None:
    """Pass packets between two TUN devices, open as these descriptors. `apart` starts this."""
    _pass_on(here, there, JitteringRelay(jitter_ns, seed))


if __name__ == "__main__":
    main()
