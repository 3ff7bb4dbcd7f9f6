"""Atomic writes: files and folders that appear whole or not at all, even if their writer is killed.

What is written is a draft, ``.NAME.draft-RANDOM`` beside its place, until one rename puts it there. While it writes,
the writer holds the lock ``.NAME.draft-RANDOM.lock``. A draft whose lock is free was left by a killed process, and the
next write of NAME removes it.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from illama.bundle import is_bundle
from illama.errors import UserError
from illama.locks import file_lock

LOCK = ".lock"  # in a folder that a process works in
# Earlier versions named a draft after its process, and had no locks.
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.(draft|old)-(?P<token>[0-9a-f]{16}|\d{1,10})(\.lock)?", re.DOTALL)
_LOST_RACE = (errno.ENOENT, errno.EEXIST, errno.ENOTEMPTY)
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of <fcntl.h> and <linux/fs.h>


@contextmanager
def write_folder(folder: Path, is_ours: Callable[[Path], bool] = is_bundle) -> Iterator[Path]:
    """A temporary folder that takes the place of ``folder`` if the block succeeds and vanishes if not.

    Of two processes that write the same folder, the later one replaces what the earlier one wrote.

    Raises:
        UserError: at once, if ``folder`` cannot be written, or holds files and ``is_ours`` denies it; at the end, if
            that has become so.
    """
    folder = folder.resolve()
    _refuse_foreign(folder, is_ours)
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
    """A temporary path that takes the place of ``path`` if the block succeeds and vanishes if not."""
    with _draft_of(path) as draft:
        yield draft
        with draft.open("rb") as file:
            os.fsync(file.fileno())
        draft.replace(path)


def write_pinned(path: Path, data: bytes) -> None:
    """Write a file, and beside it its SHA-256 in sha256sum's form."""
    old, new = ("" if content is None else _pin_line(path, content) for content in (read_pinned(path), data))
    # Between the steps, the file is the old or the new one, and the pin names both.
    for target, content in ((_pin(path), (new + old).encode()), (path, data), (_pin(path), new.encode())):
        with write_file(target) as draft:
            draft.write_bytes(content)


def read_pinned(path: Path) -> bytes | None:
    """What :func:`write_pinned` wrote; None if there is no such file, or its SHA-256 is not the one beside it."""
    try:
        data, pin = path.read_bytes(), _pin(path).read_text()
    except (OSError, UnicodeDecodeError):
        return None
    return data if _pin_line(path, data).split()[0] in pin.split() else None


def make_out(out: Path) -> None:
    """The folder that a command writes into; UserError if it cannot be made."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}; choose another --out") from error


@contextmanager
def lock_folder(folder: Path, main: bool = True) -> Iterator[None]:
    """Keep other processes from working in a folder, which is made if it is missing.

    Args:
        main: False does nothing: of processes that work together, one holds the lock for all.

    Raises:
        UserError: another process works in it, or it cannot be written.
    """
    if not main:
        yield
        return
    made = not folder.exists()
    make_out(folder)
    with ExitStack() as stack:
        if made:
            stack.callback(_remove_empty, folder)
        try:
            stack.enter_context(file_lock(folder / LOCK))
        except BlockingIOError as error:
            raise UserError(f"{folder} is in use by another process: wait for it, or choose another --out") from error
        except OSError as error:
            raise UserError(f"cannot write {folder}: {error.strerror}; choose another --out") from error
        yield


def remove_folder(folder: Path) -> None:
    """Remove a folder, which is whole or gone at any moment."""
    with _draft_of(folder) as draft:
        folder.rename(draft)


def list_folder(folder: Path) -> list[Path]:
    """What a folder holds, sorted, without the drafts and locks of processes that run or were killed."""
    return sorted(path for path in folder.iterdir() if path.name != LOCK and not _TEMPORARY.fullmatch(path.name))


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def _pin(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _pin_line(path: Path, data: bytes) -> str:
    return f"{hashlib.sha256(data).hexdigest()}  {path.name}\n"


def _refuse_foreign(folder: Path, is_ours: Callable[[Path], bool]) -> None:
    """UserError for a folder that must not be replaced, or cannot be."""
    while version := _version(folder):
        with suppress(FileNotFoundError):
            if folder.is_mount():
                raise UserError(f"{folder} is a mount point and cannot be replaced: choose a folder in it")
            if folder.is_dir() and (not list_folder(folder) or is_ours(folder)):
                return
            if _version(folder) == version:  # else another process replaced the folder while this one looked
                raise UserError(f"{folder} holds other files and will not be replaced: choose another folder")


def _version(path: Path) -> tuple[int, int] | None:
    """What differs between two folders that were at the same path one after another; None if nothing is there."""
    try:
        facts = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return facts.st_ino, facts.st_ctime_ns


def _beside(place: Path, kind: str, token: str) -> Path:
    return place.with_name(f".{place.name}.{kind}-{token}")


@contextmanager
def _draft_of(place: Path) -> Iterator[Path]:
    """A path beside ``place`` for this process alone; whatever is there is removed at the end."""
    _sweep(place)
    draft = _beside(place, "draft", secrets.token_hex(8))
    with file_lock(draft.with_name(f"{draft.name}.lock"), wait=True):  # for a sweep that came before the lock
        try:
            yield draft
        finally:
            _remove(draft)


def _sweep(place: Path) -> None:
    """Remove what killed processes left of their writes of ``place``, and put back a folder that one had moved away."""
    found = [_TEMPORARY.fullmatch(path.name) for path in place.parent.iterdir()]
    for token in {match["token"] for match in found if match and match["name"] == place.name}:
        draft, old = (_beside(place, kind, token) for kind in ("draft", "old"))
        # Left as it is: in use (BlockingIOError), or another user's.
        with suppress(OSError), file_lock(draft.with_name(f"{draft.name}.lock")) as held:
            if held and old.is_dir() and not place.exists():
                old.rename(place)
            for leftover in (draft, old) if held else ():
                _remove(leftover)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _take_place(draft: Path, folder: Path, is_ours: Callable[[Path], bool]) -> None:
    """Rename a draft to its place; the content of an earlier folder there is in the draft's place afterwards."""
    while True:
        try:
            if not folder.exists():
                draft.rename(folder)
                return
            _refuse_foreign(folder, is_ours)
            _exchange(draft, folder)
            return
        except OSError as error:  # another process wrote the folder in between
            if error.errno not in _LOST_RACE or not draft.exists():
                raise


def _exchange(draft: Path, folder: Path) -> None:
    """Swap two folders in one step, or in two renames where the kernel or the file system has no such step."""
    try:
        _renameat2(draft, folder)
        return
    except OSError as error:
        if error.errno not in _NO_EXCHANGE:
            raise
    old = _beside(folder, "old", draft.name.rpartition("-")[2])
    _remove(old)  # of an earlier attempt
    folder.rename(old)
    try:
        draft.rename(folder)
    except BaseException:
        with suppress(OSError):  # another process was faster
            old.rename(folder)
        raise
    _remove(old)


def _renameat2(one: Path, other: Path) -> None:
    sys.audit("os.rename", one, other, -1, -1)
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if libc.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(one), None, str(other))
