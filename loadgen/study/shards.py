"""What several queues lose against one: a trace dealt out to routers that each have a part of the GPUs.

    python -m loadgen.study.shards --trace bursty:base=9000,variant=36000,cv2=8 --gpus 64 --routers 1,2,4
    python -m loadgen.study.shards --trace maf-like:rate=45000 --gpus 64 --routers 2 --loads 80,20

Workers lend single credits to other routers; with --no-lend they do not. Each message, the queries due within
half a millisecond, goes to the router that has been sent the least so far, for its part of the load: what
clients come to that count what each router owes them. With --loads the parts differ: clients that know only
one router, or cannot reach another.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import click
import numpy as np

from gpu_worker.core.lending import Lender
from loadgen import options
from loadgen.simulator.shards import serve_shards
from loadgen.traces.trace import load_trace
from profiles.table import load_profile
from superserve.clock import MS
from superserve.errors import ConfigError
from superserve.roles.command import plain_errors

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from loadgen.traces.trace import Trace
    from profiles.table import Profile

MESSAGE_NS = MS // 2
"""Queries due within this time share a message."""


class Sharded(NamedTuple):
    """The figures of all routers together.

    Attributes:
        attainment: Share of all queries answered in time.
        accuracy: Percent, the mean of those.
        lent: Share of the batches that ran on a GPU of another router.
    """

    n_routers: int
    attainment: float
    accuracy: float
    lent: float


def dealt(
    due_ns: npt.NDArray[np.int64], n_routers: int, loads: Sequence[float] | None = None
) -> npt.NDArray[np.int64]:
    """Return each query's router, shape (n,): a message goes to the one that has been sent the least.

    Args:
        due_ns: Instants, ascending, shape (n,).
        n_routers: How many there are.
        loads: Their parts of the load, by which what each has been sent is divided; None for equal ones.
    """
    parts = [1.0] * n_routers if loads is None else list(loads)
    _, starts = np.unique(due_ns // MESSAGE_NS, return_index=True)
    sizes = np.diff([*starts.tolist(), len(due_ns)])
    sent = [0.0] * n_routers
    routers = []
    for size in sizes.tolist():
        least = min(range(n_routers), key=sent.__getitem__)
        sent[least] += size / parts[least]
        routers.append(least)
    return np.repeat(np.array(routers, np.int64), sizes)


def sharded(
    trace: Trace,
    profile: Profile,
    n_gpus: int,
    n_routers: int,
    *,
    policy: str,
    slo_ns: int,
    loads: Sequence[float] | None = None,
    is_lending: bool = True,
) -> Sharded:
    """Serve a trace by `n_routers` routers with `n_gpus` GPUs in all, each with its part of both.

    Raises:
        ConfigError: The GPUs cannot be shared out evenly.
    """
    if n_gpus % n_routers:
        raise ConfigError(f"--routers: expected a divisor of {n_gpus} GPUs, got {n_routers}")
    routers = dealt(trace.due_ns, n_routers, loads)
    found = serve_shards(
        trace.due_ns, routers, profile, n_gpus, n_routers, policy=policy, slo_ns=slo_ns,
        make_lender=Lender if is_lending else None,
    )  # fmt: skip
    return Sharded(n_routers, found.attainment, found.accuracy, found.n_borrowed / max(1, found.n_batches))


@click.command()
@click.option("--trace", "spec", required=True, help="As for `loadgen run`.")
@click.option("--rate", type=float, help="Queries a second, to scale the trace to.")
@click.option("--duration", type=float, help="Seconds of it.")
@click.option("--gpus", type=click.IntRange(1, 1_024), default=64, show_default=True)
@click.option("--profile", "name", default="cnn-8gpu-modelled", show_default=True)
@click.option("--routers", "counts", default="1,2,4", show_default=True, help="How many, each in turn.")
@click.option("--loads", "parts", help="The routers' parts of the load, such as 80,20.  [default: equal]")
@click.option("--no-lend", is_flag=True, help="Let no credit move between routers.")
@click.option("--policy", default=options.DEFAULT_POLICY, show_default=True)
@click.option("--slo-ms", type=float, default=36.0, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@plain_errors()
def cli(
    spec: str, rate: float | None, duration: float | None, gpus: int, name: str, counts: str,
    parts: str | None, no_lend: bool, policy: str, slo_ms: float, seed: int,
) -> None:  # fmt: skip
    """Print what several routers attain, and how far that is below one."""
    trace = load_trace(spec, rate_qps=rate, duration_s=duration, seed=seed)
    profile = load_profile(name)
    first: Sharded | None = None
    click.echo(f"{trace.name}: {trace.n:,} queries, {gpus} GPUs, {policy}")
    for count in counts.split(","):
        if not count.strip().isdecimal() or not int(count):
            raise ConfigError(f"--routers: expected numbers such as 1,2,4, got {counts!r}")
        n_routers = int(count)
        found = sharded(
            trace, profile, gpus, n_routers, policy=policy, slo_ns=int(slo_ms * MS),
            loads=_loads(parts, n_routers) if n_routers > 1 else None, is_lending=not no_lend,
        )  # fmt: skip
        first = first or found
        click.echo(
            f"  {found.n_routers:2d} routers: attainment {found.attainment:.5f} "
            f"({found.attainment - first.attainment:+.5f}), accuracy {found.accuracy:.3f} "
            f"({found.accuracy - first.accuracy:+.3f}), {found.lent:.1%} of the batches lent"
        )


def _loads(parts: str | None, n_routers: int) -> list[float] | None:
    if parts is None:
        return None
    words = parts.split(",")
    if len(words) != n_routers or not all(word.strip().isdecimal() and int(word) for word in words):
        raise ConfigError(f"--loads: expected {n_routers} numbers such as 80,20, got {parts!r}")
    return [float(word) for word in words]


if __name__ == "__main__":
    cli(prog_name="python -m loadgen.study.shards")
