"""Runs a command in a forked process, and kills it before one of its file operations."""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
BEFORE, AFTER = "before the swap", "after the swap"
TEMPORARY = "tmp"  # folder beside that of a run, for $TMPDIR
KillAt = int | str | None
"""Number of a file operation, from 1, or BEFORE or AFTER the swap; None for no kill."""
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Audit event -> positions of its paths in the arguments, and of the descriptors of their base folders.
_CHANGES = {
    "os.rename": ((0, 2), (1, 3)),
    "os.link": ((0, 2), (1, 3)),
    "os.symlink": ((1, 2),),
    "os.remove": ((0, 1),),
    "os.rmdir": ((0, 1),),
    "os.mkdir": ((0, 2),),
    "os.truncate": ((0, None),),
}


def changed_paths(event: str, arguments: Sequence[Any]) -> list[str]:
    """Returns the paths that an audited operation changes; none if it only reads."""
    if event == "open":
        path, _, flags = arguments
        return [os.fsdecode(path)] if flags & _WRITING and not isinstance(path, int) else []
    found = []
    for path, folder in _CHANGES.get(event, ()):
        descriptor = -1 if folder is None else arguments[folder]
        base = Path(f"/proc/self/fd/{descriptor}").readlink() if descriptor >= 0 else Path()
        found.append(str(base / os.fsdecode(arguments[path])))
    return found


class Fork:
    """Runs a function in a forked process."""

    def __init__(self, act: Callable[[], Any]) -> None:
        self.memory = os.memfd_create("result")
        if process := os.fork():
            self.process = process
            return
        status = 1
        try:
            os.write(self.memory, json.dumps(act()).encode())
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)

    def result(self) -> Any:
        """Returns the function's result, converted by JSON; raises RuntimeError if it failed."""
        if os.waitpid(self.process, 0)[1]:
            raise RuntimeError("a forked process failed: see its traceback")
        return json.loads(read_memory(self.memory))


class Run:
    """Runs a command in a forked process, and kills it before one of its file operations below ``place``.

    Args:
        swap: path that the command replaces by a rename.
        kill_by: signal; SIGSTOP stops the command until :meth:`resume`.
    """

    def __init__(
        self,
        arguments: Sequence[object],
        place: Path,
        swap: Path,
        kill_at: KillAt = None,
        kill_by: signal.Signals = signal.SIGKILL,
    ) -> None:
        self.arguments, self.place, self.swap = [str(each) for each in arguments], place, swap
        self.kill_at, self.kill_by, self.count = kill_at, kill_by, 0
        self._output, self._operations = os.memfd_create("output"), os.memfd_create("operations")
        self.process = os.fork()
        if not self.process:
            self._run_and_exit()

    def _run_and_exit(self) -> None:
        status = 1
        try:
            os.environ["TMPDIR"] = str(self.place.parent / TEMPORARY)
            tempfile.tempdir = None
            for descriptor in (1, 2):
                os.dup2(self._output, descriptor)
            sys.argv = self.arguments
            sys.addaudithook(self._count_and_kill)
            runpy.run_path(str(ROOT / self.arguments[0]), run_name="__main__")
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def _count_and_kill(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event != "open" and event not in _CHANGES:
            return
        paths = [path for path in changed_paths(event, arguments) if path.startswith(f"{self.place}{os.sep}")]
        if not paths:
            return
        self.count += 1
        os.write(self._operations, f"{event} {' '.join(paths)}\n".encode())
        swaps = event == "os.rename" and paths[-1] == str(self.swap)
        if self.kill_at == self.count or (swaps and self.kill_at == BEFORE):
            os.kill(os.getpid(), self.kill_by)
        if swaps and self.kill_at == AFTER:
            self.kill_at = self.count + 1

    def wait_until_stopped(self) -> None:
        """Waits until the process has stopped or ended."""
        os.waitid(os.P_PID, self.process, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def resume(self) -> Run:
        """Continues a stopped process, and waits for its end."""
        os.kill(self.process, signal.SIGCONT)
        return self.wait()

    def wait(self) -> Run:
        """Waits for the end of the process."""
        self.status = os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])  # negative for a signal
        self.output, self.operations = (read_memory(file) for file in (self._output, self._operations))
        return self


def read_memory(file: int) -> str:
    """Returns the content of a file in memory, and closes it."""
    content = os.pread(file, os.fstat(file).st_size, 0).decode()
    os.close(file)
    return content
