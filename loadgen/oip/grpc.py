"""gRPC as a run's target: one call for each query, on a few channels; grpcio's threads receive answers."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from typing import TYPE_CHECKING, Any

import grpc

from gateway.rpc.mapping import plain
from gateway.rpc.messages import SERVICE, methods
from loadgen.live.records import Payloads
from loadgen.live.sender import SenderTarget
from loadgen.oip.answers import OF_GRPC, AnswerBook
from superserve.clock import MS
from superserve.errors import ConfigError
from superserve.wire import Status

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy as np
    import numpy.typing as npt

    from loadgen.live.records import Records, SenderPlan
    from loadgen.oip.model import RequestMaker, TargetUrl

MAX_CALLS = 4_096
"""Calls of one sender without an answer; more count as unsent."""
_N_CHANNELS = 4
_METHODS = methods()
_OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.use_local_subchannel_pool", 1),
]


@contextlib.contextmanager
def asker(where: str, timeout_s: float) -> Iterator[Callable[..., Any]]:
    """Give a function that calls a method by name, with its request's fields.

    It raises a ConfigError if the server does not answer.
    """
    with grpc.insecure_channel(where, options=_OPTIONS) as channel:

        def ask(method: str, **fields: Any) -> Any:
            takes, gives, _ = _METHODS[method]
            call = channel.unary_unary(
                f"/{SERVICE}/{method}", request_serializer=takes.SerializeToString,
                response_deserializer=gives.FromString,
            )  # fmt: skip
            try:
                return call(takes(**fields), timeout=timeout_s, wait_for_ready=True)
            except grpc.RpcError as error:
                raise ConfigError(
                    f"--target: grpc://{where}: {method}: {error.code().name}: {error.details()}"
                ) from error

        yield ask


class GrpcTarget(SenderTarget):
    """A server of the protocol over gRPC.

    Args:
        plan: The sender's.
        records: The sender's.
        url: The server.
        maker: Makes the tensors.
    """

    at_once = 64
    idle_ns = MS

    def __init__(self, plan: SenderPlan, records: Records, url: TargetUrl, maker: RequestMaker) -> None:
        super().__init__(plan, records)
        self.payloads = Payloads(plan)
        self._maker = maker
        self._book = AnswerBook(records, maker.model.subnets, keep_outputs=plan.keep_outputs)
        self.subnets = self._book.subnets
        self._ended: deque[tuple[int, Any, int]] = deque()
        self._n_open = 0
        self._takes, self._gives, _ = _METHODS["ModelInfer"]
        self._channels = [grpc.insecure_channel(url.netloc, options=_OPTIONS) for _ in range(_N_CHANNELS)]
        self._calls = [
            channel.unary_unary(f"/{SERVICE}/ModelInfer", request_serializer=self._takes.SerializeToString)
            for channel in self._channels
        ]
        for channel in self._channels:
            grpc.channel_ready_future(channel).result(timeout=5)
        self._shape = [1, *maker.model.shape]

    def send(self, lo: int, slacks_ns: npt.NDArray[np.int64], now_ns: int) -> int:
        """Start a call for each query; return how many were taken."""
        n_taken = 0
        model = self._maker.model
        for i, slack_ns in enumerate(slacks_ns.tolist(), lo):
            if self._n_open >= MAX_CALLS:
                self.records.reasons.setdefault("UNSENT", f"{MAX_CALLS} calls were without an answer")
                continue
            wanted = self._takes(
                model_name=model.name,
                inputs=[{"name": model.input, "datatype": model.datatype, "shape": self._shape}],
                raw_input_contents=[self._maker.raw(self.payloads.packed(i, i + 1))],
            )
            wanted.parameters["timeout"].int64_param = max(slack_ns // 1_000, 1)
            # A call that is late is awaited: how late is what the run measures.
            patience_s = (max(slack_ns, 0) + self.plan.grace_ns) / 1e9
            call = self._calls[i % _N_CHANNELS].future(wanted, timeout=patience_s)
            call.add_done_callback(lambda done, i=i: self._ended.append((i, done, time.monotonic_ns())))
            self.records.sent_ns[i] = now_ns
            self._n_open += 1
            n_taken += 1
        return n_taken

    def take(self) -> None:
        """Enter the answers that grpcio's threads have received."""
        while self._ended:
            i, call, now_ns = self._ended.popleft()
            self._n_open -= 1
            if (code := call.code()) is not grpc.StatusCode.OK:
                self._book.failed(i, OF_GRPC.get(code.name, Status.FAILED), str(call.details()), now_ns)
                continue
            response = self._gives.FromString(call.result())
            raw = response.raw_output_contents[0] if response.raw_output_contents else b""
            self._book.answered(i, plain(response.parameters), raw, now_ns)

    def settle(self) -> None:
        """Enter what has come."""
        self.take()

    def wait(self, duration_ns: int) -> None:
        """Sleep: grpcio receives meanwhile, and notes when."""
        time.sleep(duration_ns / 1e9)

    def close(self) -> None:
        """Close the channels."""
        for channel in self._channels:
            channel.close()
