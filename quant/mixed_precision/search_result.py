"""The result of a mixed-precision search, in a folder and on the terminal."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from illama.bundle import SCHEME, command_line, package_versions
from quant.export.write_bundle import Origin
from quant.mixed_precision.budget import Budget
from quant.mixed_precision.planner import Plan, Planner
from quant.mixed_precision.search_space import SearchSpace, assignment_scheme
from quant.schemes.scheme import FLOAT, resolve, write_scheme

RESULT = "search.json"


def write_search(folder: Path, planner: Planner, plans: list[Plan], best: Plan | None, times: str) -> dict[str, Any]:
    """Writes the best plan, or the last one if none satisfies the budget, beside its exported file.

    Args:
        times: where the times come from.

    Returns:
        The contents of search.json.
    """
    found = search_result(planner.budget, planner.space, plans, best)
    result = {**found, "metric": planner.inputs.metric, "times": times}
    (folder / RESULT).write_text(json.dumps(result, indent=1) + "\n")
    chosen, summary = (best or plans[-1]).chosen, f"found by {command_line()}"
    scheme, model = assignment_scheme(planner.space, chosen, planner.iterations, summary), planner.inputs.model
    write_scheme(scheme, folder / SCHEME)
    Origin.of(planner.inputs).manifest(model.config, resolve(scheme, model).quantization).write(folder)
    return result


def search_result(budget: Budget, space: SearchSpace, plans: list[Plan], best: Plan | None) -> dict[str, Any]:
    """Returns the contents of search.json; ``best`` is the plan that satisfies the budget, if any."""
    choices = {
        layer: [{**asdict(each), "specs": {name: str(spec) for name, spec in each.specs.items()}} for each in found]
        for layer, found in space.layers.items()
    }
    whole = {
        name: {**asdict(effect), "drop": effect.drop, "sum_of_layers_kl": kl}
        for name, (effect, kl) in space.whole.items()
    }
    return {
        "command": command_line(),
        "budget": asdict(budget),
        "met": best is not None,
        "assignment": {layer: space.layers[layer][i].scheme for layer, i in (best or plans[-1]).chosen.items()},
        "rounds": [{"predicted": plan.predicted, "measured": plan.measured} for plan in plans],
        "whole_networks": whole,
        "fixed": {"bytes": space.fixed_bytes, "ms": space.fixed_ms},
        "milliseconds_not_explained_by_layers": dict(space.fit_ms),
        "milliseconds_of_nodes_of_no_layer": dict(space.rest_ms),
        "choices": choices,
        "versions": package_versions(),
    }


def print_search(result: dict[str, Any]) -> None:
    """Prints the layers of each format, then the predicted and the measured figures of each round."""
    groups: dict[str, list[str]] = {}
    for layer, scheme in result["assignment"].items():
        groups.setdefault(scheme, []).append(layer)
    print()
    for scheme, layers in groups.items():
        print(f"{scheme:18} {len(layers):3} layers: {', '.join(layers)}")
    if groups.keys() == {FLOAT}:
        print("no format pays here: every layer stays in float")
    print(f"\n{'round':6} {'':10} {'drop, points':>16} {'ms':>9} {'of float':>9} {'MB':>9}")
    for number, entry in enumerate(result["rounds"], 1):
        for kind in ("predicted", "measured"):
            row = entry[kind]
            ms, of_float = ("-" if row[key] is None else f"{row[key]:.3f}" for key in ("ms", "slowdown"))
            drop = f"{row['drop']:+.3f}" + (f" (<{row['drop_at_most']:.2f})" if kind == "measured" else "")
            head = f"{number if kind == 'predicted' else '':<6} {kind:10}"
            print(f"{head} {drop:>16} {ms:>9} {of_float:>9} {row['megabytes']:9.3f}")
    print(f"(<: with 95% confidence; of float: time divided by the float file's; times: {result['times']})")
