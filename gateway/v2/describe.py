"""The protocol's descriptions: server and model metadata, configuration, statistics, the repository."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from gateway.v2.served import INPUT, OUTPUT, VERSION
from gateway.v2.tensors import datatype_of, shape_of
from gateway.v2.terms import PRIORITY_LEVELS

if TYPE_CHECKING:
    from gateway.v2.served import ServedModel

SERVER = "superserve"
PLATFORM = "superserve"
EXTENSIONS = ("binary_tensor_data", "model_configuration", "model_repository", "statistics", "parameters")


@dataclass(frozen=True, slots=True)
class Total:
    """How often something happened, and how long it took together, ns."""

    count: int = 0
    ns: int = 0


class ModelTotals(NamedTuple):
    """What the processes of a gateway have served since they started.

    Attributes:
        success: Requests answered with an output, from arrival to answer.
        fail: Requests without one.
        queue: Of the answered, the time in the router's queue.
        compute_input: From the queue to the start of the batch.
        compute_infer: The batches' execution.
        compute_output: From the batch's end to the answer.
        inferences: Rows answered.
        executions: Batches: each row counts as its share of its batch.
        last_ms: When the last answer left, in milliseconds since 1970; 0 before the first.
        cancelled: Requests whose caller left before the answer.
    """

    success: Total = Total()
    fail: Total = Total()
    queue: Total = Total()
    compute_input: Total = Total()
    compute_infer: Total = Total()
    compute_output: Total = Total()
    inferences: int = 0
    executions: int = 0
    last_ms: int = 0
    cancelled: Total = Total()


def server_metadata(version: str) -> dict[str, Any]:
    """Return the server's metadata."""
    return {"name": SERVER, "version": version, "extensions": list(EXTENSIONS)}


def model_metadata(model: ServedModel) -> dict[str, Any]:
    """Return a model's metadata: every model has a batch axis, of any size."""
    return {
        "name": model.name,
        "versions": [VERSION],
        "platform": PLATFORM,
        "inputs": [{"name": INPUT, "datatype": datatype_of(model.takes), "shape": shape_of(model.takes)}],
        "outputs": [{"name": OUTPUT, "datatype": datatype_of(model.gives), "shape": shape_of(model.gives)}],
    }


def model_config(model: ServedModel, max_rows: int) -> dict[str, Any]:
    """Return a model's configuration in the form of Triton's, as far as it means something here.

    Shapes have no batch axis, since `max_batch_size` says that there is one. The parameters name the subnets.
    """
    accuracies = ",".join(f"{name}={accuracy:g}" for name, accuracy in model.subnets)
    return {
        "name": model.name,
        "platform": PLATFORM,
        "backend": SERVER,
        "version_policy": {"latest": {"num_versions": 1}},
        "max_batch_size": max_rows,
        "input": [
            {"name": INPUT, "data_type": _config_type(datatype_of(model.takes)), "format": "FORMAT_NONE",
             "dims": shape_of(model.takes)[1:] or [1]}
        ],
        "output": [
            {"name": OUTPUT, "data_type": _config_type(datatype_of(model.gives)),
             "dims": shape_of(model.gives)[1:] or [1]}
        ],
        "dynamic_batching": {
            "preserve_ordering": False, "priority_levels": PRIORITY_LEVELS,
            "default_priority_level": PRIORITY_LEVELS,
        },
        "instance_group": [],
        "parameters": {"subnets": {"string_value": accuracies}},
    }  # fmt: skip


def _config_type(datatype: str) -> str:
    return "TYPE_STRING" if datatype == "BYTES" else f"TYPE_{datatype}"


def model_statistics(model: ServedModel, totals: ModelTotals) -> dict[str, Any]:
    """Return a model's statistics, summed over the gateway's processes."""
    spans = {
        name: asdict(getattr(totals, name))
        for name in ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output")
    }
    nothing = asdict(Total())
    return {
        "model_stats": [
            {
                "name": model.name,
                "version": VERSION,
                "last_inference": totals.last_ms,
                "inference_count": totals.inferences,
                "execution_count": totals.executions,
                "inference_stats": {
                    **spans, "cache_hit": nothing, "cache_miss": nothing,
                    "cancel": asdict(totals.cancelled),
                },
                "batch_stats": [],
            }
        ]
    }  # fmt: skip


def repository_index(model: ServedModel | None, *, is_ready: bool) -> list[dict[str, str]]:
    """Return the models of the repository: the served one, or none."""
    if model is None:
        return []
    state, reason = ("READY", "") if is_ready else ("UNAVAILABLE", "no router or worker is ready")
    return [{"name": model.name, "version": VERSION, "state": state, "reason": reason}]
