"""inference.proto: its description is current, and its names and numbers are those of public clients."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from tritonclient.grpc import model_config_pb2, service_pb2

from gateway.rpc.messages import POOL, SERVICE, methods
from tests.paths import ROOT

if TYPE_CHECKING:
    from pathlib import Path

FOLDER = ROOT / "gateway" / "rpc"


def test_the_description_is_that_of_the_file(tmp_path: Path) -> None:
    """After a change to the file: make proto."""
    made = tmp_path / "made.binpb"
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", f"-I{FOLDER}", f"--descriptor_set_out={made}",
         str(FOLDER / "inference.proto")],
        check=True,
    )  # fmt: skip
    assert made.read_bytes() == (FOLDER / "inference.binpb").read_bytes()


def _shape(field: Any) -> tuple[Any, ...]:
    kind = field.message_type or field.enum_type
    return field.name, field.type, field.is_repeated, kind.full_name if kind is not None else ""


def _messages(parent: Any) -> list[Any]:
    found = [parent]
    for child in parent.nested_types:
        found.extend(_messages(child))
    return found


OURS = [
    one
    for name in POOL.FindFileByName("inference.proto").message_types_by_name.values()
    for one in _messages(name)
]


@pytest.mark.parametrize("ours", OURS, ids=[one.full_name for one in OURS])
def test_fields_have_the_numbers_that_clients_use(ours: Any) -> None:
    """Every field is one of theirs, with its type; theirs may be more."""
    theirs: Any = None
    for module in (service_pb2, model_config_pb2):
        try:
            theirs = module.DESCRIPTOR.pool.FindMessageTypeByName(ours.full_name)
        except KeyError:
            continue
    assert theirs is not None, f"{ours.full_name} is no message of the protocol"
    for number, field in ours.fields_by_number.items():
        assert _shape(field) == _shape(theirs.fields_by_number[number])


def test_methods_are_those_of_the_service() -> None:
    """Names, and which of them is a stream."""
    theirs = service_pb2.DESCRIPTOR.services_by_name[SERVICE.partition(".")[2]]
    for name, (_, _, is_stream) in methods().items():
        assert theirs.methods_by_name[name].server_streaming == is_stream
    assert len(methods()) == 10
