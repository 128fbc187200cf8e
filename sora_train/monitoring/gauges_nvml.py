"""Readings of one GPU by NVML, NVIDIA's management library; the only file that imports pynvml."""

import contextlib
from collections.abc import Callable
from typing import Any

from sora_train.errors import UserError

GIB = float(1 << 30)
SLOWED = (
    "nvmlClocksThrottleReasonSwPowerCap",
    "nvmlClocksThrottleReasonHwSlowdown",
    "nvmlClocksThrottleReasonSwThermalSlowdown",
    "nvmlClocksThrottleReasonHwThermalSlowdown",
    "nvmlClocksThrottleReasonHwPowerBrakeSlowdown",
)
"""Reasons for lower clocks that are not idleness or somebody's setting."""


class Nvml:
    """One GPU, found by its UUID, so that CUDA_VISIBLE_DEVICES does not matter."""

    def __init__(self, uuid: str):
        """Raises UserError where the package or the driver's library is missing, or the GPU is not found."""
        try:
            import pynvml
        except ImportError as error:
            raise UserError(
                "the package nvidia-ml-py is not installed: run `pip install sora_train[nvml]`"
            ) from error
        self._nvml: Any = pynvml
        name = uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
        try:
            pynvml.nvmlInit()
            self._gpu = pynvml.nvmlDeviceGetHandleByUUID(name)
        except pynvml.NVMLError as error:
            raise UserError(f"NVML does not know GPU {name} ({error}); see `nvidia-smi`") from error
        self._slowed = sum(int(getattr(pynvml, reason)) for reason in SLOWED)
        self._events = self._listen()
        self._xids = 0

    def read(self) -> dict[str, float]:
        """One reading in GiB, W, MHz, degrees C and shares, without those that the device does not report."""
        nvml, gpu = self._nvml, self._gpu
        readers: dict[str, Callable[[], float]] = {
            "gpu/memory": lambda: nvml.nvmlDeviceGetMemoryInfo(gpu).used / GIB,
            "gpu/power": lambda: nvml.nvmlDeviceGetPowerUsage(gpu) / 1000,
            "gpu/clock": lambda: float(nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM)),
            "gpu/memory_clock": lambda: float(
                nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_MEM)
            ),
            "gpu/temperature": lambda: float(
                nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU)
            ),
            "gpu/utilisation": lambda: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu / 100,
            "gpu/throttled": self._throttled,
            "gpu/ecc_errors": lambda: float(
                nvml.nvmlDeviceGetTotalEccErrors(
                    gpu, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
                )
            ),
            "gpu/xid_errors": self._xid_errors,
        }
        readings = {}
        for name, reader in readers.items():
            # Not every device reports everything.
            with contextlib.suppress(nvml.NVMLError):
                readings[name] = reader()
        return readings

    def _throttled(self) -> float:
        reasons = self._nvml.nvmlDeviceGetCurrentClocksThrottleReasons(self._gpu)
        return float(bool(reasons & self._slowed))

    def _listen(self) -> Any:
        """The events of critical errors (XID) of this GPU, None where it has none."""
        nvml = self._nvml
        try:
            events = nvml.nvmlEventSetCreate()
            nvml.nvmlDeviceRegisterEvents(self._gpu, nvml.nvmlEventTypeXidCriticalError, events)
        except nvml.NVMLError:
            return None
        return events

    def _xid_errors(self) -> float:
        """Errors since this process began to listen."""
        nvml = self._nvml
        while self._events is not None:
            try:
                nvml.nvmlEventSetWait_v2(self._events, 0)
            except nvml.NVMLError as error:
                if getattr(error, "value", None) == nvml.NVML_ERROR_TIMEOUT:
                    break
                raise
            self._xids += 1
        return float(self._xids)
