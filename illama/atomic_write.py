"""Files and folders that appear whole or not at all: written beside their place and renamed into it."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from illama.bundle import is_bundle
from illama.errors import UserError


@contextmanager
def write_folder(folder: Path, is_ours: Callable[[Path], bool] = is_bundle) -> Iterator[Path]:
    """A temporary folder that takes the place of ``folder`` if the block succeeds and vanishes if not.

    Raises:
        UserError: at once, if ``folder`` cannot be written, or holds files and ``is_ours`` denies it.
    """
    folder = folder.resolve()
    if folder.exists() and not (folder.is_dir() and (not any(folder.iterdir()) or is_ours(folder))):
        raise UserError(f"{folder} holds other files and will not be replaced: choose another folder")
    draft, old = (folder.with_name(f".{folder.name}.{kind}-{os.getpid()}") for kind in ("draft", "old"))
    try:
        _sweep(folder)
        draft.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}; choose another folder") from error
    try:
        yield draft
        if folder.exists():
            folder.rename(old)
        draft.rename(folder)
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)
        for leftover in (draft, old):
            shutil.rmtree(leftover, ignore_errors=True)


def make_out(out: Path) -> None:
    """The folder that a command writes into; UserError if it cannot be made."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}; choose another --out") from error


def _sweep(folder: Path) -> None:
    """Clear up after processes that were killed while they wrote ``folder``."""
    for leftover in [*folder.parent.glob(f".{folder.name}.old-*"), *folder.parent.glob(f".{folder.name}.draft-*")]:
        kind, _, process = leftover.name.rpartition("-")
        if process.isdigit() and not Path(f"/proc/{process}").exists():
            if kind.endswith(".old") and not folder.exists():
                leftover.rename(folder)
            else:
                shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def write_file(path: Path) -> Iterator[Path]:
    """A temporary path that takes the place of ``path`` if the block succeeds and vanishes if not."""
    draft = path.with_name(f".{path.name}.draft-{os.getpid()}")
    try:
        yield draft
        with draft.open("rb") as file:
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def write_pinned(path: Path, data: bytes) -> None:
    """Write a file, and beside it its SHA-256 in sha256sum's form."""
    for target, content in ((path, data), (_pin(path), f"{hashlib.sha256(data).hexdigest()}  {path.name}\n".encode())):
        with write_file(target) as draft:
            draft.write_bytes(content)


def read_pinned(path: Path) -> bytes | None:
    """What :func:`write_pinned` wrote; None if there is no such file, or it is not what its SHA-256 is of."""
    try:
        data, pin = path.read_bytes(), _pin(path).read_text()
    except (OSError, UnicodeDecodeError):
        return None
    return data if pin.split()[:1] == [hashlib.sha256(data).hexdigest()] else None


def _pin(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")
