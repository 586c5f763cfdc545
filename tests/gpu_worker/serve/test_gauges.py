"""The figures of a CUDA device; NVML and the device are simulated."""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gpu_worker.serve.gauges import CudaGauges

UUID = "6a7b1c1e-0000-1111-2222-333344445555"


class FakeNvmlError(Exception):
    """What NVML raises."""


def fake_nvml(**changes: Any) -> SimpleNamespace:
    """Return an NVML with one device, some of whose calls are replaced."""
    found = {
        "NVMLError": FakeNvmlError,
        "NVML_TEMPERATURE_GPU": 0,
        "nvmlInit": lambda: None,
        "nvmlDeviceGetHandleByUUID": {f"GPU-{UUID}": "handle"}.__getitem__,
        "nvmlDeviceGetUtilizationRates": lambda _handle: SimpleNamespace(gpu=73),
        "nvmlDeviceGetTemperature": lambda _handle, _sensor: 61,
    }
    return SimpleNamespace(**found | changes)


def fail(*_: object) -> None:
    """Fail as NVML does."""
    raise FakeNvmlError("Not Supported")


@pytest.fixture(autouse=True)
def _device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA device of which torch holds 4,096 bytes."""
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _device: 4_096)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: SimpleNamespace(uuid=UUID))


def gauges(monkeypatch: pytest.MonkeyPatch, nvml: SimpleNamespace | None) -> tuple[int, float, float]:
    """Return what is read with this NVML, or with no package of it."""
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    return CudaGauges(torch.device("cuda:0"))()


def test_the_device_is_found_by_its_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever number the driver gives it: CUDA_VISIBLE_DEVICES may have renumbered torch's."""
    assert gauges(monkeypatch, fake_nvml()) == (4_096, 0.73, 61.0)


@pytest.mark.parametrize("nvml", [None, fake_nvml(nvmlInit=fail), fake_nvml(nvmlDeviceGetHandleByUUID=fail)])
def test_without_nvml_memory_is_told_all_the_same(
    monkeypatch: pytest.MonkeyPatch, nvml: SimpleNamespace | None
) -> None:
    """No package, no driver, no such device: the other two are unknown."""
    memory_bytes, utilisation, temperature_c = gauges(monkeypatch, nvml)

    assert memory_bytes == 4_096
    assert math.isnan(utilisation)
    assert math.isnan(temperature_c)


def test_one_missing_figure_leaves_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slice of a device has no utilisation of its own."""
    _, utilisation, temperature_c = gauges(monkeypatch, fake_nvml(nvmlDeviceGetUtilizationRates=fail))

    assert math.isnan(utilisation)
    assert temperature_c == 61.0
