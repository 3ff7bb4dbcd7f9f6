"""Locks between processes. The kernel releases one when its holder ends, however that ends.

A lock is ``flock`` on a file made for it, because network file systems do not lock folders. The file is removed when
the lock is released. A file that a killed process left is locked again by the next process that needs it.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)
_held: set[int] = set()  # file descriptors


def _close_in_child() -> None:
    """Otherwise a data loader's worker would hold its parent's locks for some seconds after the parent was killed."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)


@contextmanager
def file_lock(path: Path, wait: bool = False) -> Iterator[bool]:
    """Hold the lock of the file ``path``, which is made if it is missing, and removed at the end.

    Yields:
        Whether the lock is held: False on a file system without locks.

    Raises:
        BlockingIOError: another process holds it, and ``wait`` is False.
        OSError: the file cannot be opened for writing.
    """
    descriptor, supported = _acquire(path, wait)
    _held.add(descriptor)
    try:
        yield supported
    finally:
        if descriptor in _held:  # not in a forked child
            path.unlink(missing_ok=True)  # while the lock is held: later the file could be another process's
            _held.remove(descriptor)
            os.close(descriptor)


def _acquire(path: Path, wait: bool) -> tuple[int, bool]:
    """A descriptor of the file once it is locked; (descriptor, False) where there are no locks."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    return descriptor, True
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                return descriptor, False
            os.close(descriptor)
            raise
        os.close(descriptor)  # its last holder removed the file after it was opened here
