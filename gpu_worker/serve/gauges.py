"""A CUDA device's gauges: memory from torch, utilisation and temperature from NVML.

NVML numbers devices as the driver does, torch only those of CUDA_VISIBLE_DEVICES, so the device is
looked up by its UUID. If NVML, its Python package or a value is missing, that value is NaN.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from gpu_worker.core.link import Gauges

_LOG = logging.getLogger(__name__)
_NAN = float("nan")


class CudaGauges:
    """Reads one device's gauges; the server's thread calls it twice a second.

    Args:
        device: A CUDA device, numbered as in torch.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._nvml, self._handle = _nvml_of(device)

    def __call__(self) -> Gauges:
        """Return the memory that torch holds, and NVML's values of the whole device."""
        memory_bytes = int(torch.cuda.memory_reserved(self._device))
        if self._nvml is None:
            return Gauges(memory_bytes)
        return Gauges(memory_bytes, self._utilisation(), self._temperature_c())

    def _utilisation(self) -> float:
        try:
            return float(self._nvml.nvmlDeviceGetUtilizationRates(self._handle).gpu) / 100
        except self._nvml.NVMLError:  # a MIG slice of a device has none
            return _NAN

    def _temperature_c(self) -> float:
        nvml = self._nvml
        try:
            return float(nvml.nvmlDeviceGetTemperature(self._handle, nvml.NVML_TEMPERATURE_GPU))
        except nvml.NVMLError:
            return _NAN


def _nvml_of(device: torch.device) -> tuple[Any, Any]:
    """Return NVML and its handle of a device, or None twice."""
    try:
        import pynvml  # noqa: PLC0415  not every worker has it
    except ImportError:
        _LOG.info("no package nvidia-ml-py: this worker reports neither utilisation nor temperature")
        return None, None
    try:
        pynvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        return pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid)
    except pynvml.NVMLError as error:
        _LOG.info("NVML: %s: this worker reports neither utilisation nor temperature", error)
        return None, None
