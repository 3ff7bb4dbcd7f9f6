"""One-line errors for the user's mistakes, and the wrapper that every command runs in."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable
from functools import cache
from typing import TypeVar

import tyro

Options = TypeVar("Options")
_CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS, errno.EPERM, errno.EEXIST,
                 errno.ENOTDIR, errno.EBUSY, errno.EXDEV)  # fmt: skip


class UserError(Exception):
    """Something the user can put right. The message says what is wrong and what to do, in one line."""


def run_command(
    options: type[Options], main: Callable[[Options], None], default: Callable[[], Options] | None = None
) -> None:
    """Parse the command line into ``options``, run ``main`` and turn the user's mistakes into one line.

    ``default`` makes the options that the command line overrides; without it they are the dataclass's own.

    Exits with 2 for a mistake (bad option, bad file, full disk) and 130 for Ctrl-C; anything else is a
    defect of this project and keeps its traceback.
    """
    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # a polite kill cleans up like Ctrl-C
        main(tyro.cli(options, default=default()) if default else tyro.cli(options))
    except UserError as error:
        # One from a data loader's worker comes back wrapped in the worker's traceback; its last line is the error.
        _exit(str(error).strip().splitlines()[-1].removeprefix("illama.errors.UserError: "), 2)
    except KeyboardInterrupt:
        _exit("interrupted; nothing half-written was left behind", 130)
    except OSError as error:
        if error.errno not in _CANNOT_WRITE:
            raise
        _exit(f"cannot use {error.filename or 'the output folder'}: {os.strerror(error.errno)}", 2)


@cache
def warn_once(message: str) -> None:
    """A warning in one line on the standard error stream, once in a process."""
    print(f"warning: {message}", file=sys.stderr)


def _exit(message: str, status: int) -> None:
    print(f"error: {message}" if status == 2 else message, file=sys.stderr)
    sys.exit(status)
