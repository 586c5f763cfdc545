"""The messages of inference.proto, as classes.

They are made from inference.binpb, protoc's own description of the file, and not from generated Python: that
would enter them in protobuf's public pool, where a Triton client in the same process has messages of the same
names, and would tie them to one version of protobuf.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

SERVICE = "inference.GRPCInferenceService"


def _pool() -> descriptor_pool.DescriptorPool:
    found = descriptor_pb2.FileDescriptorSet()
    found.ParseFromString((Path(__file__).parent / "inference.binpb").read_bytes())
    pool = descriptor_pool.DescriptorPool()
    for file in found.file:
        pool.Add(file)
    return pool


POOL = _pool()


def message(name: str) -> Any:
    """Return the class of the message `name`."""
    return message_factory.GetMessageClass(POOL.FindMessageTypeByName(f"inference.{name}"))


def methods() -> dict[str, tuple[Any, Any, bool]]:
    """Return each method's request class, answer class, and whether both are streams."""
    service = POOL.FindServiceByName(SERVICE)
    return {
        method.name: (
            message_factory.GetMessageClass(method.input_type),
            message_factory.GetMessageClass(method.output_type),
            method.server_streaming,
        )
        for method in service.methods
    }
