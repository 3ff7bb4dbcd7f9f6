"""One choice a layer at the least total, within a limit: a multiple-choice knapsack, solved exactly."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

Table = Mapping[str, Sequence[float]]  # layer -> a value for each of its choices
_COST = 1e6  # what the largest cost is scaled to: HiGHS takes costs within 1e-6 of each other for equal


def assign(minimise: Table, limited: Table, limit: float) -> dict[str, int] | None:
    """The choice of each layer that makes the sum of ``minimise`` least and that of ``limited`` no more than a limit.

    Among equally good ones it is that with the least of ``limited``.

    Args:
        minimise, limited: the same layers and choices; not negative.

    Returns:
        layer -> index of its choice; None if nothing keeps within the limit.
    """
    if sum(min(values) for values in limited.values()) > limit:
        return None
    limit = min(limit, sum(max(values) for values in limited.values()))  # a limit far off would drown the tolerances
    best = _solve(minimise, limited, limit)
    return _solve(limited, minimise, total(minimise, best) * (1 + 1e-9))


def total(table: Table, chosen: Mapping[str, int]) -> float:
    """The sum over the layers of what was chosen."""
    return float(sum(table[layer][index] for layer, index in chosen.items()))


def _solve(minimise: Table, limited: Table, limit: float) -> dict[str, int]:
    sizes = [len(values) for values in minimise.values()]
    objective, weights = (
        np.concatenate([np.asarray(values, float) for values in table.values()]) for table in (minimise, limited)
    )
    # One row a layer whose choices add up to one, and one for the limit; scaled to 1, as tolerances are absolute.
    rows = np.repeat(np.arange(len(sizes)), sizes)
    one_each = csr_array((np.ones(len(rows)), (rows, np.arange(len(rows)))))
    scale = limit or weights.max() or 1.0
    solution = milp(
        _COST * objective / (objective.max() or 1.0),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(weights[None, :] / scale, -np.inf, limit / scale),
        ],
        integrality=np.ones(len(rows)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0.0},
    )
    assert solution.x is not None, solution.message  # the caller has made sure that there is one
    starts = np.concatenate([[0], np.cumsum(sizes)])
    chosen = [int(solution.x[start:end].argmax()) for start, end in itertools.pairwise(starts)]
    return dict(zip(minimise, chosen, strict=True))
