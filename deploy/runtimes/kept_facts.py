"""Facts about a file on this machine: kept beside the file, or in the user's cache if its folder is read-only."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from illama.atomic_write import cache_folder, write_file
from illama.bundle import size_of, with_data
from illama.errors import UserError
from illama.structured_files import read_json

_KEPT = 20  # facts in a file

Fact = TypeVar("Fact")


def stamp(file: Path) -> tuple[str, int, int]:
    """Returns what tells a file from a changed one: its name, its size and when it was modified, in nanoseconds."""
    return file.name, size_of(file), max(each.stat().st_mtime_ns for each in with_data(file))


def kept_facts(file: Path, name: str, kind: type[Fact]) -> list[Fact]:
    """Returns all facts of a kind that were kept about a file; those that cannot be read are as if there were none.

    Args:
        name: name of the file of facts, such as verified.json.
        kind: their dataclass.
    """
    found: list[Fact] = []
    for place in _places(file, name):
        try:
            found += read_json(place, tuple[kind, ...])  # type: ignore[valid-type]
        except UserError:
            continue
    return found


def keep_fact(file: Path, name: str, fact: Any, replaces: Callable[[Any], bool]) -> None:
    """Adds a fact to those that are kept, in the first place that can be written.

    Args:
        replaces: whether the new fact takes the place of an earlier one.
    """
    others = [each for each in kept_facts(file, name, type(fact)) if not replaces(each)]
    text = json.dumps([asdict(each) for each in (*others[1 - _KEPT :], fact)], indent=2) + "\n"
    for place in _places(file, name):
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with write_file(place) as draft:
                draft.write_text(text)
            return
        except OSError:  # read-only, or full
            continue


def _places(file: Path, name: str) -> Iterator[Path]:
    yield file.with_name(name)
    key = hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:16]
    yield cache_folder() / f"{Path(name).stem}-{key}.json"
