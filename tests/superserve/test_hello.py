"""HELLO and WELCOME: read once, and named where they are wrong."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from superserve.errors import WireError
from superserve.hello import ClientHello, ClientWelcome, ModelSpec, WorkerHello, WorkerWelcome
from superserve.subnet import TensorSpec
from tests.superserve.test_status import MODELS, SIZES, SPECS, TEXT

RANGES = st.none() | st.tuples(st.integers(1, 9), st.integers(1, 9))
PROFILES = st.dictionaries(TEXT, st.integers(0, 9), max_size=2)
WORKER_HELLOS = st.builds(
    WorkerHello,
    name=TEXT.filter(bool), host=TEXT, version=TEXT, pid=SIZES, device=TEXT, fingerprint=TEXT,
    n_slots=st.just(2), profiles=st.lists(PROFILES, min_size=1, max_size=2).map(tuple),
    input=st.none() | SPECS, output=st.none() | SPECS, wire=RANGES,
)  # fmt: skip


def over_json(body: dict[str, Any]) -> dict[str, Any]:
    """Return a body as a peer reads it."""
    found: dict[str, Any] = orjson.loads(orjson.dumps(body))
    return found


VERSIONS = st.none() | st.integers(1, 9)
SUBNETS = st.lists(st.tuples(TEXT, st.floats(0, 100))).map(tuple)


@given(
    sent=st.builds(ClientHello, session=SIZES, wire=RANGES)
    | st.builds(ClientWelcome, SIZES, st.none() | MODELS, SUBNETS, TEXT, VERSIONS)
    | st.builds(WorkerWelcome, SIZES, SIZES, VERSIONS)
)
def test_what_is_said_is_what_is_heard(sent: ClientHello | ClientWelcome | WorkerWelcome) -> None:
    """As JSON and back."""
    assert type(sent).from_body(over_json(sent.body())) == sent


@given(sent=WORKER_HELLOS)
def test_what_a_worker_says_is_what_the_router_hears(sent: WorkerHello) -> None:
    """As JSON and back."""
    assert WorkerHello.from_body(over_json(sent.body()), "nobody") == sent


def test_what_is_not_known_has_no_key() -> None:
    """A range of the wire that nobody gave; but a model that is not known yet is null, as it always was."""
    assert ClientHello(session=7).body() == {"role": "client", "session": 7}
    welcome = {"epoch": 1, "model": None, "subnets": (), "policy": "p"}
    assert ClientWelcome(1, policy="p").body() == welcome


def test_a_worker_says_what_it_always_said_in_the_same_order() -> None:
    """So that logs and recordings of both look alike."""
    hello = WorkerHello(n_slots=1, profiles=({},), wire=(1, 1), output=TensorSpec("int32", ()))

    assert list(over_json(hello.body())) == [
        "role", "name", "host", "version", "pid", "life", "device", "fingerprint", "profiles", "n_slots",
        "input", "output", "wire",
    ]  # fmt: skip
    assert over_json(hello.body())["output"] == {"dtype": "int32", "shape": []}


def test_one_version_of_an_older_worker_is_a_range_of_one() -> None:
    """It said a number where newer ones say the lowest and the highest."""
    body: dict[str, Any] = {"n_slots": 1, "profiles": [{}], "wire": 1}

    assert WorkerHello.from_body(body, "w").wire == (1, 1)
    assert WorkerHello.from_body({**body, "wire": [1, 2]}, "w").wire == (1, 2)
    assert WorkerHello.from_body({"n_slots": 1, "profiles": [{}]}, "w").wire is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n_slots": ...}, "worker w: n_slots: expected 1 to 4096, got None"),
        ({"n_slots": 0}, "worker w: n_slots: expected 1 to 4096, got 0"),
        ({"n_slots": True}, "worker w: n_slots: expected 1 to 4096, got True"),
        ({"n_slots": 4097}, "worker w: n_slots: expected 1 to 4096, got 4097"),
        ({"profiles": ...}, "worker w: profiles: expected one for all GPUs, or one for each"),
        ({"profiles": [{}] * 3}, "worker w: profiles: expected one for all GPUs, or one for each"),
        ({"profiles": [7]}, "worker w: profiles[0]: expected an object, got 7"),
        ({"name": 7}, "worker key: name: expected text, got 7"),
        ({"name": "", "host": 1}, "worker key: host: expected text, got 1"),
        ({"input": [1]}, "worker w: input: expected a dtype and a shape, got [1]: expected an object"),
        ({"input": {"dtype": "f4"}}, "worker w: input: expected a dtype and a shape, got {'dtype': 'f4'}"),
        ({"output": {"dtype": ",", "shape": [1]}}, "worker w: output: expected a dtype and a shape, got "),
        ({"wire": [1]}, "worker w: wire: expected a list of 2, got [1]"),
        ({"wire": ["a", 2]}, "worker w: wire[0]: expected an integer, got 'a'"),
    ],
)  # fmt: skip
def test_a_workers_hello_that_is_wrong_is_named_with_the_worker(change: dict[str, Any], words: str) -> None:
    """And the field, what was expected and what came."""
    body = {"name": "w", "n_slots": 2, "profiles": [{}], "input": None} | change
    body = {key: value for key, value in body.items() if value is not ...}

    with pytest.raises(WireError) as caught:
        WorkerHello.from_body(body, "key")
    assert str(caught.value).startswith(words)


def test_a_worker_without_a_name_has_that_of_its_connection() -> None:
    """If it states none, or an empty one."""
    for body in ({}, {"name": ""}, {"name": None}):
        assert WorkerHello.from_body({"n_slots": 1, "profiles": [{}], **body}, "c0ffee").name == "c0ffee"


@pytest.mark.parametrize("epoch", [None, "1", 1.5, True, -1, 2**64])
def test_a_workers_welcome_needs_an_epoch(epoch: object) -> None:
    """Of 64 bits: it goes with each message."""
    with pytest.raises(WireError, match=r"welcome: epoch: expected "):
        WorkerWelcome.from_body({"epoch": epoch})


def test_a_clients_welcome_may_say_the_epoch_alone() -> None:
    """Before a worker has joined there is no model and there are no subnets."""
    assert ClientWelcome.from_body({"epoch": 3}) == ClientWelcome(3)
    model = {"input": None, "output": {"dtype": "uint8", "shape": [4]}, "supernet": "s"}
    found = ClientWelcome.from_body({"epoch": 3, "model": model, "subnets": [["a", 70]]})
    assert found.model == ModelSpec(None, TensorSpec("uint8", (4,)), "s")
    assert found.subnets == (("a", 70),)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "welcome: epoch: expected an integer, got nothing"),
        ({"epoch": 1, "subnets": [["a"]]}, r"welcome: subnets\[0\]: expected a list of 2, got \['a'\]"),
        ({"epoch": 1, "subnets": [["a", "b"]]}, r"welcome: subnets\[0\]\[1\]: expected a number, got 'b'"),
        ({"epoch": 1, "model": 7}, "welcome: model: expected an object, got 7"),
        ({"epoch": 1, "model": {"input": 7}}, "welcome: model: input: expected a dtype and a shape, got 7"),
    ],
)
def test_a_clients_welcome_that_is_wrong_is_named(body: dict[str, Any], words: str) -> None:
    """The field, what was expected and what came."""
    with pytest.raises(WireError, match=words):
        ClientWelcome.from_body(body)


@pytest.mark.parametrize("session", [..., None, "7", True])
def test_a_clients_hello_needs_a_session(session: object) -> None:
    """It is what the router knows the client by."""
    with pytest.raises(WireError, match="hello: session: expected an integer, got "):
        ClientHello.from_body({} if session is ... else {"session": session})


def test_who_comes_to_the_others_endpoint_hears_so() -> None:
    """A router has an endpoint for each, and their ports are easily taken for each other."""
    client = over_json(ClientHello(session=7).body())
    with pytest.raises(WireError, match="a client came to the endpoint of workers"):
        WorkerHello.from_body(client, "w")
    with pytest.raises(WireError, match="a worker came to the endpoint of clients"):
        ClientHello.from_body({"role": "worker", "name": "w"})
