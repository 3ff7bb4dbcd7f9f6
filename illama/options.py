"""Options that commands of several packages share. Imports nothing slow, so that ``--help`` answers at once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from illama.errors import UserError

Exif = Literal["apply", "ignore"]
ClassOrder = Literal["words", "natural"]


@dataclass(frozen=True)
class Constraints:
    """What the engine that is looked for must keep to; None for no limit.

    Attributes:
        latency_ms: p50 of one call at ``batch`` images.
        drop: points of top-1 lost against the reference, at the upper end of their 95% interval.
        megabytes: of the file that is deployed, 10^6 bytes.
    """

    batch: int = 1
    latency_ms: float | None = None
    drop: float | None = None
    megabytes: float | None = None


def check_constraints(constraints: Constraints) -> None:
    """UserError for a limit that nothing could keep to."""
    for name, value in {
        "latency": constraints.latency_ms,
        "size": constraints.megabytes,
        "the batch size": constraints.batch,
    }.items():
        if value is not None and not value > 0:
            raise UserError(f"the limit on {name} must be more than zero, not {value}")
    if constraints.drop is not None and math.isnan(constraints.drop):
        raise UserError("the limit on the points of top-1 lost must be a number")


@dataclass(frozen=True)
class BenchmarkOptions:
    """How engines are timed, and what is asked of them.

    Attributes:
        batches: images a call; limits are on the first.
        seconds: about how long the rounds at one batch size may take.
        threads: of the CPU; one for each core if not given.
        max_latency_ms: of the median of one call.
        max_drop: points of top-1 that may be lost, at the upper end of their 95% interval.
        max_megabytes: of the file that is deployed, 10^6 bytes.
        also: folders with results of other commands, such as runs/robustness, to show in the same report.
        fail_on_regression: an earlier report.json; exit with 1 if something became worse than in it.
        seed: of intervals and of the order in which engines are timed.
        out: where the report goes.
    """

    batches: tuple[int, ...] = (1, 8, 64)
    seconds: float = 10.0
    threads: int | None = None
    max_latency_ms: float | None = None
    max_drop: float | None = None
    max_megabytes: float | None = None
    also: tuple[Path, ...] = ()
    fail_on_regression: Path | None = None
    seed: int = 0
    out: Path = Path("runs/tradeoff")

    def __post_init__(self) -> None:
        if not self.batches or min(self.batches) < 1 or len(set(self.batches)) < len(self.batches):
            raise UserError("--batches takes one batch size or more, each above 0 and given once")
        if not 0 < self.seconds < math.inf or self.seed < 0:
            raise UserError("--seconds must be a number above 0, and --seed 0 or more")
        check_constraints(self.constraints)

    @property
    def constraints(self) -> Constraints:
        return Constraints(self.batches[0], self.max_latency_ms, self.max_drop, self.max_megabytes)
