"""Runs a function in a forked child with limits, so that a hang, a death or gigabytes are found."""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import signal
import traceback
from collections.abc import Callable
from dataclasses import dataclass

from illama.errors import MAX_MESSAGE, UserError

SECONDS = 20  # of an input; a machine that is busy is slow
EXTRA_BYTES = 2 << 30  # of address space, above that of the warmed process


@dataclass(frozen=True)
class Outcome:
    """How an input ended: ``correct``, ``clean`` (one line for the user) or ``fault``, and the message."""

    kind: str
    message: str = ""


def run_in_fork(act: Callable[[], None]) -> Outcome:
    """Runs ``act``, which returns if the result is right, and raises UserError in one line if the input is refused."""
    result = os.memfd_create("outcome")
    process = os.fork()
    if not process:
        _run_and_exit(act, result)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    content = os.pread(result, os.fstat(result).st_size, 0)
    os.close(result)
    if status:
        name = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        return Outcome("fault", f"it ended by {name}" + (f" after {SECONDS} s" if name == "SIGALRM" else ""))
    return Outcome(*json.loads(content))


def _run_and_exit(act: Callable[[], None], result: int) -> None:
    try:
        signal.alarm(SECONDS)
        faulthandler.disable()  # pytest's would print the stack of a death
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()  # noqa: PTH123, SIM115
        resource.setrlimit(resource.RLIMIT_AS, (used + EXTRA_BYTES,) * 2)
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)
        os.write(result, json.dumps(_outcome(act)).encode())
        os._exit(0)
    except BaseException:
        os._exit(3)


def _outcome(act: Callable[[], None]) -> tuple[str, str]:
    try:
        act()
        return "correct", ""
    except UserError as error:
        message = str(error)
        if "\n" in message or len(message) > MAX_MESSAGE or not message:
            return "fault", f"a message that is not one line of {MAX_MESSAGE} characters: {message!r:.1000}"
        return "clean", message
    except BaseException:
        return "fault", traceback.format_exc()[-6000:]
