"""Returns freed memory to the operating system."""

from __future__ import annotations

import ctypes
import gc


def release_memory() -> None:
    """Returns what was freed; glibc keeps most blocks of up to 32 MB, and with them gigabytes of a large network."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # only glibc has it
    if trim is not None:
        trim(0)
