"""One-line errors and warnings for the user."""

from __future__ import annotations

import importlib.util
import sys
from functools import cache
from pathlib import Path

MAX_MESSAGE = 300  # characters


class UserError(Exception):
    """An error that the user can correct. The message says in one line what is wrong and what to do.

    A longer message is shortened in the middle to :data:`MAX_MESSAGE` characters; line breaks and other control
    characters, which may come from a file's name or content, become spaces.
    """

    def __init__(self, message: str) -> None:
        # A data loader's worker passes its error on with a traceback, which ends with the error.
        super().__init__(shorten(message.strip().rpartition(f"{__name__}.UserError: ")[2], MAX_MESSAGE))


def check_exists(path: Path) -> Path:
    """Returns the path; raises UserError if nothing is there."""
    if not path.exists():
        raise UserError(f"{path} does not exist: give an existing file or folder")
    return path


def shorten(text: str, limit: int) -> str:
    """Returns ``text`` in one line of at most ``limit`` characters: control characters become spaces."""
    line = "".join(each if each.isprintable() else " " for each in text)
    return line if len(line) <= limit else f"{line[: limit * 2 // 3]} ... {line[5 + limit * 2 // 3 - limit :]}"


@cache
def warn_once(message: str) -> None:
    """Prints a warning to the standard error stream, once per process."""
    print(f"warning: {shorten(message, MAX_MESSAGE)}", file=sys.stderr)


def check_packages() -> None:
    """Raises UserError if another project's ``quant``, ``deploy`` or ``eval`` is found instead of this toolkit's."""
    here = Path(__file__).parents[1]
    for name in ("quant", "deploy", "eval"):
        spec = importlib.util.find_spec(name)
        found = Path(spec.origin or "") if spec else here
        if here not in found.parents and found != here:
            raise UserError(
                f"Python finds another package {name!r} in {found.parent}: uninstall it, or install this toolkit in an "
                "environment of its own"
            )
