"""Assignments under a budget: predict, solve, quantize, measure, and tighten until one satisfies the budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from illama.bundle import size_of
from illama.errors import UserError
from quant.export.onnx_export import export_onnx
from quant.inputs import Inputs
from quant.mixed_precision.budget import Budget
from quant.mixed_precision.knapsack import assign, total
from quant.mixed_precision.layer_effects import Effect, compare_outputs
from quant.mixed_precision.search_space import SearchSpace, assignment_scheme
from quant.quantizers.calibrate import calibrate
from quant.schemes.scheme import resolve

_TIGHTEN = 0.8  # factor on the drop allowed in the next prediction, after an assignment that exceeds the budget


@dataclass
class Plan:
    """One assignment with its predicted and measured figures.

    Attributes:
        chosen: layer -> index of its choice.
        kl: sum of the chosen formats' KL divergences, in nats.
        effect: of the whole quantized network.
    """

    chosen: Mapping[str, int]
    kl: float
    predicted: dict[str, float]
    effect: Effect | None = None
    measured: dict[str, float | None] = field(default_factory=dict)


class Planner:
    """Searches the assignments of one search space under one budget.

    The predicted drop is the sum of the layers' KL divergences, which add up for small, independent errors, times one
    slope in points per nat. The slope is fitted to whole networks that were measured: those quantized in one format,
    and every assignment that was checked.

    Args:
        images: batches for the measured drops. They must be other images than those of the search space, because the
            search would select an assignment that is better by chance on its own images.
        iterations: iterations of block reconstruction for each assignment.
        time_call: path to an exported file -> milliseconds of a call, and those divided by the float file's; if None,
            the prediction is used.
    """

    def __init__(
        self,
        inputs: Inputs,
        space: SearchSpace,
        images: DataLoader[Any],
        budget: Budget,
        iterations: int = 0,
        time_call: Callable[[Path], tuple[float, float]] | None = None,
    ) -> None:
        self.inputs, self.space, self.images, self.budget = inputs, space, images, budget
        self.iterations, self.time_call = iterations, time_call
        layers = space.layers
        self.kl = {layer: [choice.kl for choice in choices] for layer, choices in layers.items()}
        self.ms = {layer: [choice.ms for choice in choices] for layer, choices in layers.items()}
        self.bytes = {layer: [float(choice.bytes) for choice in choices] for layer, choices in layers.items()}
        self.known = [(kl, effect) for effect, kl in space.whole.values()]
        self.float_ms = space.fixed_ms + total(self.ms, dict.fromkeys(layers, 0))
        self._drop_slack, self._cost_limit, self._slowdown_limit = 1.0, budget.limit, budget.slowdown

    def slope(self) -> float:
        """Points of top-1 lost per nat of summed KL: least squares through 0, weighted by inverse variance.

        It is at least its own standard error. Otherwise drops that are negative by chance could give a slope of 0,
        and every assignment would be predicted to lose nothing.
        """
        weights = np.array([effect.drop_error**-2 for _, effect in self.known])
        kls, drops = np.array([kl for kl, _ in self.known]), np.array([effect.drop for _, effect in self.known])
        power = float((weights * kls**2).sum())
        return max(float((weights * kls * drops).sum()) / power, power**-0.5)

    def search(self, rounds: int, path: Path) -> tuple[list[Plan], Plan | None]:
        """Makes at most ``rounds`` assignments, and stops at the first one that satisfies the budget.

        Returns:
            All assignments, and the one that satisfies the budget or None. The file of the last one is at ``path``.

        Raises:
            UserError: no assignment is predicted to satisfy the budget.
        """
        plans: list[Plan] = []
        for _ in range(rounds):
            plan = self.solve()
            if plan is None:
                break
            plans.append(plan)
            self.check(plan, path)
            if self.holds(plan):
                return plans, plan
            self.tighten(plan)
        if not plans:
            raise UserError(f"no assignment of these formats can satisfy {self.budget}: {self._why_none()}")
        return plans, None

    def solve(self) -> Plan | None:
        """Returns the best assignment by the current predictions; None if there is none within the budget."""
        fast = self.ms, self._slowdown_limit * self.float_ms - self.space.fixed_ms
        if self.budget.kind == "drop":
            costs = self.ms if self.budget.minimise == "ms" else self.bytes
            chosen = assign(costs, (self.kl, self._drop_slack * self.budget.limit / self.slope()), fast)
        elif self.budget.kind == "ms":
            chosen = assign(self.kl, (self.ms, self._cost_limit - self.space.fixed_ms), fast)
        else:
            chosen = assign(self.kl, (self.bytes, self._cost_limit * 1e6 - self.space.fixed_bytes), fast)
        if chosen is None:
            return None
        kl, ms = total(self.kl, chosen), self.space.fixed_ms + total(self.ms, chosen)
        megabytes = (self.space.fixed_bytes + total(self.bytes, chosen)) / 1e6
        drop, slowdown = kl * self.slope(), ms / self.float_ms
        return Plan(chosen, kl, {"drop": drop, "kl": kl, "ms": ms, "slowdown": slowdown, "megabytes": megabytes})

    def check(self, plan: Plan, path: Path) -> None:
        """Quantizes the network by the assignment, exports it to ``path``, and measures the network and the file."""
        scheme = assignment_scheme(self.space, plan.chosen, self.iterations, "")
        inputs = self.inputs
        quantized = calibrate(inputs.model, resolve(scheme, inputs.model), inputs.calibration, inputs.device)
        plan.effect = compare_outputs(inputs.plain_model(), quantized, self.images, inputs.neighbors)
        export_onnx(quantized, path, "plain")
        ms, slowdown = self.time_call(path) if self.time_call else (None, None)
        plan.measured = {
            "drop": plan.effect.drop,
            "drop_at_most": plan.effect.drop_at_most,
            "kl": plan.effect.kl,
            "ms": ms,
            "slowdown": slowdown if any(plan.chosen.values()) else 1.0,  # the float network against itself
            "megabytes": size_of(path) / 1e6,
        }
        self.known.append((plan.kl, plan.effect))

    def holds(self, plan: Plan) -> bool:
        """Whether a plan satisfies the budget, a drop with 95% confidence.

        The prediction is used where nothing was measured.
        """
        return self._excess(plan, self.budget.kind, self.budget.limit) <= 0 and self._is_fast(plan)

    def tighten(self, plan: Plan) -> None:
        """Lowers the limits on the next prediction below the prediction of an assignment that exceeds them."""
        if not self._is_fast(plan):
            self._slowdown_limit = self._lowered(plan, "slowdown", self.budget.slowdown)
        kind, limit = self.budget.kind, self.budget.limit
        if self._excess(plan, kind, limit) <= 0:
            return
        if kind == "drop":
            self._drop_slack = _TIGHTEN * min(1.0, plan.kl * self.slope() / limit)
        else:
            self._cost_limit = self._lowered(plan, kind, limit)

    def _is_fast(self, plan: Plan) -> bool:
        return self._excess(plan, "slowdown", self.budget.slowdown) <= 0

    def _excess(self, plan: Plan, kind: str, limit: float) -> float:
        value = plan.measured["drop_at_most" if kind == "drop" else kind]
        return (plan.predicted[kind] if value is None else value) - limit

    def _lowered(self, plan: Plan, kind: str, limit: float) -> float:
        """Returns a new limit on a prediction: lower by at least a thousandth, so that another assignment is found."""
        return plan.predicted[kind] - max(self._excess(plan, kind, limit), limit / 1000)

    def _why_none(self) -> str:
        ms, size = (sum(min(values) for values in table.values()) for table in (self.ms, self.bytes))
        if self.budget.kind == "ms":
            return f"the fastest is predicted to take {self.space.fixed_ms + ms:.3f} ms"
        smallest = (self.space.fixed_bytes + size) / 1e6
        if self.budget.kind == "megabytes" and smallest <= self.budget.limit:
            return "those that are small enough are predicted to be slower: raise --max-slowdown"
        return f"the smallest is predicted to take {smallest:.3f} MB"
