"""Mixed-precision search: finds a format for each layer under one budget:

python quant/search.py --max-drop 0.1
python quant/search.py --max-megabytes 1.5

Measures the effect and the cost of each layer in each format, and finds the best assignment exactly
(quant/mixed_precision/knapsack.py). The network is then quantized by it and measured. If it exceeds the budget, the
limit on the next prediction is tightened.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import tyro

from illama.cli import run_command
from illama.errors import UserError
from illama.options import Count, CountOrZero, Flat, Positive, SourceOptions, ThreadsOrAll
from quant.mixed_precision.budget import Budget


@dataclass(frozen=True)
class SearchOptions:
    """Find the best number format for each layer under one budget: --max-drop, --max-ms or --max-megabytes.

    Writes the scheme to OUT/scheme.yaml for `python quant/ptq.py`, its network to model.onnx, and search.json.

    Effects are measured on training images that calibration does not use, never on test images.

    Attributes:
        source: the network and its images.
        max_drop: largest accuracy drop in points of top-1; the objective is --minimise.
        max_ms: largest time of a call with one image, in milliseconds; the objective is the accuracy drop.
        max_megabytes: largest size of model.onnx, in 10^6 bytes; the objective is the accuracy drop.
        minimise: the objective under --max-drop.
        formats: schemes whose formats each layer can take, by name or YAML file; float is always added. The network is
            rotated as the first one says.
        layer_times: SCHEME=FILE of TensorRT layer profiles (trtexec --exportProfile), one for each format and for
            float; if not given, ONNX Runtime is timed on this machine's CPU.
        images: number of images on which the layers are measured. Defaults to 1,000, or to half of what calibration
            leaves if that is less.
        check_images: number of other images on which the drop of whole assignments is measured; defaults to 10,000, or
            to all that are left. --max-drop must hold with 95% confidence, which needs many images.
        reconstruction_iterations: number of iterations of block reconstruction for each assignment, as in a scheme.
        rounds: maximum number of assignments to check.
        threads: number of threads of ONNX Runtime, if it is timed; 0 for one per core.
        out: folder for scheme.yaml, model.onnx and search.json; an earlier result is replaced.
    """

    source: Flat[SourceOptions] = field(default_factory=SourceOptions)
    max_drop: Positive | None = None
    max_ms: Positive | None = None
    max_megabytes: Positive | None = None
    minimise: Literal["ms", "bytes"] = "ms"
    formats: tuple[str, ...] = ("int8", "w4a8", "int8-weight-only", "w4a16")
    layer_times: tuple[str, ...] = ()
    images: Count | None = None
    check_images: Count | None = None
    reconstruction_iterations: Annotated[CountOrZero, tyro.conf.arg(aliases=["--learned"])] = 0
    rounds: Count = 6
    threads: ThreadsOrAll = 0
    out: Path = Path("runs/search")

    def budget(self) -> Budget:
        """Returns the one budget; raises UserError for none or several."""
        given = {"drop": self.max_drop, "ms": self.max_ms, "megabytes": self.max_megabytes}
        values = [(kind, value) for kind, value in given.items() if value is not None]
        if len(values) != 1:
            raise UserError("give one of --max-drop, --max-ms and --max-megabytes")
        if self.layer_times and values[0][0] == "megabytes":
            raise UserError("--layer-times has no effect under --max-megabytes: leave it out")
        return Budget(values[0][0], values[0][1], self.minimise)

    def profiles(self) -> dict[str, Path]:
        """Returns scheme -> path to its TensorRT profile."""
        pairs = [text.partition("=") for text in self.layer_times]
        if any(not separator for _, separator, _ in pairs):
            raise UserError("--layer-times takes SCHEME=FILE, such as int8=profile.json")
        return {name: Path(file) for name, _, file in pairs}


def main(options: SearchOptions) -> None:
    # Imported here, so that --help does not wait for PyTorch.
    from illama.atomic_write import write_folder
    from illama.bundle import CPU_ONNX, SCHEME
    from illama.inference import chance_note
    from quant.inputs import open_inputs
    from quant.mixed_precision.image_selection import image_count, search_batches
    from quant.mixed_precision.planner import Planner
    from quant.mixed_precision.search_result import RESULT, print_search, write_search
    from quant.mixed_precision.search_space import SearchSpaceBuilder, format_schemes, time_call

    budget, profiles = options.budget(), options.profiles()
    with write_folder(options.out, lambda folder: (folder / RESULT).exists()) as folder:
        schemes = format_schemes(options.formats)
        inputs = open_inputs(options.source, calibration_share=2)
        count = image_count(inputs, options.images)
        images, others = search_batches(inputs, budget, count, options.check_images)
        with tempfile.TemporaryDirectory() as scratch:
            space = SearchSpaceBuilder(inputs, schemes, images, options.threads).build(Path(scratch), profiles)
        timed = None if profiles else partial(time_call, inputs, options.threads)
        planner = Planner(inputs, space, others, budget, options.reconstruction_iterations, timed)
        plans, best = planner.search(options.rounds, folder / CPU_ONNX)
        result = write_search(folder, planner, plans, best)
    print_search(result)
    effect, _ = next(iter(space.whole.values()))
    note = chance_note("the float network", effect.right / effect.images * 100, len(inputs.data.classes))
    if note and not inputs.neighbors:
        print(f"\n{note}")
    if best is None:
        raise UserError(
            f"none of {len(plans)} assignments satisfies {budget}; the last one is in {options.out}: "
            "raise the budget, or give other --formats"
        )
    print(f"\nmeasured within {budget}; {options.out / SCHEME} contains the scheme, {CPU_ONNX} the network")


if __name__ == "__main__":
    run_command(SearchOptions, main)
