"""Partial work: a long command that ends early keeps its finished parts, and the same command continues with them.

Until the command's folder OUT is complete, ``OUT.partial`` holds

    run.json        everything that determines the result, such as the options and the SHA-256 of the weights
    result/         the folder that becomes OUT
    NAME.sha256     the SHA-256 of each file of the finished part ``result/NAME`` (:func:`illama.bundle.sha256`)
    steps/          a folder for each step that continues by itself
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from illama.atomic_write import (
    list_folder,
    lock_folder,
    make_out,
    refuse_foreign,
    remove,
    remove_empty,
    remove_folder,
    sweep,
    write_file,
    write_folder,
)
from illama.bundle import sha256
from illama.errors import UserError
from illama.manifest import is_bundle
from illama.structured_files import read_json

RUN = "run.json"
SUFFIX = ".partial"
_RESULT, _STEPS, _PIN = "result", "steps", ".sha256"


class PartialWork:
    """The folder ``OUT.partial`` of a command, whose lock this process holds; see :func:`partial_work`.

    Attributes:
        result: folder that becomes OUT.
        finished: names of the finished parts in ``result``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.result = folder, folder / _RESULT
        self.finished: set[str] = set()
        self._started = False

    def start(self, facts: Mapping[str, Any], restart: bool = False) -> None:
        """Continues the run with the same facts, or starts a new one; call it before anything is written.

        A run without a finished part is started again, whatever its facts are.

        Args:
            facts: everything that determines the finished parts, as JSON can hold it.
            restart: discard an unfinished run.

        Raises:
            UserError: the folder holds an unfinished run with other facts, or other files.
        """
        found: set[str] = set()
        if (self.folder / RUN).exists():
            found = {name for pin in self._pins() if self._is_whole(name := pin.name.removesuffix(_PIN))}
            if restart or not found:
                self._clear()
        claim(self.folder, facts, "give the same options, or discard it (--restart, or delete the folder)")
        self.finished, self._started = set() if restart else found, True
        for folder in (self.result, *(self.result / name for name in self.finished)):
            folder.mkdir(exist_ok=True)
            sweep(folder)
        if self.finished:
            print(
                f"continuing the unfinished run in {self.folder}: {', '.join(sorted(self.finished))} done", flush=True
            )

    def part(self, name: str, write: Callable[[Path], object]) -> Path:
        """Returns the folder ``result/name``, which ``write`` fills unless it is finished already.

        Args:
            write: called with a temporary folder, which becomes ``result/name``.
        """
        part = self.result / name
        if name not in self.finished:
            with write_folder(part, lambda _: True) as draft:
                write(draft)
            files = sorted(path for path in part.rglob("*") if path.is_file())
            lines = [f"{sha256(path)}  {path.relative_to(self.result)}\n" for path in files]
            with write_file(self._pin(name)) as draft:
                draft.write_text("".join(lines))
            self.finished.add(name)
        return part

    def step(self, name: str) -> Path:
        """Returns a folder for a step that continues by itself, such as in :mod:`eval.measure.evaluate_split`."""
        return self.folder / _STEPS / name

    def end(self, succeeded: bool) -> bool:
        """Removes the run, unless it failed with finished parts; returns whether they are kept."""
        keeps = self._started and not succeeded and bool(self.finished)
        if self._started and not keeps:
            self._clear()
        return keeps

    def _pin(self, name: str) -> Path:
        return self.folder / f"{name}{_PIN}"

    def _pins(self) -> list[Path]:
        paths = [path for path in list_folder(self.folder) if path.name not in (RUN, _RESULT, _STEPS)]
        if any(path.suffix != _PIN for path in paths):
            raise UserError(f"{self.folder} holds other files: move them away, or choose another --out")
        return paths

    def _is_whole(self, name: str) -> bool:
        """Returns whether a part has all its files as they were written."""
        try:
            pinned = [line.split("  ", 1) for line in self._pin(name).read_text().splitlines()]
            return bool(pinned) and all(sha256(self.result / path) == digest for digest, path in pinned)
        except (OSError, ValueError):
            return False

    def _clear(self) -> None:
        # run.json is the last, so that the folder is recognized until everything else is gone.
        for path in (*self._pins(), self.folder / _STEPS, self.result, self.folder / RUN):
            remove(path)


@contextmanager
def partial_work(out: Path, is_ours: Callable[[Path], bool] = is_bundle) -> Iterator[PartialWork]:
    """Yields the partial work of ``out``; its result replaces ``out`` atomically if the block succeeds.

    If the block fails, or the process ends in any way, finished parts are kept for the next run.

    Args:
        is_ours: see :func:`illama.atomic_write.write_folder`.

    Raises:
        UserError: ``out`` cannot be replaced, or ``OUT.partial`` cannot be written or is in use.
        KeyboardInterrupt: Ctrl-C or SIGTERM; it says how to continue.
    """
    out = out.resolve()
    refuse_foreign(out, is_ours)
    folder = out.with_name(f"{out.name}{SUFFIX}")
    with ExitStack() as stack:
        stack.callback(remove_empty, folder)  # after the lock is released
        stack.enter_context(lock_folder(folder))
        work = PartialWork(folder)
        try:
            yield work
            with write_folder(out, is_ours) as draft:
                work.result.rename(draft)
        except BaseException as error:
            if work.end(succeeded=False) and isinstance(error, KeyboardInterrupt):
                raise KeyboardInterrupt(f"interrupted; run the same command again to continue from {folder}") from error
            raise
        work.end(succeeded=True)


def claim(
    folder: Path,
    facts: Mapping[str, Any],
    advice: str = "choose another --out, or delete the folder",
    restart: bool = False,
) -> None:
    """Starts a run in a folder, or continues a run with the same facts there.

    Args:
        facts: everything that determines the result, as JSON can hold it, such as the files' SHA-256.
        advice: what to do about a run with other facts.
        restart: discard a run with other facts.

    Raises:
        UserError: the folder holds files but no ``run.json``, or a run with other facts.
    """
    path, wanted = folder / RUN, json.loads(json.dumps(facts, default=str))
    make_out(folder)
    if list_folder(folder):
        if not path.exists():
            raise UserError(f"{folder} holds other files: choose another --out")
        if (stored := read_json(path, dict[str, Any])) == wanted:
            return
        if not restart:
            other = [name for name in {**stored, **wanted} if stored.get(name) != wanted.get(name)]
            raise UserError(f"{folder} holds a run with other {', '.join(other)}: {advice}")
        remove_folder(folder)
        make_out(folder)
    with write_file(path) as draft:
        draft.write_text(json.dumps(wanted, indent=2) + "\n")


def sources_digest() -> str:
    """Returns a SHA-256 over the code and the schemes of this toolkit, which a version number alone does not tell."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for package in ("illama", "quant", "deploy", "eval"):
        for path in sorted(path for path in (root / package).rglob("*") if path.suffix in (".py", ".yaml")):
            digest.update(path.read_bytes())
    return digest.hexdigest()
