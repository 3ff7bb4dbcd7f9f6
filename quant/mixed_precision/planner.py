"""Assignments under a budget: predicted from the layers' figures, solved, made, measured, tightened until they hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch.utils.data import DataLoader

from illama.errors import UserError
from illama.graph.layer_times import time_graphs
from quant.export.onnx_export import export_onnx
from quant.inputs import Inputs
from quant.mixed_precision.search_space import Choices, one_image, scheme_of
from quant.mixed_precision.knapsack import assign, total
from quant.mixed_precision.layer_effects import Effect, compare_logits
from quant.quantizers.calibrate import calibrate

_TIGHTEN = 0.8  # of what broke the budget; the next assignment may predict no more
_UNITS = {"drop": "points of top-1", "ms": "ms", "megabytes": "MB"}


@dataclass(frozen=True)
class Budget:
    """What must be kept to, and what is made least.

    Attributes:
        kind, limit: at most ``limit`` points of top-1 lost, milliseconds of a call, or 10^6 bytes of the file.
        minimise: what is made least under a limit on the drop; under one on a cost it is the drop.
    """

    kind: str
    limit: float
    minimise: Literal["ms", "bytes"] = "ms"

    def __str__(self) -> str:
        return f"{self.limit:g} {_UNITS[self.kind]}"


@dataclass
class Plan:
    """One assignment: layer -> index of its choice, and what it is predicted and measured to be."""

    chosen: Mapping[str, int]
    kl: float
    predicted: dict[str, float]
    effect: Effect | None = None
    measured: dict[str, float | None] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {"predicted": self.predicted, "measured": self.measured}


class Planner:
    """Searches assignments of one set of choices under one budget.

    The predicted drop is the sum of the layers' KLs times one slope. KLs of small, independent disturbances add up;
    the slope, points per nat, is fitted to whole networks that were measured: each format throughout, and every
    assignment that was checked.

    Args:
        images: what drops are measured over: others than those that the choices were weighed by, since a search
            among many takes what chance favours.
        timed: whether a call's time is measured here; otherwise the profiles that were given say it.
        learned: steps a block of learned rounding in what is made.
        threads: of ONNX Runtime, when it is timed; 0 for one a core.
    """

    def __init__(
        self,
        inputs: Inputs,
        choices: Choices,
        images: DataLoader[Any],
        budget: Budget,
        timed: bool = True,
        learned: int = 0,
        threads: int = 0,
    ) -> None:
        self.inputs, self.choices, self.images, self.budget = inputs, choices, images, budget
        self.timed, self.learned, self.threads = timed, learned, threads
        layers = choices.layers
        self.kl = {layer: [choice.kl for choice in choices] for layer, choices in layers.items()}
        self.ms = {layer: [choice.ms for choice in choices] for layer, choices in layers.items()}
        self.bytes = {layer: [float(choice.bytes) for choice in choices] for layer, choices in layers.items()}
        self.known = [(kl, effect) for effect, kl in choices.whole.values()]
        self._drop_slack, self._cost_limit = 1.0, budget.limit

    def slope(self) -> float:
        """Points of top-1 lost per nat of summed KL: least squares through 0, each network weighed by its certainty.

        At least its own standard error: chance can make small drops negative, and a slope of 0 every assignment free.
        """
        weights = np.array([effect.drop_error**-2 for _, effect in self.known])
        kls, drops = np.array([kl for kl, _ in self.known]), np.array([effect.drop for _, effect in self.known])
        power = float((weights * kls**2).sum())
        return max(float((weights * kls * drops).sum()) / power, power**-0.5)

    def search(self, rounds: int, path: Path) -> tuple[list[Plan], Plan | None]:
        """All assignments made, and the one that keeps to the budget, if any; the last one's file is at ``path``.

        Raises:
            UserError: if no assignment is even predicted to.
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
            raise UserError(f"no assignment of these formats can keep to {self.budget}: {self._least()}")
        return plans, None

    def solve(self) -> Plan | None:
        """The best assignment by the figures known so far; None if there is none."""
        if self.budget.kind == "drop":
            costs = self.ms if self.budget.minimise == "ms" else self.bytes
            chosen = assign(costs, self.kl, self._drop_slack * self.budget.limit / self.slope())
        elif self.budget.kind == "ms":
            chosen = assign(self.kl, self.ms, self._cost_limit - self.choices.fixed_ms)
        else:
            chosen = assign(self.kl, self.bytes, self._cost_limit * 1e6 - self.choices.fixed_bytes)
        if chosen is None:
            return None
        kl, ms = total(self.kl, chosen), self.choices.fixed_ms + total(self.ms, chosen)
        megabytes = (self.choices.fixed_bytes + total(self.bytes, chosen)) / 1e6
        return Plan(chosen, kl, {"drop": kl * self.slope(), "kl": kl, "ms": ms, "megabytes": megabytes})

    def check(self, plan: Plan, path: Path) -> None:
        """Quantize for real, export to ``path``, and measure."""
        scheme = scheme_of(self.choices, plan.chosen, self.learned, "")
        quantized = calibrate(self.inputs.model, scheme, self.inputs.calibration)
        plan.effect = compare_logits(self.inputs.plain_model(), quantized, self.images)
        export_onnx(quantized, path, "plain")
        milliseconds: float | None = None
        if self.timed:
            milliseconds = time_graphs({"plan": path}, one_image(self.inputs), {}, self.threads)["plan"].call
        plan.measured = {
            "drop": plan.effect.drop,
            "drop_at_most": plan.effect.drop_at_most,
            "kl": plan.effect.kl,
            "ms": milliseconds,
            "megabytes": path.stat().st_size / 1e6,
        }
        self.known.append((plan.kl, plan.effect))

    def holds(self, plan: Plan) -> bool:
        """Whether what was measured keeps to the budget, a drop with 95% confidence; else what was predicted counts."""
        value = plan.measured["drop_at_most" if self.budget.kind == "drop" else self.budget.kind]
        return (plan.predicted[self.budget.kind] if value is None else value) <= self.budget.limit

    def tighten(self, plan: Plan) -> None:
        """Ask for less than the assignment that broke the budget was predicted to take."""
        if self.budget.kind == "drop":
            self._drop_slack = _TIGHTEN * min(1.0, plan.kl * self.slope() / self.budget.limit)
        else:
            limit, value = self.budget.limit, plan.measured[self.budget.kind]
            over = 0.0 if value is None else value - limit
            # At least a thousandth less, so that the same assignment cannot come again.
            self._cost_limit = plan.predicted[self.budget.kind] - max(over, limit / 1000)

    def _least(self) -> str:
        if self.budget.kind == "ms":
            return f"the fastest is predicted to take {self.choices.fixed_ms + _least(self.ms):.3f} ms"
        return f"the smallest is predicted to take {(self.choices.fixed_bytes + _least(self.bytes)) / 1e6:.3f} MB"


def _least(table: Mapping[str, list[float]]) -> float:
    return sum(min(values) for values in table.values())
