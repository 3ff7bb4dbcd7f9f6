"""Quantize a checkpoint to INT8 and FP8, build engines, and report accuracy against latency:

python quant/ptq.py
python quant/ptq.py --checkpoint runs/train/bundle --data /data/imagenet --schemes int8 fp8 --targets sm87
python quant/ptq.py --checkpoint runs/train/bundle --data /data/imagenet --for jetpack-6

This command runs the whole path, so it may import from every package, and nothing imports it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from illama.cli import run_command
from deploy.opset_options import OpsetOptions
from deploy.trt.engine_options import BatchRange, EngineOptions, LibraryName
from illama.bundle import FUSED_ONNX, GoldenImages, as_run
from illama.errors import UserError
from illama.options import BenchmarkOptions, Count, Flat, SourceOptions, Workers
from quant.schemes.shipped import SchemeName

if TYPE_CHECKING:
    from eval.measure.evaluation_images import EvaluationImages
    from eval.measure.targets import BenchmarkTarget
    from eval.report.schema import Report
    from illama.partial_work import PartialWork
    from illama.steps import Steps
    from quant.inputs import Inputs
    from quant.schemes.scheme import QuantizationPlan, Scheme


@dataclass(frozen=True)
class PtqOptions:
    """Quantize a trained vision transformer, build engines, and report accuracy against latency.

    Writes a bundle for each scheme to OUT/SCHEME/, with model.onnx for CPUs, model.fused.onnx for TensorRT and the
    engines in engines/; and the report, OUT/report.html. Unfinished work is in OUT.partial/.

    Attributes:
        source: the network and its images.
        benchmark: the benchmark.
        opset: runtimes that the graphs are for.
        schemes: names of shipped schemes (python quant/list_schemes.py), or paths to YAML files, your own or those of
            python quant/search.py.
        out: folder of the bundles and the report; an earlier result there is replaced.
        library: tensorrt or tensorrt_rtx. Defaults to the first of the two that can build here.
        targets: compute capabilities of the engines, such as sm86 sm89. Defaults to this GPU for tensorrt,
            and to Ampere and newer for tensorrt_rtx.
        golden: images of the golden answers, which every bundle and engine contains to check its logits where it runs:
            calibration (8 of them, at most 32x32 pixels), noise, or none.
        engines: build an engine of every bundle with a graph for TensorRT.
        engine_batch: min, opt and max batch of the engines; one number for all three.
        report: evaluate and time the bundles beside the float references, and write a report. Without it, OUT holds the
            bundles of the schemes alone, and no test image is read.
        images: number of test images, evenly spaced; all if not given.
        workers: number of processes that read test images.
        restart: discard the unfinished run in OUT.partial instead of continuing it.
    """

    source: Flat[SourceOptions] = field(default_factory=SourceOptions)
    benchmark: Flat[BenchmarkOptions] = field(default_factory=BenchmarkOptions)
    opset: Flat[OpsetOptions] = field(default_factory=OpsetOptions)
    schemes: tuple[SchemeName, ...] = ("int8", "fp8")
    out: Path = Path("runs/ptq")
    library: LibraryName | None = None
    targets: tuple[str, ...] = ()
    golden: GoldenImages = "calibration"
    engines: bool = True
    engine_batch: BatchRange = (1, 8, 64)
    report: bool = True
    images: Count | None = None
    workers: Workers = 0
    restart: bool = False

    def __post_init__(self) -> None:
        if self.benchmark.fail_on_regression and not self.report:
            raise UserError("--fail-on-regression compares the report: leave out --no-report")


def main(options: PtqOptions) -> None:
    # Imported here, so that --help does not wait for PyTorch.
    from deploy.trt.build_bundle import build_engines
    from deploy.trt.library import find_library
    from eval.measure.evaluation_images import EvaluationImages
    from eval.measure.machine import pin_threads
    from eval.measure.targets import find_targets
    from eval.report.baseline import check_baseline, exit_on_regression, read_baseline
    from eval.report.write_report import is_result
    from illama.partial_work import partial_work
    from illama.steps import Steps
    from quant.export.write_bundle import Origin, describe_bundle, plan_quantization, write_bundles
    from quant.inputs import open_inputs, schemes_from_options

    baseline, steps = read_baseline(options.benchmark), Steps()
    with partial_work(options.out, is_result) as work:
        schemes = schemes_from_options(options.schemes)
        inputs = open_inputs(options.source, needs_labels=False)
        plans = _loadable([plan_quantization(inputs.model, scheme) for scheme in schemes], options.opset)
        engine_options = EngineOptions(options.targets, options.engine_batch)
        build = options.engines and not _built_elsewhere(options.opset)
        library = find_library(options.library) if build else None
        if library:
            library.resolve_targets(options.targets)
        images = None
        if options.report:
            data, count = inputs.data, inputs.calibration_images
            features = bool(inputs.model.config.features)
            images = EvaluationImages.of(
                options.source.data, data, inputs.preprocessing, options.images, count, features
            )
            check_baseline(baseline, images)

        origin = replace(
            Origin.of(inputs, options.benchmark.seed), golden=options.golden, rewrite=_rewrite(options.opset)
        )
        work.start(_facts(options, inputs, schemes), options.restart)
        bundles, networks = write_bundles(work, inputs, plans, origin, steps.show, references=options.report)
        not_built = (
            build_engines(library, bundles, engine_options, steps.show) if build else _built_elsewhere(options.opset)
        )
        del inputs, plans  # the network takes as much memory as an engine
        if images:
            pin_threads(options.benchmark.threads)
            report = _report(options, work, images, find_targets(bundles, networks), steps, not_built)
        else:
            print("\n".join([*not_built, *(describe_bundle(options.out / bundle.name, bundle) for bundle in bundles)]))
            print(as_run(f"next: python deploy/predict.py --engine {options.out / bundles[0].name} photo.jpg"))
    if images:
        exit_on_regression(baseline, report)


def _loadable(plans: list[QuantizationPlan], options: OpsetOptions) -> list[QuantizationPlan]:
    """Returns the plans whose number formats the chosen runtimes load; raises UserError if there is none."""
    target = options.target
    if target is None:
        return plans
    loadable = [plan for plan in plans if plan.scheme.backend == "onnx" and target.loads(plan.onnx_formats)]
    names = {plan.scheme.name for plan in loadable}
    for plan in plans:
        if plan.scheme.name not in names:
            print(f"{plan.scheme.name} is skipped: {target.name} loads no graph with its number formats")
    if not loadable:
        raise UserError(f"{target.name} loads none of these schemes: give another one, such as --schemes int8")
    return loadable


def _built_elsewhere(options: OpsetOptions) -> list[str]:
    """Returns a message if the graphs are for another TensorRT than the one here, which then builds no engines."""
    target = options.target
    if target is None or FUSED_ONNX not in target.graphs:
        return []
    return [f"No engine was built: the graphs are for {target.graphs[FUSED_ONNX]}; build there with trtexec.sh."]


def _rewrite(options: OpsetOptions) -> Callable[[Path], None] | None:
    """Returns a function that rewrites the graphs of a bundle for older runtimes, if the options name some."""
    target = options.target
    if target is None:
        return None
    from deploy.rewrites.older_bundle import lower_graphs

    def rewrite(folder: Path) -> None:
        print("\n  ".join(["", *lower_graphs(folder, target)])[1:], flush=True)

    return rewrite


def _report(
    options: PtqOptions,
    work: PartialWork,
    images: EvaluationImages,
    targets: Sequence[BenchmarkTarget],
    steps: Steps,
    not_built: Sequence[str],
) -> Report:
    """Evaluates and times the targets, writes the report into the result of ``work``, and returns it."""
    from eval.measure.benchmark import Execution, make_report, run_benchmark
    from eval.report.write_report import write_and_print

    with steps.show("evaluate and time"):
        unfinished = work.step("evaluation")
        execution = Execution(work.result, unfinished, restart=True, workers=options.workers, store=True)
        result = run_benchmark(targets, images, options.benchmark, execution)
    checkpoint = os.path.relpath(options.source.checkpoint)
    report = make_report(result, images, options.benchmark, checkpoint, steps.seconds, not_built)
    write_and_print(report, images.data.test(), work.result, options.out)
    return report


def _facts(options: PtqOptions, inputs: Inputs, schemes: Sequence[Scheme]) -> dict[str, Any]:
    """Returns everything that determines the result; an unfinished run continues only with the same facts."""
    from illama.bundle import package_versions
    from illama.partial_work import sources_digest

    return {
        **asdict(replace(inputs.source, checkpoint=Path())),  # a path is replaced by its content
        **asdict(options.benchmark),
        "library": options.library,
        "targets": options.targets,
        "engines": options.engine_batch if options.engines else None,
        "opset": asdict(options.opset),
        "report": options.report,
        "images": options.images,
        "golden": options.golden,
        "schemes": list(map(repr, schemes)),  # not as mappings: JSON ignores the order of patterns, which matters
        "checkpoint": list(inputs.checkpoint.digests().values()),
        "network": inputs.model.config.to_dict(),
        "preprocessing": asdict(inputs.preprocessing),
        "classes": inputs.classes,
        "number of test images": len(inputs.data.test()) if options.report else None,  # type: ignore[arg-type]
        "package versions": package_versions(),
        "version of this toolkit": sources_digest(),
    }


if __name__ == "__main__":
    run_command(PtqOptions, main)
