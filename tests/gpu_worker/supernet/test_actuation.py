"""Actuation switches subnets in place and remembers nothing of the one before."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpu_worker.supernet.actuation import actuate
from superserve.errors import ConfigError
from tests.gpu_worker.models.plain import CONTROLS, images, small_supernet

SUPERNET = small_supernet(seed=3)
IMAGES = images(2)


def run(row: int) -> torch.Tensor:
    """Actuate `row` and run it."""
    actuate(SUPERNET, row)
    with torch.inference_mode():
        logits: torch.Tensor = SUPERNET(IMAGES)
    return logits


ALONE = [run(row) for row in range(len(CONTROLS))]


@given(rows=st.lists(st.integers(0, len(CONTROLS) - 1), max_size=6))
def test_a_subnet_answers_the_same_whatever_ran_before(rows: list[int]) -> None:
    """Switching back and forth changes no output, to the last bit."""
    for row in rows:
        assert torch.equal(run(row), ALONE[row])


def test_subnets_differ() -> None:
    """Each control tuple is a function of its own."""
    assert all(not torch.equal(a, b) for i, a in enumerate(ALONE) for b in ALONE[:i])


def test_actuation_touches_no_tensor() -> None:
    """The state dict, storage and all, is the same after every switch."""
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in SUPERNET.state_dict().items()}
    for row in range(len(CONTROLS)):
        run(row)
    after = SUPERNET.state_dict()

    assert all(after[name].data_ptr() == pointer for name, (pointer, _) in before.items())
    assert all(torch.equal(after[name], tensor) for name, (_, tensor) in before.items())


@pytest.mark.parametrize("row", [-1, len(CONTROLS)])
def test_a_row_that_is_not_hosted_is_refused(row: int) -> None:
    """The error gives the rows there are, and the actuated subnet stays."""
    actuate(SUPERNET, 2)
    with pytest.raises(ConfigError, match=f"subnet: expected a row from 0 to 3, got {row}"):
        actuate(SUPERNET, row)

    assert SUPERNET.cursor.row == 2


def test_a_pass_that_runs_ends_on_the_subnet_with_which_it_began() -> None:
    """Actuation in the middle of a forward pass touches the next one only, whatever the layer."""
    for layer in [module for module in SUPERNET.model.modules() if not list(module.children())]:
        hook = layer.register_forward_pre_hook(lambda *_: actuate(SUPERNET, 0))
        try:
            assert torch.equal(run(2), ALONE[2])
        finally:
            hook.remove()
        assert SUPERNET.cursor.row in (0, 2)  # 2 where the layer did not run


def test_two_threads_never_mix_their_subnets() -> None:
    """Passes of two threads exclude each other: each answer is one subnet's, whole."""
    outputs: list[torch.Tensor] = []

    def serve(row: int) -> None:
        with torch.inference_mode():
            outputs.extend(SUPERNET.run_with(SUPERNET.prepared(row).settings, IMAGES) for _ in range(100))

    threads = [threading.Thread(target=serve, args=(row,)) for row in (1, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    same = [sum(torch.equal(output, ALONE[row]) for output in outputs) for row in (1, 3)]
    assert same == [100, 100]
