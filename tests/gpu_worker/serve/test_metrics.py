"""What a worker exports: every name of its table, and the figures of its batches."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from prometheus_client.parser import text_string_to_metric_families

from gpu_worker.core.batches import EndedBatch
from gpu_worker.core.link import Gauges, LinkState
from gpu_worker.serve.metrics import METRICS, WorkerMetrics, pages
from profiles.table import load_profile
from superserve.clock import MS
from superserve.wire import DoneRow

if TYPE_CHECKING:
    from gpu_worker.serve.server import WorkerServer

PROFILE = load_profile("cnn-8gpu-modelled")


class Server:
    """As much of a server as is exported."""

    link = LinkState.SERVING
    counts = {"malformed": 3}  # noqa: RUF012  of one test
    gauges = Gauges(memory_bytes=1_000, utilisation=0.5)
    since_ns = 0

    def since_pass_ns(self) -> int:
        """Return how long ago the loop passed."""
        return self.since_ns


def report(slot: int, subnet: int, n: int, *, n_run: int, took_ms: int) -> EndedBatch:
    """Return a batch that has ended."""
    row = DoneRow(1, slot, 1, 0, n, 0, took_ms * MS, 1, 0, 0, 4, b"")
    return EndedBatch(1, row, subnet, n_run, 0, took_ms * MS)


def scrape(metrics: WorkerMetrics) -> tuple[dict[str, str], dict[tuple[str, ...], float]]:
    """Return help by family, and values by name and labels."""
    page = pages(cast("WorkerServer", Server()), metrics)["/metrics"]()
    families = list(text_string_to_metric_families(page.body.decode()))
    samples = [sample for family in families for sample in family.samples]
    return (
        {family.name: family.documentation for family in families},
        {(sample.name.removeprefix("superserve_worker_"), *sample.labels.values()): sample.value
         for sample in samples if not sample.name.endswith(("_bucket", "_info"))},
    )  # fmt: skip


def test_batches_are_counted_by_subnet_and_by_what_became_of_them() -> None:
    """A batch that was refused took no time; going back and forth between two subnets is two actuations."""
    metrics = WorkerMetrics("w", PROFILE, n_slots=2)
    metrics.ended([report(0, 0, 4, n_run=4, took_ms=2), report(1, 5, 8, n_run=6, took_ms=20)])
    metrics.ended([report(0, 1, 4, n_run=0, took_ms=0), report(0, 5, 1, n_run=1, took_ms=10)])
    metrics.ended([report(0, 0, 1, n_run=1, took_ms=2)])
    _, values = scrape(metrics)

    smallest, largest = PROFILE.subnets[0].name, PROFILE.subnets[5].name
    assert values["batches_total",] == 4
    assert (values["queries_total", smallest], values["queries_total", largest]) == (5, 7)
    assert values["refused_queries_total",] == 6
    assert values["execution_seconds_total",] == 0.034
    assert values["actuations_total",] == 4  # the first batch of each GPU among them
    assert values["batch_seconds_count",] == 4
    assert values["dropped_messages_total", "malformed"] == 3


def test_a_worker_is_ready_while_its_link_serves() -> None:
    """A worker that drains or seeks its router says so, with 503."""
    server = Server()
    ready = pages(cast("WorkerServer", server), WorkerMetrics("w", PROFILE, n_slots=1))["/ready"]

    assert ready()[:2] == (200, b"the link to the router is serving\n")
    server.link = LinkState.DRAINING
    assert ready()[:2] == (503, b"the link to the router is draining\n")


def test_a_worker_is_live_while_its_loop_passes() -> None:
    """Whatever its link is: a router that is away is no reason to restart a worker."""
    server = Server()
    server.link = LinkState.JOINING
    live = pages(cast("WorkerServer", server), WorkerMetrics("w", PROFILE, n_slots=1))["/live"]

    assert live()[:2] == (200, b"the loop passed 0 ms ago\n")
    server.since_ns = 2_000 * MS
    assert live()[:2] == (503, b"the loop passed 2000 ms ago\n")


def test_every_metric_of_the_table_is_exported_and_what_is_unknown_is_absent() -> None:
    """A temperature that nobody knows is no sample; its name and help are there all the same."""
    helps, values = scrape(WorkerMetrics("w", PROFILE, n_slots=1))

    assert set(helps) == {m.name + ("_info" if m.kind == "info" else "") for m in METRICS}
    assert all(helps.values())
    assert values["utilisation_ratio",] == 0.5
    assert ("temperature_celsius",) not in values
    assert [values["link", link.value] for link in LinkState] == [0, 1, 0, 0, 0]
