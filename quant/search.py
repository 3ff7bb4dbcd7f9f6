"""A precision for each layer, within one budget:

python quant/search.py --max-drop 0.1
python quant/search.py --max-megabytes 1.5

What each layer loses and costs in each format is measured; the best assignment under those figures is found exactly
(quant/mixed_precision/knapsack.py); it is then quantized and measured, and if it breaks the budget, it tightens.
"""

from __future__ import annotations

import json
import math
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from torch.utils.data import DataLoader

from illama.atomic_write import write_folder
from illama.bundle import CPU_ONNX, SCHEME, command_line, package_versions
from illama.cli import run_command
from illama.errors import UserError
from illama.inference import chance_note
from quant.export.write_bundle import Origin
from quant.inputs import Inputs, open_inputs
from quant.mixed_precision.search_space import Choices, Study, offered_schemes, scheme_of
from quant.mixed_precision.layer_effects import Effect, selection_images, split_selection, uncalibrated_images
from quant.mixed_precision.planner import Budget, Plan, Planner
from quant.options import InputOptions
from quant.schemes.scheme import write_scheme

RESULT = "search.json"
_CHECK_IMAGES = 10_000
Batches = DataLoader[tuple[Tensor, int]]


@dataclass(frozen=True)
class SearchOptions(InputOptions):
    """Find which layer to keep in which number format, for one budget: give one of the three.

    Losses are measured on training images that calibration does not see, and never on test images.

    Attributes:
        max_drop: points of top-1 that may be lost; the cheapest assignment is sought.
        max_ms: milliseconds of one call with one image; the assignment that loses least is sought.
        max_megabytes: size of model.onnx, in 10^6 bytes; the assignment that loses least is sought.
        minimise: what is cheapest, for --max-drop.
        formats: schemes to choose from for each layer, by name or YAML file; float is always among them.
        layer_times: SCHEME=FILE of TensorRT layer profiles (trtexec --exportProfile), one for each format and for
            float; ONNX Runtime on this machine's CPU is timed if not given.
        images: how many images the layers' losses are measured over.
        check_images: how many other images a whole assignment's drop is measured over, 10,000 or what there is if not
            given. --max-drop is kept to with 95% confidence, which a few images never give.
        learned: steps a block in which the found assignment's rounding is learned, as in a scheme.
        rounds: how many assignments to check at most.
        threads: of ONNX Runtime, when it is timed; 0 for one a core.
        out: a folder for scheme.yaml, model.onnx and search.json; an earlier result there is replaced.
    """

    max_drop: float | None = None
    max_ms: float | None = None
    max_megabytes: float | None = None
    minimise: Literal["ms", "bytes"] = "ms"
    formats: tuple[str, ...] = ("int8", "w4a8", "int8-weight-only", "w4a16")
    layer_times: tuple[str, ...] = ()
    images: int = 1000
    check_images: int | None = None
    learned: int = 0
    rounds: int = 6
    threads: int = 0
    out: Path = Path("runs/search")

    def budget(self) -> Budget:
        """The one budget; UserError for none, several, or one that is not positive."""
        given = {"drop": self.max_drop, "ms": self.max_ms, "megabytes": self.max_megabytes}
        values = [(kind, value) for kind, value in given.items() if value is not None]
        if len(values) != 1 or values[0][1] <= 0 or self.rounds < 1 or self.learned < 0:
            raise UserError("give one of --max-drop, --max-ms and --max-megabytes, above 0; --rounds must be 1 or more")
        if self.layer_times and values[0][0] != "drop" and values[0][0] != "ms":
            raise UserError("--layer-times decides nothing under --max-megabytes: leave it out")
        return Budget(values[0][0], values[0][1], self.minimise)

    def profiles(self) -> dict[str, Path]:
        """Scheme -> TensorRT profile."""
        pairs = [text.partition("=") for text in self.layer_times]
        if any(not separator for _, separator, _ in pairs):
            raise UserError("--layer-times takes SCHEME=FILE, such as int8=profile.json")
        return {name: Path(file) for name, _, file in pairs}


