"""Mixed-precision search: finds a format for each layer under one budget:

python quant/search.py --max-drop 0.1
python quant/search.py --max-megabytes 1.5

Measures the effect of each layer in each format, and what the Q/DQ of each region (all qkv, all fc1 with fc3, ...) save
on the file that is delivered, and finds the best assignment exactly (quant/mixed_precision/knapsack.py). The network is
then quantized by it and measured. If it exceeds the budget, or is slower than the float file, the limit on the next
prediction is tightened.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from illama.cli import run_command
from deploy.runtimes.names import RuntimeName
from illama.errors import UserError
from illama.options import BatchSize, Count, CountOrZero, Flat, Positive, SourceOptions, ThreadsOrAll
from quant.mixed_precision.budget import Budget

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from illama.graph.layer_times import GraphTimes
    from illama.models.attention import MaskedNetwork
    from quant.inputs import Inputs
    from quant.mixed_precision.search_space import LayerTimer


@dataclass(frozen=True)
class SearchOptions:
    """Find the best number format for each layer under one budget: --max-drop, --max-ms or --max-megabytes.

    Writes the scheme to OUT/scheme.yaml for `python quant/ptq.py`, its network to model.onnx, and search.json.

    Effects are measured on training images that calibration does not use, never on test images.

    Attributes:
        source: the network and its images.
        max_drop: largest accuracy drop in points of top-1; the objective is --minimise.
        max_ms: largest time of a call, in milliseconds; the objective is the accuracy drop.
        max_megabytes: largest size of model.onnx, in 10^6 bytes; the objective is the accuracy drop.
        minimise: the objective under --max-drop.
        max_slowdown: largest time of a call, as a multiple of the float file's in the runtime that is the fastest for
            it. The default leaves room for noise only.
        formats: schemes whose formats each layer can take, by name or YAML file; float is always added. The network is
            rotated as the first one says.
        runtime: the runtime in which files are timed; defaults to the fastest one here.
        batch: number of images in a timed call.
        layer_times: SCHEME=FILE of TensorRT layer profiles (trtexec --exportProfile), one for each format and for
            float; nothing is timed then.
        predict_for: device of python eval/roofline.py, such as orin-nano, for which times are predicted by the roofline
            model; nothing is timed then.
        images: number of images on which the layers are measured. Defaults to 1,000, or to half of what calibration
            leaves if that is less.
        check_images: number of other images on which the drop of whole assignments is measured; defaults to 10,000, or
            to all that are left. --max-drop must hold with 95% confidence, which needs many images.
        reconstruction_iterations: number of iterations of block reconstruction for each assignment, as in a scheme.
        rounds: maximum number of assignments to check.
        threads: number of threads on a CPU, if files are timed; 0 for one per core.
        out: folder for scheme.yaml, model.onnx and search.json; an earlier result is replaced.
    """

    source: Flat[SourceOptions] = field(default_factory=SourceOptions)
    max_drop: Positive | None = None
    max_ms: Positive | None = None
    max_megabytes: Positive | None = None
    minimise: Literal["ms", "bytes"] = "ms"
    formats: tuple[str, ...] = ("int8", "w4a8", "int8-weight-only", "w4a16")
    max_slowdown: Positive = 1.02
    runtime: RuntimeName | None = None
    batch: BatchSize = 1
    layer_times: tuple[str, ...] = ()
    predict_for: str | None = None
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
        return Budget(values[0][0], values[0][1], self.minimise, self.max_slowdown)

    def profiles(self) -> dict[str, Path]:
        """Returns scheme -> path to its TensorRT profile; raises UserError if there is another source of times too."""
        sources = {"--layer-times": self.layer_times, "--predict-for": self.predict_for, "--runtime": self.runtime}
        if len(given := [name for name, value in sources.items() if value]) > 1:
            raise UserError(f"{' and '.join(given)} exclude each other: give one of them")
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
    from quant.mixed_precision.search_space import SearchSpaceBuilder, format_schemes

    budget, _ = options.budget(), options.profiles()
    with write_folder(options.out, lambda folder: (folder / RESULT).exists()) as folder:
        schemes = format_schemes(options.formats)
        inputs = open_inputs(options.source, calibration_share=2)
        count = image_count(inputs, options.images)
        images, others = search_batches(inputs, budget, count, options.check_images)
        with tempfile.TemporaryDirectory() as scratch:
            builder = SearchSpaceBuilder(inputs, schemes, images)
            times = _times(options, inputs, builder.layers, Path(scratch))
            space = builder.build(Path(scratch), times.layers)
            planner = Planner(inputs, space, others, budget, options.reconstruction_iterations, times.call)
            plans, best = planner.search(options.rounds, folder / CPU_ONNX)
        result = write_search(folder, planner, plans, best, times.describe())
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
    print(f"\nwithin {budget}; {options.out / SCHEME} contains the scheme, {CPU_ONNX} the network")


@dataclass(frozen=True)
class _Times:
    """Where times come from: of a scheme's layers, and of an assignment's file, if that can be timed."""

    layers: LayerTimer
    call: Callable[[Path], tuple[float, float]] | None
    describe: Callable[[], str]


def _times(options: SearchOptions, inputs: Inputs, layers: Mapping[str, Sequence[str]], folder: Path) -> _Times:
    if options.layer_times:
        return _Times(_profile_timer(options, layers), None, lambda: "TensorRT layer profiles")
    if options.predict_for:
        described = f"PREDICTED by the roofline model for {options.predict_for}, batch {options.batch}"
        return _Times(_prediction_timer(options.predict_for, options.batch, layers, folder), None, lambda: described)

    from eval.measure.file_times import RuntimeTimer
    from illama.hardware import cpu_name
    from quant.mixed_precision.region_times import RegionTimes, find_regions
    from quant.schemes.scheme import FLOAT

    images = inputs.calibration[0][: options.batch]
    timer = RuntimeTimer(images.numpy(), FLOAT, options.batch, options.runtime, options.threads)
    regions = RegionTimes(timer, layers, find_regions(inputs.model, layers, images[:1]), folder)
    return _Times(regions, regions.compare, lambda: f"{timer.runtime} on {cpu_name()}, batch {options.batch}")


def _profile_timer(options: SearchOptions, layers: Mapping[str, Sequence[str]]) -> LayerTimer:
    from illama.graph.layer_times import read_layer_times

    profiles = options.profiles()

    def read(name: str, quantized: MaskedNetwork, path: Path) -> GraphTimes:
        if name not in profiles:
            raise UserError(f"--layer-times has no {name}: give a profile for each format and for float")
        return read_layer_times(profiles[name], layers)

    return read


def _prediction_timer(name: str, batch: int, layers: Mapping[str, Sequence[str]], folder: Path) -> LayerTimer:
    from torch import float16

    from eval.cost_model.devices import find_device
    from eval.cost_model.roofline_model import predict_layers
    from illama.bundle import FUSED_ONNX
    from quant.export.onnx_export import export_onnx

    device = find_device(name)

    def predict(name: str, quantized: MaskedNetwork, path: Path) -> GraphTimes:
        export_onnx(quantized, folder / FUSED_ONNX, "fused", float16)
        return predict_layers(folder / FUSED_ONNX, device, layers, batch)

    return predict


if __name__ == "__main__":
    run_command(SearchOptions, main)
