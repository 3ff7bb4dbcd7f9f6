"""What the figures were measured on."""

from __future__ import annotations

import os
import platform
import re
import resource
from pathlib import Path
from typing import Any

from illama.accuracy import usable_cores


def describe_machine() -> dict[str, Any]:
    """Processor, cores, memory in GiB, operating system, Python and GPU, for a report."""
    import torch

    return {
        "cpu": _cpu_name(),
        "cores": usable_cores(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def peak_memory_gib() -> float:
    """The most memory that this process has held so far.

    On Linux not getrusage's figure, which starts at that of the process that started this one.
    """
    status = Path("/proc/self/status")
    if status.exists() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return int(found[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith(("model name", "Hardware"))]
    return names[0] if names else platform.processor() or "unknown"
