"""Atomic writes: a file or folder is replaced completely or not at all, even if its writer is killed.

The writer fills a draft, ``.NAME.draft-RANDOM`` in the same folder, and renames it to NAME at the end. Meanwhile it
holds the lock ``.NAME.draft-RANDOM.lock``, which the kernel releases when the process ends in any way. A
draft whose lock is free was left by a killed process; the next write of NAME removes it.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from illama.bundle import MANIFEST
from illama.errors import UserError
from illama.manifest import is_bundle

LOCK = ".lock"  # name of the lock file in a folder that a process uses
_LOST_RACE = (errno.ENOENT, errno.EEXIST, errno.ENOTEMPTY)
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of <fcntl.h> and <linux/fs.h>
_held: set[int] = set()  # descriptors of locked files


@contextmanager
def write_folder(folder: Path, is_ours: Callable[[Path], bool] = is_bundle) -> Iterator[Path]:
    """Yields a temporary folder that replaces ``folder`` if the block succeeds and is removed if it fails.

    Args:
        is_ours: returns whether an existing folder may be replaced. An empty folder is always replaced.

    Raises:
        UserError: ``folder`` cannot be written, is in use (:func:`lock_folder`), or has content and
            ``is_ours(folder)`` is False. Checked at the start and again before the replacement.
    """
    folder = folder.resolve()
    refuse_foreign(folder, is_ours)
    with ExitStack() as stack:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            draft = stack.enter_context(_draft_of(folder))
            draft.mkdir()
        except OSError as error:
            raise UserError(f"cannot write {folder}: {error.strerror}; choose another folder") from error
        yield draft
        _take_place(draft, folder, is_ours)


@contextmanager
def write_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path; its file replaces ``path`` if the block succeeds and is removed if it fails."""
    with _draft_of(path) as draft:
        yield draft
        with draft.open("rb") as file:
            os.fsync(file.fileno())
        draft.replace(path)


def write_pinned(path: Path, data: bytes) -> None:
    """Writes a file, and its SHA-256 to ``NAME.sha256`` in the format of sha256sum."""
    old, new = ("" if content is None else _pin_line(path, content) for content in (read_pinned(path), data))
    # Until the last step, NAME.sha256 lists the old and the new file, so that either is accepted.
    for target, content in ((_pin(path), (new + old).encode()), (path, data), (_pin(path), new.encode())):
        with write_file(target) as draft:
            draft.write_bytes(content)


def read_pinned(path: Path) -> bytes | None:
    """Returns what :func:`write_pinned` wrote, or None if the file is missing or does not have its SHA-256."""
    try:
        data, pin = path.read_bytes(), _pin(path).read_text()
    except (OSError, UnicodeDecodeError):
        return None
    return data if _pin_line(path, data).split()[0] in pin.split() else None


def cache_folder() -> Path:
    """Returns the folder of this user's caches, ``$XDG_CACHE_HOME/illama`` or ``~/.cache/illama``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "illama"


@contextmanager
def file_lock(path: Path, wait: bool = False) -> Iterator[bool]:
    """Creates a file, holds ``flock`` on it, and removes it at the end; yields False on a file system without locks.

    Raises:
        BlockingIOError: another process holds the lock, and ``wait`` is False.
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


def _close_held() -> None:
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_close_held)  # so that a worker does not keep its killed parent's locks


def _acquire(path: Path, wait: bool) -> tuple[int, bool]:
    """Returns the file's descriptor and whether it is locked: False on a file system without locks."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    return descriptor, True
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return descriptor, False
            os.close(descriptor)
            raise
        os.close(descriptor)  # the lock's last holder removed the file after it was opened here


def make_out(out: Path) -> None:
    """Creates a command's output folder; raises UserError if that fails."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}; choose another --out") from error


@contextmanager
def lock_folder(folder: Path, main: bool = True) -> Iterator[None]:
    """Locks a folder against other processes, and creates it if it is missing; does nothing unless ``main``.

    Raises:
        UserError: another process uses the folder, or it cannot be written.
    """
    if not main:
        yield
        return
    made = not folder.exists()
    make_out(folder)
    with ExitStack() as stack:
        if made:
            stack.callback(remove_empty, folder)
        try:
            stack.enter_context(file_lock(folder / LOCK))
        except OSError as error:
            reason = "it is in use by another process" if isinstance(error, BlockingIOError) else error.strerror
            raise UserError(f"cannot write {folder}: {reason}; choose another --out") from error
        sweep(folder)
        yield


