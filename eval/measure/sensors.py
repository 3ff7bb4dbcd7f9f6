"""Temperatures and clocks of the machine while engines are timed, and the energy that the engines take.

Everything is read from Linux's sysfs or from NVML (``nvidia-ml-py``). What cannot be read is left out or None: most
virtual machines report nothing, and since Linux 5.10 only root can read RAPL.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, Protocol

import pynvml
import torch
from scipy.integrate import trapezoid

SYSFS = Path("/sys")
_BOARD_RAILS = ("VDD_IN", "VIN", "POM_5V_IN")  # the rail that feeds all others: Orin Nano and NX, AGX Thor, Nano
_CPU_CHIPS = ("coretemp", "k10temp", "zenpower", "cpu_thermal")
_GPU_CLOCKS = ("*.gpu", "*.ga10b", "gpu-gpc-*", "*.gv11b")  # devfreq: Orin from JetPack 6, from 5, Thor, Xavier


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except (OSError, ValueError):  # missing, not readable, switched off, or not text
        return None


def _number(path: Path, per: float = 1.0) -> float | None:
    """Returns the number in a file, divided by ``per``; None if there is none."""
    try:
        return float(_text(path) or "") / per
    except ValueError:
        return None


def _numbers(paths: Sequence[Path]) -> list[float]:
    return [value for path in paths if (value := _number(path)) is not None]


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU by its NVML handle; a reading is None if the driver does not report it."""

    handle: Any

    def celsius(self) -> float | None:
        return self._ask(pynvml.nvmlDeviceGetTemperature, pynvml.NVML_TEMPERATURE_GPU)

    def megahertz(self) -> float | None:
        """Clock of the streaming multiprocessors."""
        return self._ask(pynvml.nvmlDeviceGetClockInfo, pynvml.NVML_CLOCK_SM)

    def watts(self) -> float | None:
        return self._ask(pynvml.nvmlDeviceGetPowerUsage, per=1e3)

    def joules(self) -> float | None:
        """Energy since the driver was loaded; reported by Volta and later GPUs."""
        return self._ask(pynvml.nvmlDeviceGetTotalEnergyConsumption, per=1e3)

    def _ask(self, question: Callable[..., Any], *arguments: Any, per: float = 1.0) -> float | None:
        try:
            return float(question(self.handle, *arguments)) / per
        except pynvml.NVMLError:
            return None


@cache
def find_gpu() -> Gpu | None:
    """Returns the GPU that PyTorch uses, also under CUDA_VISIBLE_DEVICES; the first without CUDA; None without GPU."""
    try:
        pynvml.nvmlInit()
        if torch.cuda.is_available():
            return Gpu(pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties().uuid}"))
        return Gpu(pynvml.nvmlDeviceGetHandleByIndex(0))
    except pynvml.NVMLError:
        return None


def read_cpu(root: Path = SYSFS) -> dict[str, float]:
    """Returns the highest temperature of the CPU and the mean clock of the usable cores, if readable."""
    cores = [root / f"devices/system/cpu/cpu{core}/cpufreq/scaling_cur_freq" for core in os.sched_getaffinity(0)]
    clocks = _numbers(cores)
    chips = [name.parent for name in (root / "class/hwmon").glob("hwmon*/name") if _text(name) in _CPU_CHIPS]
    heat = _numbers([file for chip in chips for file in chip.glob("temp*_input")]) or _zones(root, "cpu", "x86_pkg")
    found = {"CPU temperature, C": max(heat) / 1e3} if heat else {}
    return found | ({"CPU clock, MHz": sum(clocks) / len(clocks) / 1e3} if clocks else {})


