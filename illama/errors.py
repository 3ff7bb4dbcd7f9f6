"""One-line errors and warnings for the user."""

from __future__ import annotations

import sys
from functools import cache


class UserError(Exception):
    """An error that the user can correct. The message says in one line what is wrong and what to do."""


@cache
def warn_once(message: str) -> None:
    """Prints a warning to the standard error stream, once per process."""
    print(f"warning: {message}", file=sys.stderr)
