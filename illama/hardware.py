"""Describes this machine, for reports and for choices based on a report."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

from illama.errors import UserError


def usable_cores() -> int:
    """Returns the number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def products_saturate(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether 8-bit products of this CPU can overflow: an x86 CPU without VNNI adds pairs of them in 16 bits.

    u8 x s8 + u8 x s8 is up to 2 x 255 x 127, and the instruction (vpmaddubsw) clips it to 32767.
    """
    if platform.machine() not in ("x86_64", "AMD64") or not cpuinfo.exists():
        return False
    return not {"avx512_vnni", "avx_vnni"} & set(cpuinfo.read_text().split())


def computes_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this CPU multiplies bfloat16; where it does not, PyTorch emulates it, far slower than float32."""
    return cpuinfo.exists() and bool({"avx512_bf16", "amx_bf16", "bf16"} & set(cpuinfo.read_text().split()))


def cuda_gpu() -> Any | None:
    """Returns ``torch.cuda`` if PyTorch is installed and there is an NVIDIA GPU, else None."""
    try:
        import torch
    except ImportError:
        return None
    return torch.cuda if torch.cuda.is_available() else None


def torch_device(name: str) -> str:
    """Returns the device that an option names: auto is cuda if there is a GPU; UserError for cuda without one."""
    gpu = cuda_gpu() is not None
    if name == "cuda" and not gpu:
        raise UserError("--device cuda: PyTorch finds no NVIDIA GPU here; give cpu or auto")
    return name if name != "auto" else "cuda" if gpu else "cpu"


def describe_machine() -> dict[str, Any]:
    """Returns the processor, cores, memory in GiB, operating system, Python version and GPU."""
    return {
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "gpu": gpu.get_device_name() if (gpu := cuda_gpu()) else None,
    }


def cpu_name() -> str:
    """Returns the processor's name as the operating system reports it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith(("model name", "Hardware"))]
    return names[0] if names else platform.processor() or "unknown"
