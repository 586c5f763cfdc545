"""A network that jitters: order and bounds of the relay, and a run across two namespaces."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadgen.live.jitter import JitteringRelay
from superserve.clock import MS

JITTER_NS = 4 * MS
MANY = 200


def packet(port: int, number: int = 0, n_option_words: int = 0) -> bytes:
    """Return an IPv4 packet from a port, with a number as its contents."""
    header = bytearray(20 + 4 * n_option_words)
    header[0] = 0x40 | (5 + n_option_words)
    header[12:20] = bytes([10, 99, 0, 2, 10, 99, 0, 1])
    return bytes(header) + port.to_bytes(2, "big") + (5_555).to_bytes(2, "big") + number.to_bytes(4, "big")


@given(seed=st.integers(0, 1_000), gaps=st.lists(st.integers(0, MS), min_size=1, max_size=50))
def test_packets_of_a_connection_keep_their_order_and_none_takes_longer(seed: int, gaps: list[int]) -> None:
    """Each arrives within the jitter of when it set out, and not before it."""
    relay, now_ns, sent = JitteringRelay(JITTER_NS, seed), 0, []
    arrived: list[tuple[int, bytes]] = []
    for number, gap_ns in enumerate(gaps):
        now_ns += gap_ns
        relay.take(packet(1, number), 7, now_ns)
        sent.append((now_ns, packet(1, number)))
    while (at_ns := relay.next_ns()) is not None:
        arrived += [(at_ns, data) for _, data in relay.due(at_ns)]

    assert [data for _, data in arrived] == [data for _, data in sent]
    for (left_ns, _), (at_ns, _) in zip(sent, arrived, strict=True):
        assert left_ns <= at_ns <= left_ns + JITTER_NS


@pytest.mark.parametrize("n_option_words", [0, 3])
def test_packets_of_other_connections_overtake(n_option_words: int) -> None:
    """The order of all would make each wait for the slowest: no wire does that."""
    relay = JitteringRelay(JITTER_NS, 1)
    for port in range(MANY):
        relay.take(packet(port, port, n_option_words), 7, 0)

    ports = [data for _, data in relay.due(JITTER_NS)]

    assert sorted(ports) == [packet(port, port, n_option_words) for port in range(MANY)]
    assert ports != sorted(ports)


def test_the_delay_is_uniform() -> None:
    """Its mean is half of the jitter, and it uses the whole of it."""
    relay = JitteringRelay(JITTER_NS, 1)
    for port in range(MANY):
        relay.take(packet(port), 7, 0)
    delays_ns = []
    while (at_ns := relay.next_ns()) is not None:
        delays_ns += [at_ns for _ in relay.due(at_ns)]

    assert len(delays_ns) == MANY
    assert sum(delays_ns) / MANY == pytest.approx(JITTER_NS / 2, rel=0.1)
    assert min(delays_ns) < 0.05 * JITTER_NS
    assert max(delays_ns) > 0.95 * JITTER_NS


def test_nothing_arrives_before_its_time() -> None:
    """What is not due stays, and goes where it was bound for."""
    relay = JitteringRelay(JITTER_NS, 3)
    relay.take(packet(1), 8, 100)
    at_ns = relay.next_ns()
    assert at_ns is not None

    assert list(relay.due(at_ns - 1)) == []
    assert list(relay.due(at_ns)) == [(8, packet(1))]


_RUN = """
    import sys
    from loadgen.live.jitter import enter_private_network
    from loadgen.live.run import Emulation, RunSettings, run_emulated
    from loadgen.traces.trace import load_trace
    from superserve.clock import MS
    from superserve.errors import ConfigError

    try:
        enter_private_network()
        emulation = Emulation("cnn-8gpu-modelled", 2, "mincost", jitter_ns=20 * MS)
        trace = load_trace("poisson:rate=50", duration_s=1.0, seed=1)
        run, report = run_emulated(trace, RunSettings(2_000 * MS), emulation)
    except ConfigError as error:
        print(f"refused: {error}")
        sys.exit()
    queries, p50_ms = run.result.queries, run.result.latency_ms["p50"]
    print(queries["total"], queries["ok"], report.n_violations, p50_ms)
"""


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.timeout(60)
def test_a_run_crosses_two_namespaces() -> None:
    """Every query is answered, later than without: there and back, to the router and to the GPU."""
    if os.geteuid() != 0 or not Path("/dev/net/tun").exists():
        pytest.skip("network namespaces and TUN devices need root and /dev/net/tun")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_RUN)], capture_output=True, text=True, timeout=50, check=False
    )

    assert done.returncode == 0, done.stderr
    if done.stdout.startswith("refused: "):
        pytest.skip(done.stdout)
    total, ok, violations, p50_ms = map(float, done.stdout.split())
    assert total == ok > 0
    assert violations == 0
    assert p50_ms > 20, "four ways of 10 ms on average, and the batch"
    left = {path.name for path in Path("/sys/class/net").iterdir()} & {"near", "far"}
    assert left == set(), "its devices are in namespaces of its own"


@pytest.mark.skipif(os.geteuid() != 0, reason="root is refused nothing otherwise")
def test_without_the_right_to_it_jitter_is_refused_with_what_it_needs() -> None:
    """The error names what is needed, in a process that gave up root."""
    code = (
        "import os\n"
        "from loadgen.live.jitter import enter_private_network\n"
        "from superserve.errors import ConfigError\n"
        "os.setuid(65534)\n"
        "try: enter_private_network()\n"
        "except ConfigError as error: print(error)\n"
    )

    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False
    )

    assert "expected root" in done.stdout, done.stderr
