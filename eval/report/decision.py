"""The decision of a report: made once, when the report is, and stored in ``report.json``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Rule = Literal["fastest", "smallest of the fastest", "most accurate", "smallest"]


@dataclass(frozen=True)
class RowKey:
    """Identifies a row in any report of the same bundles, on any machine.

    Attributes:
        scheme: name of the bundle.
        runtime_id: name of the runtime, as :func:`deploy.runtimes.open_engine.open_engine` takes it.
        file: path of the deployed file within the bundle, such as model.onnx or engines/NAME/model.engine.
    """

    scheme: str
    runtime_id: str
    file: str


@dataclass(frozen=True)
class Violation:
    """A constraint that a row violates.

    Attributes:
        constraint: which one.
        value: the row's p50 in ms, the upper end of its drop's interval in points, or its size in MB; None if the
            row was not timed.
        limit: the constraint, in the same unit.
        batch: batch size of the latency.
    """

    constraint: Literal["latency", "drop", "size"]
    value: float | None
    limit: float
    batch: int = 1

    @property
    def excess(self) -> float:
        """The excess over the limit as a share of the limit; for a drop, of at least 0.1 points."""
        if self.value is None:
            return math.inf
        return (self.value - self.limit) / (max(abs(self.limit), 0.1) if self.constraint == "drop" else self.limit)

    def __str__(self) -> str:
        if self.value is None:
            return f"was not timed at batch {self.batch}"
        if self.constraint == "latency":
            return f"takes {self.value:.4g} ms at batch {self.batch}, more than {self.limit:g}"
        if self.constraint == "drop":
            return f"may lose {self.value:.2f} points, more than {self.limit:g}"
        return f"takes {self.value:.4g} MB, more than {self.limit:g}"


@dataclass(frozen=True)
class Rejected:
    """A row that violates constraints."""

    key: RowKey
    violations: tuple[Violation, ...]


@dataclass(frozen=True)
class Choice:
    """The row to deploy.

    Attributes:
        row: None if no row satisfies the constraints, or if nothing was timed and there are no constraints.
        sentence: the row, the rule, and its figures compared with the reference.
        reason: the same without the figures, for a page that shows them below.
        rule: how it was chosen; None without a row.
        among: number of rows that the rule was applied to.
        rejected: the rows that violate constraints.
        not_worth_it: the fastest quantized row that satisfies the constraints, if no quantized row is faster than the
            float rows by :data:`eval.report.pareto.PAYS`; None otherwise.
    """

    row: RowKey | None
    sentence: str
    rule: Rule | None = None
    among: int = 0
    rejected: tuple[Rejected, ...] = ()
    not_worth_it: RowKey | None = None
    reason: str = ""


@dataclass(frozen=True)
class Decision:
    """What a report concludes from its rows.

    Attributes:
        reference: the row that drops and speeds are compared with; None if there is none.
        pareto: batch size -> the Pareto-optimal rows, in the order of the rows.
        choice: the row to deploy.
    """

    reference: RowKey | None
    pareto: Mapping[int, tuple[RowKey, ...]]
    choice: Choice
