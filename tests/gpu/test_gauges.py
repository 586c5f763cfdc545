"""The device's own figures, read from the driver."""

from __future__ import annotations

import pytest
import torch

from gpu_worker.serve.gauges import CudaGauges


def test_the_driver_tells_all_three() -> None:
    """Memory that torch holds, a utilisation, and a temperature that a running device can have."""
    pytest.importorskip("pynvml", reason="no package nvidia-ml-py")
    held = torch.zeros(2**20, device="cuda")
    gauges = CudaGauges(held.device)()

    assert gauges.memory_bytes >= held.numel() * held.element_size()
    assert 0 <= gauges.utilisation <= 1
    assert 5 < gauges.temperature_c < 110
