"""The multiple-choice knapsack problem, solved exactly: one choice for each layer, with a limit on the total."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import block_diag

Table = Mapping[str, Sequence[float]]  # layer -> a value for each of its choices
_COST = 1e6  # the largest cost after scaling: HiGHS treats costs within 1e-6 of each other as equal


def assign(minimise: Table, limited: Table, limit: float) -> dict[str, int] | None:
    """Minimises the sum of ``minimise`` under the constraint that the sum of ``limited`` is at most ``limit``.

    Among equally good assignments, the one with the smallest sum of ``limited`` is returned.

    Args:
        minimise, limited: values of the same layers and choices, not negative.

    Returns:
        Layer -> index of its choice; None if no assignment satisfies the constraint.
    """
    if sum(min(values) for values in limited.values()) > limit:
        return None
    # A much larger limit would exceed the tolerances.
    limit = min(limit, sum(max(values) for values in limited.values()))
    best = _solve(minimise, limited, limit)
    return _solve(limited, minimise, total(minimise, best) * (1 + 1e-9))


def total(table: Table, chosen: Mapping[str, int]) -> float:
    """Returns the sum of the chosen values."""
    return float(sum(table[layer][index] for layer, index in chosen.items()))


def _solve(minimise: Table, limited: Table, limit: float) -> dict[str, int]:
    sizes = [len(values) for values in minimise.values()]
    objective, weights = (
        np.concatenate([np.asarray(values, float) for values in table.values()]) for table in (minimise, limited)
    )
    # One row for each layer, whose choices sum to one, and one for the limit, scaled to 1: tolerances are absolute.
    one_each = block_diag([np.ones((1, size)) for size in sizes], "csr")
    scale = limit or weights.max() or 1.0
    solution = milp(
        _COST * objective / (objective.max() or 1.0),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(weights[None, :] / scale, -np.inf, limit / scale),
        ],
        integrality=np.ones_like(objective),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0.0},
    )
    assert solution.x is not None, solution.message  # the caller has checked that there is one
    parts = np.split(solution.x, np.cumsum(sizes)[:-1])
    return {layer: int(part.argmax()) for layer, part in zip(minimise, parts, strict=True)}