def sweep(folder: Path, name: str | None = None) -> None:
    """Removes the drafts of ``name`` that killed processes left in a folder, or all drafts if no name is given."""
    # Draft names of older versions end in a process ID. They are matched for a known name only, because other files may
    # end in numbers too.
    pattern = _temporary(re.escape(name), r"[0-9a-f]{16}|\d{1,10}") if name else _temporary()
    found = [pattern.fullmatch(path.name) for path in folder.iterdir()] if folder.is_dir() else []
    for place, token in {(folder / match["name"], match["token"]) for match in found if match}:
        draft, old = (_beside(place, kind, token) for kind in ("draft", "old"))
        # A draft that is in use (BlockingIOError) or belongs to another user is kept.
        with suppress(OSError), file_lock(draft.with_name(f"{draft.name}.lock")) as held:
            if held and old.is_dir() and not place.exists():
                old.rename(place)  # the writer was killed between the two renames of _exchange
            for leftover in (draft, old) if held else ():
                remove(leftover)


def remove_folder(folder: Path) -> None:
    """Removes a folder atomically."""
    with _draft_of(folder) as draft:
        folder.rename(draft)


def list_folder(folder: Path) -> list[Path]:
    """Returns the sorted content of a folder, without drafts and locks."""
    return sorted(path for path in folder.iterdir() if path.name != LOCK and not _temporary().fullmatch(path.name))


def bundles_in(folder: Path, files: Collection[str]) -> list[Path]:
    """Returns the bundles in a folder that have one of ``files``, sorted by name."""
    return [
        path
        for path in list_folder(folder)
        if (path / MANIFEST).exists() and any((path / name).exists() for name in files)
    ]


def _temporary(name: str = ".+", token: str = "[0-9a-f]{16}") -> re.Pattern[str]:
    """Returns a pattern of the names of drafts, of folders that are being replaced, and of their locks."""
    return re.compile(rf"\.(?P<name>{name})\.(draft|old)-(?P<token>{token})(\.lock)?", re.DOTALL)


def remove_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def _pin(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _pin_line(path: Path, data: bytes) -> str:
    return f"{hashlib.sha256(data).hexdigest()}  {path.name}\n"


def refuse_foreign(folder: Path, is_ours: Callable[[Path], bool]) -> None:
    """Raises UserError for a folder that must not or cannot be replaced."""
    while version := _version(folder):
        with suppress(FileNotFoundError):
            if folder.is_mount():
                raise UserError(f"{folder} is a mount point and cannot be replaced: choose a folder in it")
            if _in_use(folder):
                raise UserError(f"{folder} is in use by another process: choose another folder")
            if folder.is_dir() and (not list_folder(folder) or is_ours(folder)):
                return
            if _version(folder) == version:  # else another process replaced the folder meanwhile
                raise UserError(f"{folder} holds other files and will not be replaced: choose another folder")


def _in_use(folder: Path) -> bool:
    """Returns whether a process holds the lock of a folder."""
    if (folder / LOCK).exists():
        try:
            with file_lock(folder / LOCK):
                pass
        except BlockingIOError:
            return True
        except OSError:  # it cannot be opened for writing; the write itself reports why
            pass
    return False


def _version(path: Path) -> tuple[int, int] | None:
    """Returns inode and change time, to notice that a folder was replaced; None if it does not exist."""
    try:
        facts = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return facts.st_ino, facts.st_ctime_ns


def _beside(place: Path, kind: str, token: str) -> Path:
    return place.with_name(f".{place.name}.{kind}-{token}")


@contextmanager
def _draft_of(place: Path) -> Iterator[Path]:
    """Yields a path beside ``place`` that only this process uses, and removes its content at the end."""
    sweep(place.parent, place.name)
    draft = _beside(place, "draft", secrets.token_hex(8))
    with file_lock(draft.with_name(f"{draft.name}.lock"), wait=True):  # another process's sweep may hold it
        try:
            yield draft
        finally:
            remove(draft)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _take_place(draft: Path, folder: Path, is_ours: Callable[[Path], bool]) -> None:
    """Renames a draft to ``folder``; an existing folder gets the draft's name."""
    while True:
        try:
            if folder.exists():
                refuse_foreign(folder, is_ours)
                _exchange(draft, folder)
            else:
                draft.rename(folder)
            return
        except OSError as error:  # another process wrote the folder meanwhile
            if error.errno not in _LOST_RACE or not draft.exists():
                raise


def _exchange(draft: Path, folder: Path) -> None:
    """Swaps two folders by one system call, or replaces the second by two renames where it is not supported."""
    try:
        _renameat2(draft, folder)
        return
    except OSError as error:
        if error.errno not in _NO_EXCHANGE:
            raise
    old = _beside(folder, "old", draft.name.rpartition("-")[2])
    remove(old)  # of an earlier attempt
    folder.rename(old)
    try:
        draft.rename(folder)
    except BaseException:
        with suppress(OSError):  # another process was faster
            old.rename(folder)
        raise
    remove(old)


def _renameat2(one: Path, other: Path) -> None:
    sys.audit("os.rename", one, other, -1, -1)
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if libc.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(one), None, str(other))
