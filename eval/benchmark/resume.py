"""A folder that an interrupted run goes on in: it says what it is a run of, and takes no other."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from illama.atomic_write import list_folder, make_out, write_file
from illama.errors import UserError

RUN = "run.json"


def claim(folder: Path, facts: Mapping[str, Any]) -> None:
    """Make the folder of a run, or go on in one of the same.

    Args:
        facts: all that decides the result, as JSON can hold it, such as files with their SHA-256.

    Raises:
        UserError: the folder holds files without a ``run.json``, or a run of other facts.
    """
    path, wanted = folder / RUN, json.loads(json.dumps(facts))
    make_out(folder)
    if list_folder(folder):
        if not path.exists():
            raise UserError(f"{folder} holds other files: choose another --out")
        if (stored := _read(path)) != wanted:
            other = [name for name in {**stored, **wanted} if stored.get(name) != wanted.get(name)]
            raise UserError(f"{folder} holds a run of other {', '.join(other)}: choose another --out, or delete it")
    else:
        with write_file(path) as draft:
            draft.write_text(json.dumps(wanted, indent=2) + "\n")


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged: delete {path.parent}, or choose another --out") from error
