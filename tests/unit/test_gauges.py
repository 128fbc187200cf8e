"""Gauges of every rank: what becomes of readings, and the file that asks NVML, against a stand-in for NVIDIA's module.

No machine of the tests has a GPU: `pynvml` is a small module that implements the documented functions (its units, its
errors), so this tests what the file asks for and how it converts it, not NVIDIA's library.
"""

import json
import math
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sora_train.monitoring.gauges import (
    COLUMNS,
    Column,
    Gauges,
    by_rank,
    memory,
    over_ranks,
    over_time,
)
from sora_train.monitoring.metrics import METRICS

VALUE = st.one_of(st.just(math.nan), st.floats(-1e6, 1e6))
RANKS = st.lists(
    st.lists(VALUE, min_size=len(COLUMNS), max_size=len(COLUMNS)), min_size=1, max_size=5
)


@given(RANKS)
def test_the_worst_rank_has_the_worst_value(ranks):
    row = over_ranks(ranks)
    for at, (name, column) in enumerate(COLUMNS.items()):
        known = [values[at] for values in ranks if math.isfinite(values[at])]
        assert (name in row) == bool(known)
        if not known:
            continue
        assert row[f"{name}/min"] == min(known) and row[f"{name}/max"] == max(known)
        assert row[name] == pytest.approx(sum(known) / len(known))
        worst = ranks[int(row[f"{name}/worst_rank"])][at]
        assert worst == (min(known) if column.worst == "min" else max(known))
    for name, values in by_rank(ranks).items():
        assert len(values) == len(ranks) and any(value is not None for value in values), name


def test_no_ranks_tell_nothing():
    assert over_ranks([]) == {} and dict(by_rank([])) == {}


@given(st.lists(st.floats(0, 1e6), min_size=1))
def test_readings_become_one_number(readings):
    assert over_time(Column("max"), readings) == max(readings)
    assert over_time(Column("last"), readings) == readings[-1]
    assert over_time(Column("mean"), readings) == pytest.approx(sum(readings) / len(readings))


def test_gauges_forget_what_was_taken():
    class Stove:
        degrees = 50.0

        def read(self) -> dict[str, float]:
            self.degrees += 1
            return {"gpu/temperature": self.degrees}

    gauges = Gauges(Stove(), lambda: {"memory/host": 2.0})
    gauges.sample()
    gauges.sample()
    row = over_ranks([gauges.take()])
    assert (row["gpu/temperature"], row["memory/host"]) == (52.0, 2.0)
    assert "gpu/temperature" not in over_ranks([gauges.take()])


def test_every_column_stands_in_the_table():
    assert set(COLUMNS) <= set(METRICS)


def test_this_process_has_memory():
    assert 0.01 < memory(torch.device("cpu"))["memory/host"] < 100


STAND_IN = """
    class NVMLError(Exception):
        def __init__(self, value): self.value = value
    NVML_ERROR_NOT_SUPPORTED, NVML_ERROR_TIMEOUT, NVML_ERROR_NOT_FOUND = 3, 10, 6
    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0
    NVML_MEMORY_ERROR_TYPE_UNCORRECTED, NVML_VOLATILE_ECC = 1, 0
    nvmlEventTypeXidCriticalError = 8
    nvmlClocksThrottleReasonSwPowerCap = 4
    nvmlClocksThrottleReasonHwSlowdown = 8
    nvmlClocksThrottleReasonSwThermalSlowdown = 32
    nvmlClocksThrottleReasonHwThermalSlowdown = 64
    nvmlClocksThrottleReasonHwPowerBrakeSlowdown = 128
    class Told: pass
    xids = [79, 48]
    def nvmlInit(): pass
    def nvmlDeviceGetHandleByUUID(name):
        if name != "GPU-abc": raise NVMLError(NVML_ERROR_NOT_FOUND)
        return 7
    def nvmlDeviceGetMemoryInfo(gpu): told = Told(); told.used = 3 << 30; return told
    def nvmlDeviceGetPowerUsage(gpu): return 425500
    def nvmlDeviceGetClockInfo(gpu, kind): return {1: 1755, 2: 2619}[kind]
    def nvmlDeviceGetTemperature(gpu, kind): return 61
    def nvmlDeviceGetUtilizationRates(gpu): told = Told(); told.gpu = 97; return told
    def nvmlDeviceGetCurrentClocksThrottleReasons(gpu): return 1 | 4
    def nvmlDeviceGetTotalEccErrors(gpu, kind, counter): raise NVMLError(NVML_ERROR_NOT_SUPPORTED)
    def nvmlEventSetCreate(): return 1
    def nvmlDeviceRegisterEvents(gpu, kinds, events): assert kinds == 8
    def nvmlEventSetWait_v2(events, milliseconds):
        assert milliseconds == 0
        if not xids: raise NVMLError(NVML_ERROR_TIMEOUT)
        return xids.pop()
"""
ASK = """
import json, sys
from sora_train.errors import UserError
from sora_train.monitoring.gauges_nvml import Nvml
gpu = Nvml("abc")
found = [gpu.read(), gpu.read()]
try:
    Nvml("GPU-none")
except UserError as error:
    found.append(str(error))
print(json.dumps(found))
"""


def test_units_of_nvml(tmp_path: Path):
    (tmp_path / "pynvml.py").write_text(textwrap.dedent(STAND_IN))
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{ASK}"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300
    )
    first, second, refused = json.loads(done.stdout)
    assert first == {
        "gpu/memory": 3.0,
        "gpu/power": 425.5,
        "gpu/clock": 1755.0,
        "gpu/memory_clock": 2619.0,
        "gpu/temperature": 61.0,
        "gpu/utilisation": 0.97,
        "gpu/throttled": 1.0,
        "gpu/xid_errors": 2.0,
    }
    assert second["gpu/xid_errors"] == 2.0
    assert "nvidia-smi" in refused
