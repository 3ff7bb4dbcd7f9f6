"""Quantize a checkpoint to INT8 and FP8, build engines, and report accuracy against latency:

python quant/ptq.py
python quant/ptq.py --checkpoint runs/train/bundle --data /data/imagenet --schemes int8 fp8 --targets sm87

This command runs the whole path, so it may import from every package, and nothing imports it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from deploy.trt.engine_options import EngineOptions, LibraryName
from illama.cli import run_command
from illama.options import BenchmarkOptions, Flat, SourceOptions

DEFAULT_SCHEMES = ("int8", "fp8")


@dataclass(frozen=True)
class PtqOptions:
    """Quantize a trained vision transformer, build engines, and report accuracy against latency.

    Attributes:
        source: the network and its images.
        benchmark: the benchmark.
        schemes: names of shipped schemes (python quant/list_schemes.py). Defaults to int8 and fp8, unless --scheme-file
            is given.
        scheme_file: paths to schemes in YAML, your own or those of python quant/search.py.
        out: folder of the bundles and the report; an earlier result there is replaced.
        library: tensorrt or tensorrt_rtx. Defaults to the first of the two that can build here.
        targets: compute capabilities of the engines, such as sm86 sm89. Defaults to this GPU for tensorrt,
            and to Ampere and newer for tensorrt_rtx.
    """

    source: Flat[SourceOptions] = field(default_factory=SourceOptions)
    benchmark: Flat[BenchmarkOptions] = field(default_factory=BenchmarkOptions)
    schemes: tuple[str, ...] | None = None
    scheme_file: tuple[Path, ...] = ()
    out: Path = Path("runs/ptq")
    library: LibraryName | None = None
    targets: tuple[str, ...] = ()

    @property
    def scheme_names(self) -> tuple[str, ...]:
        """The shipped schemes to quantize by."""
        if self.schemes is not None:
            return self.schemes
        return () if self.scheme_file else DEFAULT_SCHEMES


def main(options: PtqOptions) -> None:
    # Imported here, so that --help does not wait for PyTorch.
    from deploy.trt.build_bundle import build_engines
    from deploy.trt.library import find_library
    from eval.benchmark.benchmark import Execution, make_report, run_benchmark
    from eval.benchmark.evaluation_images import EvaluationImages
    from eval.benchmark.machine import pin_threads
    from eval.benchmark.targets import find_targets
    from eval.report.baseline import check_baseline, exit_on_regression, read_baseline
    from eval.report.write_report import is_result, write_and_print
    from illama.atomic_write import write_folder
    from illama.steps import Steps
    from quant.export.write_bundle import Origin, check_scheme, write_bundles
    from quant.inputs import open_inputs, schemes_from_options

    baseline, steps = read_baseline(options.benchmark), Steps()
    with write_folder(options.out, is_result) as folder:
        schemes = schemes_from_options(options.scheme_names, options.scheme_file)
        inputs = open_inputs(options.source)
        for scheme in schemes:
            check_scheme(inputs.model, scheme)
        library = find_library(options.library)
        if library:
            library.resolve_targets(options.targets)
        test, calibration = inputs.data.test(), options.source.calibration_images
        images = EvaluationImages(options.source.data, inputs.data, test, inputs.preprocessing, calibration)
        check_baseline(baseline, images)

        origin = Origin.of(inputs, options.benchmark.seed)
        bundles, networks = write_bundles(folder, inputs, schemes, origin, steps.show)
        not_run = build_engines(library, bundles, EngineOptions(options.targets), steps.show)
        with steps.show("evaluate and time"):
            pin_threads(options.benchmark.threads)
            result = run_benchmark(
                find_targets(bundles, networks), images, options.benchmark, Execution(folder, store=True)
            )
        report = make_report(
            result, images, options.benchmark, os.path.relpath(options.source.checkpoint), steps.seconds, not_run
        )
        write_and_print(report, test, folder, options.out)
    exit_on_regression(baseline, report)


if __name__ == "__main__":
    run_command(PtqOptions, main)
