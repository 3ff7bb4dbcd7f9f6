"""One-line errors for the user's mistakes."""

from __future__ import annotations

import sys
from functools import cache


class UserError(Exception):
    """Something the user can put right. The message says what is wrong and what to do, in one line."""


@cache
def warn_once(message: str) -> None:
    """A warning in one line on the standard error stream, once in a process."""
    print(f"warning: {message}", file=sys.stderr)