def read_gpu(root: Path = SYSFS, gpu: Gpu | None = None) -> dict[str, float]:
    """Returns the temperature, clock and power of the GPU, from NVML, or from sysfs on a Jetson."""
    devices = [path for pattern in _GPU_CLOCKS for path in (root / "class/devfreq").glob(f"{pattern}/cur_freq")]
    clock = [hertz / 1e6 for hertz in _numbers(devices)]
    heat = [millidegrees / 1e3 for millidegrees in _zones(root, "gpu")]
    found = {"GPU temperature, C": max(heat, default=None), "GPU clock, MHz": max(clock, default=None)}
    if gpu is not None:
        asked = {"GPU temperature, C": gpu.celsius(), "GPU clock, MHz": gpu.megahertz(), "GPU power, W": gpu.watts()}
        found |= {name: value for name, value in asked.items() if value is not None}
    return {name: value for name, value in found.items() if value is not None}


def _zones(root: Path, *parts: str) -> list[float]:
    """Returns the temperatures, in millidegrees, of the thermal zones whose type contains one of ``parts``."""
    kinds = [(path, (_text(path) or "").lower()) for path in (root / "class/thermal").glob("thermal_zone*/type")]
    return _numbers([path.with_name("temp") for path, kind in kinds if any(part in kind for part in parts)])


def read_governor(root: Path = SYSFS) -> str | None:
    """Returns the clock governor of the usable cores, such as "performance"; None if it cannot be read."""
    cores = os.sched_getaffinity(0)
    found = {_text(root / f"devices/system/cpu/cpu{core}/cpufreq/scaling_governor") for core in cores} - {None}
    return ", ".join(sorted(name for name in found if name)) or None


Sensor = Literal["temperature", "clock", "power", "energy"]
_SENSORS: dict[str, Sensor] = {  # name of a reading -> what it is of
    "CPU temperature, C": "temperature",
    "GPU temperature, C": "temperature",
    "CPU clock, MHz": "clock",
    "GPU clock, MHz": "clock",
    "GPU power, W": "power",
}


class Watch:
    """Readings of the machine's sensors, repeated while engines are timed."""

    def __init__(self, root: Path = SYSFS, gpu: Gpu | None = None) -> None:
        self._root, self._gpu, self._seen = root, gpu, dict[str, list[float]]()
        self._next = 0.0

    def look(self, now: bool = True) -> None:
        """Reads all sensors; unless ``now``, at most once per second, so that reading hardly affects the timing."""
        if now or time.monotonic() >= self._next:
            for name, value in (read_cpu(self._root) | read_gpu(self._root, self._gpu)).items():
                self._seen.setdefault(name, []).append(round(value, 1))
            self._next = time.monotonic() + 1

    @property
    def sensors(self) -> set[Sensor]:
        """What was read at least once."""
        return {_SENSORS[name] for name in self._seen}

    def summary(self) -> dict[str, str]:
        """Returns the first, the last and the range of each reading."""
        return {
            name: f"{values[0]:g} at the start, {values[-1]:g} at the end, {min(values):g} to {max(values):g}"
            for name, values in self._seen.items()
        }


class Meter(Protocol):
    """Measures the energy that a part of the machine takes between ``start`` and ``stop``.

    Attributes:
        covers: the part of the machine, and how its energy is measured.
        shortest: shortest useful measurement in seconds, given the delay of the sensor.
    """

    covers: str
    shortest: float

    def start(self) -> None: ...

    def stop(self) -> float | None:
        """Returns the joules since ``start``; None if a reading failed."""


@dataclass(frozen=True)
class Counter:
    """A counter of joules, which restarts at zero after ``wraps`` joules."""

    read: Callable[[], float | None]
    wraps: float = math.inf


class CountingMeter(Meter):
    """Energy as the sum of counters; each may wrap around once between start and stop."""

    def __init__(self, covers: str, counters: Sequence[Counter], shortest: float) -> None:
        self.covers, self.shortest, self._counters = covers, shortest, counters
        self._before: list[float | None] = []

    def start(self) -> None:
        self._before = [counter.read() for counter in self._counters]

    def stop(self) -> float | None:
        total = 0.0
        for counter, before in zip(self._counters, self._before, strict=True):
            after = counter.read()
            if after is None or before is None:
                return None
            total += after - before if after >= before else after - before + counter.wraps
        return total


