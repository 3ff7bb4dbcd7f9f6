"""The multiple-choice knapsack problem, solved exactly: one choice for each layer, with limits on totals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import block_diag

Table = Mapping[str, Sequence[float]]  # layer -> a value for each of its choices
_COST = 1e6  # the largest cost after scaling: HiGHS treats costs within 1e-6 of each other as equal


def assign(minimise: Table, *limits: tuple[Table, float]) -> dict[str, int] | None:
    """Minimises the sum of ``minimise`` under the constraint that each limited sum is at most its limit.

    Among equally good assignments, one with the smallest sum of the first limited table is returned.

    Args:
        minimise: values of each layer's choices, not negative.
        limits: tables of the same layers and choices, not negative, with the limits on their sums.

    Returns:
        Layer -> index of its choice; None if no assignment satisfies the constraints.
    """
    if any(sum(min(values) for values in table.values()) > limit for table, limit in limits):
        return None
    # A much larger limit would exceed the tolerances.
    limits = tuple((each, min(limit, sum(max(values) for values in each.values()))) for each, limit in limits)
    best = _solve(minimise, limits)
    if best is None:
        return None
    return _solve(limits[0][0], (*limits[1:], (minimise, total(minimise, best) * (1 + 1e-9)))) or best


def _row(table: Table) -> np.ndarray:
    return np.concatenate([np.asarray(values, float) for values in table.values()])


def total(table: Table, chosen: Mapping[str, int]) -> float:
    """Returns the sum of the chosen values."""
    return float(sum(table[layer][index] for layer, index in chosen.items()))


def _solve(minimise: Table, limits: Sequence[tuple[Table, float]]) -> dict[str, int] | None:
    sizes = [len(values) for values in minimise.values()]
    objective = _row(minimise)
    # One row for each layer, whose choices sum to one, and one for each limit, scaled to 1: tolerances are absolute.
    constraints = [LinearConstraint(block_diag([np.ones((1, size)) for size in sizes], "csr"), 1, 1)]
    for table, limit in limits:
        scale = limit or _row(table).max() or 1.0
        constraints.append(LinearConstraint(_row(table)[None, :] / scale, -np.inf, limit / scale))
    solution = milp(
        _COST * objective / (objective.max() or 1.0),
        constraints=constraints,
        integrality=np.ones_like(objective),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0.0},
    )
    if solution.x is None:  # the limits exclude each other
        return None
    parts = np.split(solution.x, np.cumsum(sizes)[:-1])
    return {layer: int(part.argmax()) for layer, part in zip(minimise, parts, strict=True)}
