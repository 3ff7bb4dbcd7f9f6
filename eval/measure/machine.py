"""Cores, threads and memory of this process."""

from __future__ import annotations

import contextlib
import os
import re
import resource
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

from illama.errors import UserError
from illama.hardware import usable_cores


def pin_threads(threads: int | None, sysfs: Path = Path("/sys")) -> list[int]:
    """Pins this process to ``threads`` of its CPUs, before any engine is opened; returns the CPUs it may run on.

    One hardware thread of each core comes first, where the machine tells which ones share a core. All runtimes take
    their number of threads from the remaining CPUs. None changes nothing.

    Raises:
        UserError: ``threads`` is less than 1, or more than there are CPUs.
    """
    usable = sorted(os.sched_getaffinity(0))
    if threads is None:
        return usable
    if not 1 <= threads <= len(usable):
        raise UserError(f"--threads must be 1 to {len(usable)}, the CPUs that this process may use, not {threads}")
    chosen = sorted(_cores_first(usable, sysfs)[:threads])
    for task in Path("/proc/self/task").iterdir():  # running threads do not follow the first one
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(int(task.name), chosen)
    torch.set_num_threads(threads)
    return chosen


@contextlib.contextmanager
def torch_on_all_cores() -> Iterator[None]:
    """Lets PyTorch use one thread per usable core inside the block, as the other runtimes do."""
    before = torch.get_num_threads()
    torch.set_num_threads(usable_cores())
    try:
        yield
    finally:
        torch.set_num_threads(before)


def share_of_cores() -> int:
    """Returns the number of threads for each process of torchrun on this machine; all cores without torchrun.

    Sets PyTorch's number of threads too, which torchrun sets to one.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    threads = max(1, usable_cores() // processes)
    if processes > 1:
        torch.set_num_threads(threads)
    return threads


def _cores_first(usable: list[int], sysfs: Path) -> list[int]:
    """Returns the first hardware thread of every core, then the second of each, and so on."""
    seen: Counter[str] = Counter()
    ranks = {}
    for cpu in usable:
        siblings = sysfs / f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
        core = siblings.read_text().strip() if siblings.exists() else str(cpu)
        ranks[cpu] = seen[core]
        seen[core] += 1
    return sorted(usable, key=lambda cpu: (ranks[cpu], cpu))


def peak_memory_gib() -> float:
    """Returns the peak memory of this process so far.

    On Linux it is not from getrusage, whose figure includes the process that started this one.
    """
    status = Path("/proc/self/status")
    if status.exists() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return int(found[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