class SamplingMeter(Meter):
    """Energy as the integral of the power, sampled every ``period`` seconds by a thread (trapezoidal rule)."""

    def __init__(self, covers: str, watts: Callable[[], float | None], shortest: float, period: float = 0.02) -> None:
        self.covers, self.shortest, self._watts, self._period = covers, shortest, watts, period
        self._samples: list[tuple[float, float | None]] = []

    def start(self) -> None:
        self._samples = []
        self._ended = threading.Event()
        self._sample()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> float | None:
        self._ended.set()
        self._thread.join()
        self._sample()
        times, watts = zip(*self._samples, strict=True)
        return None if None in watts else float(trapezoid(watts, times))

    def _watch(self) -> None:
        while not self._ended.wait(self._period):
            self._sample()

    def _sample(self) -> None:
        self._samples.append((time.perf_counter(), self._watts()))


def open_meter(on_gpu: bool, root: Path = SYSFS, gpu: Gpu | None = None) -> Meter | None:
    """Returns the meter for the energy of an engine on the CPU or the GPU; None if nothing can be read.

    On a Jetson it covers the board; elsewhere the CPU packages or the GPU alone. All of them include idle power.
    """
    board = _board_meter(root)
    return board or (_gpu_meter(gpu) if on_gpu else _package_meter(root))


def _package_meter(root: Path) -> Meter | None:
    """RAPL of Intel and AMD: microjoules of each package, which include its parts; updated every ms."""
    counters = []
    for path in sorted((root / "class/powercap").glob("intel-rapl:*")):
        if path.name.count(":") == 1 and (_text(path / "name") or "").startswith("package"):
            wraps = _number(path / "max_energy_range_uj", 1e6) or math.inf
            counters.append(Counter(partial(_number, path / "energy_uj", 1e6), wraps))
    if not counters or any(counter.read() is None for counter in counters):
        return None
    return CountingMeter(f"CPU package{'s' * (len(counters) > 1)} (RAPL), without memory and disks", counters, 0.2)


def _gpu_meter(gpu: Gpu | None) -> Meter | None:
    if gpu is None or (gpu.joules() is None and gpu.watts() is None):
        return None
    if gpu.joules() is not None:
        return CountingMeter("GPU board (NVML's counter), without the CPU", [Counter(gpu.joules)], 1.0)
    return SamplingMeter("GPU board (NVML's power, sampled), without the CPU", gpu.watts, 2.0)


def _board_meter(root: Path) -> Meter | None:
    """A Jetson's power monitors: the rail that feeds the module, or the sum of all rails if there is no such rail."""
    rails = _rails(root)
    total = [name for name in _BOARD_RAILS if name in rails][:1] or sorted(rails)
    if not total or any(rails[name]() is None for name in total):
        return None

    def watts() -> float | None:
        values = [value for name in total if (value := rails[name]()) is not None]
        return sum(values) if len(values) == len(total) else None

    return SamplingMeter(f"board ({' + '.join(total)}, sampled)", watts, 1.0)


def _rails(root: Path) -> dict[str, Callable[[], float | None]]:
    """Returns, by rail, a function that reads its watts: INA3221 (three rails each) and Thor's INA238 (one)."""
    found: dict[str, Callable[[], float | None]] = {}
    for folder in sorted((root / "bus/i2c/drivers").glob("ina*/*/hwmon/hwmon*")):
        labels = {channel: _text(folder / f"in{channel}_label") for channel in (1, 2, 3)}
        labels[1] = labels[1] or _text(folder / "label")
        for channel, label in labels.items():
            if label and label != "NC" and (folder / f"curr{channel}_input").exists():
                found[label] = partial(_watts, folder / f"in{channel}_input", folder / f"curr{channel}_input")
    return found


def _watts(millivolts: Path, milliamperes: Path) -> float | None:
    volts, amperes = _number(millivolts), _number(milliamperes)
    return None if volts is None or amperes is None else volts * amperes / 1e6
