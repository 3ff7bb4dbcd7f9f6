"""Describes this machine, for reports and for choices based on a report."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

from illama.inference import usable_cores


def describe_machine() -> dict[str, Any]:
    """Returns the processor, cores, memory in GiB, operating system, Python version and GPU."""
    return {
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def cpu_name() -> str:
    """Returns the processor's name as the operating system reports it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith(("model name", "Hardware"))]
    return names[0] if names else platform.processor() or "unknown"
