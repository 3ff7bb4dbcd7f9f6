"""Returns freed memory to the operating system."""

from __future__ import annotations

import ctypes
import gc
import os
from pathlib import Path

_WORTH = 2**31  # bytes of this process, below which it takes longer than it helps


def release_memory() -> None:
    """Returns what was freed; glibc keeps most blocks of up to 32 MB, and with them gigabytes of a large network."""
    pages = Path("/proc/self/statm")
    if not pages.exists() or int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") < _WORTH:
        return
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # only glibc has it
    if trim is not None:
        trim(0)