def images_of(options: SearchOptions, inputs: Inputs, budget: Budget) -> tuple[Batches, Batches]:
    """The images that layers are weighed by and those that whole assignments are checked by.

    Raises:
        UserError: if there are not as many, or too few to tell the drop that was asked for.
    """
    left = len(uncalibrated_images(inputs.data, options.calibration_images)) - options.images
    checked = max(1, min(left, _CHECK_IMAGES) if options.check_images is None else options.check_images)
    pool = selection_images(inputs.data, options.calibration_images, options.images + checked)
    nothing_lost = Effect(math.inf, 0.0, 0, 0, checked)
    if budget.kind == "drop" and nothing_lost.drop_at_most > budget.limit:
        raise UserError(
            f"even if they lose nothing, {checked} images leave {nothing_lost.drop_at_most:.2f} points in "
            f"doubt: for {budget} raise --check-images or --max-drop, or lower --images"
        )
    measured, others = split_selection(pool, options.images)
    return inputs.batches(measured), inputs.batches(others)


def result_of(options: SearchOptions, offered: Choices, plans: list[Plan], best: Plan | None) -> dict[str, Any]:
    """The contents of search.json."""
    choices = {
        layer: [
            {**asdict(choice), "specs": {name: str(spec) for name, spec in choice.specs.items()}} for choice in found
        ]
        for layer, found in offered.layers.items()
    }
    whole = {
        name: {**asdict(effect), "drop": effect.drop, "sum_of_layers_kl": kl}
        for name, (effect, kl) in offered.whole.items()
    }
    return {
        "command": command_line(),
        "budget": asdict(options.budget()),
        "met": best is not None,
        "assignment": {layer: offered.layers[layer][i].scheme for layer, i in (best or plans[-1]).chosen.items()},
        "rounds": [plan.record() for plan in plans],
        "whole_networks": whole,
        "fixed": {"bytes": offered.fixed_bytes, "ms": offered.fixed_ms},
        "milliseconds_not_explained_by_layers": dict(offered.fit_ms),
        "milliseconds_of_nodes_of_no_layer": dict(offered.rest_ms),
        "choices": choices,
        "versions": package_versions(),
    }


def print_result(result: dict[str, Any]) -> None:
    """The assignment by layer, then predicted and measured for each round."""
    groups: dict[str, list[str]] = {}
    for layer, scheme in result["assignment"].items():
        groups.setdefault(scheme, []).append(layer)
    print()
    for scheme, layers in groups.items():
        print(f"{scheme:18} {len(layers):3} layers: {', '.join(layers)}")
    print(f"\n{'round':6} {'':10} {'drop, points':>16} {'ms':>9} {'MB':>9}")
    for number, entry in enumerate(result["rounds"], 1):
        for kind in ("predicted", "measured"):
            row = entry[kind]
            ms = "-" if row["ms"] is None else f"{row['ms']:.3f}"
            drop = f"{row['drop']:+.3f}" + (f" (<{row['drop_at_most']:.2f})" if kind == "measured" else "")
            print(f"{number if kind == 'predicted' else '':<6} {kind:10} {drop:>16} {ms:>9} {row['megabytes']:9.3f}")
    print("(<: with 95% confidence)")


def main(options: SearchOptions) -> None:
    budget, profiles = options.budget(), options.profiles()
    with write_folder(options.out, lambda folder: (folder / RESULT).exists()) as folder:
        schemes = offered_schemes(options.formats)
        inputs = open_inputs(options)
        images, others = images_of(options, inputs, budget)
        with tempfile.TemporaryDirectory() as scratch:
            choices = Study(inputs, schemes, images, options.threads).run(Path(scratch), profiles)
        planner = Planner(inputs, choices, others, budget, not profiles, options.learned, options.threads)
        plans, best = planner.search(options.rounds, folder / CPU_ONNX)
        result = result_of(options, choices, plans, best)
        (folder / RESULT).write_text(json.dumps(result, indent=1) + "\n")
        chosen = (best or plans[-1]).chosen
        write_scheme(scheme_of(choices, chosen, options.learned, f"found by {command_line()}"), folder / SCHEME)
        Origin.of(inputs).manifest(inputs.model.config.to_dict(), {}).write(folder)
    print_result(result)
    effect, _ = next(iter(choices.whole.values()))
    if note := chance_note("the float network", effect.right / effect.images * 100, len(inputs.data.classes)):
        print(f"\n{note}")
    if best is None:
        raise UserError(
            f"no assignment of {len(plans)} tried kept to {budget}; the last of them is in {options.out}: "
            "raise the budget, or give other --formats"
        )
    print(f"\nmeasured within {budget}; {options.out / SCHEME} holds the scheme, {CPU_ONNX} the network")


if __name__ == "__main__":
    run_command(SearchOptions, main)
