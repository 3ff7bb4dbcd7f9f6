"""The constraints of a mixed-precision search. Imports nothing slow, so that ``--help`` answers at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

_UNITS = {"drop": "points", "ms": "ms", "megabytes": "MB"}


@dataclass(frozen=True)
class Budget:
    """The constraint and, where it leaves a choice, the objective.

    Attributes:
        kind: ``drop``, ``ms`` or ``megabytes``.
        limit: largest accuracy drop in points, milliseconds of a call, or file size in 10^6 bytes.
        minimise: the objective under a limit on the drop. Under a limit on a cost the objective is the drop.
        slowdown: largest time of a call, as a multiple of the float file's.
    """

    kind: str
    limit: float
    minimise: Literal["ms", "bytes"] = "ms"
    slowdown: float = 1.02

    def __str__(self) -> str:
        return f"{self.limit:g} {_UNITS[self.kind]} and {self.slowdown:g} times the float file's time"
