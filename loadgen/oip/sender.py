"""The sender of a run against a server of the protocol: `loadgen.live.sender`, with another target."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING

import numpy as np

from loadgen.live.records import Records
from loadgen.live.sender import Sender, main
from loadgen.oip.model import RequestMaker, parsed_url, target_model
from superserve.errors import ConfigError
from superserve.net.context import new_context
from superserve.roles.command import one_line

if TYPE_CHECKING:
    from loadgen.live.records import SenderPlan
    from loadgen.live.sender import SenderTarget


def run_protocol_sender(plan: SenderPlan) -> None:
    """Connect, wait for the coordinator's start, send the schedule, write the records.

    Raises:
        ConfigError: The server does not answer, or the payloads do not fit its model.
    """
    due_ns = np.load(plan.path("due"))
    records = Records(len(due_ns))
    url, model = parsed_url(plan.endpoint), target_model(plan.endpoint)
    maker = RequestMaker(url, model, plan.payload_bytes)
    with contextlib.ExitStack() as stack:
        context = stack.enter_context(new_context())
        target: SenderTarget
        if url.scheme == "grpc":
            from loadgen.oip.grpc import GrpcTarget  # noqa: PLC0415  grpcio comes with an extra

            target = by_grpc = GrpcTarget(plan, records, url, maker)
            stack.callback(by_grpc.close)
            each = by_grpc.payloads.each
        else:
            from loadgen.oip.http import HttpTarget  # noqa: PLC0415  so does httptools

            target = by_http = HttpTarget(plan, records, url, maker)
            stack.callback(by_http.close)
            each = by_http.payloads.each
        if model.datatype != "BYTES" and each != model.payload_bytes:
            raise ConfigError(
                f"payload: the model takes {model.payload_bytes} bytes a query "
                f"({model.datatype} {list(model.shape)}), got {each}: use --payload-bytes or --inputs"
            )
        for duration_ns in Sender(target, due_ns).play(context):
            target.wait(duration_ns)


if __name__ == "__main__":
    with one_line():
        sys.exit(main(sys.argv[1:], run_protocol_sender))
