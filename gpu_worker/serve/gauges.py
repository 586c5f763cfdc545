"""What a CUDA device says of itself: memory from torch, utilisation and temperature from NVML.

NVML counts devices as the driver does, torch those of CUDA_VISIBLE_DEVICES alone: so a device is
looked up by its UUID. Where NVML, its Python package or one figure is missing, that figure is NaN.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from gpu_worker.core.link import Gauges

_LOG = logging.getLogger(__name__)
_NAN = float("nan")


class CudaGauges:
    """Reads one device; called by the server's thread twice a second.

    Args:
        device: A CUDA device, as torch counts them.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._nvml, self._handle = _nvml_of(device)

    def __call__(self) -> Gauges:
        """Return what torch holds of the memory, and what NVML says of the whole device."""
        memory_bytes = int(torch.cuda.memory_reserved(self._device))
        if self._nvml is None:
            return Gauges(memory_bytes)
        return Gauges(memory_bytes, self._utilisation(), self._temperature_c())

    def _utilisation(self) -> float:
        try:
            return float(self._nvml.nvmlDeviceGetUtilizationRates(self._handle).gpu) / 100
        except self._nvml.NVMLError:  # a slice of a device has none
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
        _LOG.info("no package nvidia-ml-py: this worker tells neither utilisation nor temperature")
        return None, None
    try:
        pynvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        return pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid)
    except pynvml.NVMLError as error:
        _LOG.info("NVML: %s: this worker tells neither utilisation nor temperature", error)
        return None, None
