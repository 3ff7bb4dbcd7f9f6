"""From a trained checkpoint to INT8 and FP8, to engines, to a table of accuracy against latency:

python quant/ptq.py

This command is a recipe over the whole project, so it alone may import from every package.
"""

from __future__ import annotations

import copy
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from deploy.build import build_fitting
from deploy.trt.engine_options import EngineOptions, LibraryName
from deploy.trt.library import Library, find_library
from eval.benchmark.benchmark import Images, report_on, run_benchmark
from eval.benchmark.machine import pin_threads
from eval.benchmark.targets import find_targets
from eval.report.schema import Report
from eval.report.write_report import is_result
from eval.tradeoff import UNFINISHED, check_baseline, check_inputs, exit_on_regression, write_and_tell
from illama.atomic_write import write_folder
from illama.bundle import CPU_ONNX, FUSED_ONNX, SCHEME, Manifest
from illama.cli import run_command
from illama.errors import UserError
from illama.models.attention import SoftMasked
from illama.options import BenchmarkOptions
from quant.export.write_bundle import Origin, check_scheme, quantize, write_graphs, write_quantized
from quant.input_options import InputOptions
from quant.inputs import Inputs, check_names, open_inputs
from quant.quantizers.torchao_backend import load_torchao
from quant.schemes.scheme import Scheme, find_scheme, read_scheme, write_scheme

DEFAULT_SCHEMES = ("int8", "fp8")


@dataclass(frozen=True)
class PtqOptions(InputOptions, BenchmarkOptions):
    """Quantize a trained vision transformer after training, build engines, and weigh accuracy against latency.

    Attributes:
        schemes: any of those that python quant/schemes/scheme.py lists.
        scheme_file: a scheme of your own or of python quant/search.py, in YAML; then --schemes only names others.
        out: where the bundles and the report go; an earlier result there is replaced.
        image_size: run at another resolution than the checkpoint's: its position embedding is interpolated.
        library: tensorrt or tensorrt_rtx; whichever can build here, tensorrt first, if not given.
        targets: compute capabilities of the engines, such as sm86 sm89; the library's portable choice if not given.
    """

    schemes: tuple[str, ...] | None = None
    scheme_file: tuple[Path, ...] = ()
    out: Path = Path("runs/ptq")
    image_size: int | None = None
    library: LibraryName | None = None
    targets: tuple[str, ...] = ()


@dataclass
class Job:
    """What every step of the recipe needs."""

    options: PtqOptions
    schemes: list[Scheme]
    inputs: Inputs
    origin: Origin
    folder: Path
    library: Library | None
    seconds: dict[str, float] = field(default_factory=dict)
    networks: dict[str, SoftMasked] = field(default_factory=dict)
    not_run: list[str] = field(default_factory=list)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Name the step on the terminal, and note what it took."""
        print(f"{name} ...", flush=True)
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def find_schemes(options: PtqOptions) -> list[Scheme]:
    """The schemes named and those of files, each once."""
    names = options.schemes if options.schemes is not None else () if options.scheme_file else DEFAULT_SCHEMES
    schemes = [find_scheme(name) for name in dict.fromkeys(names)] + [read_scheme(path) for path in options.scheme_file]
    check_names(schemes)
    return schemes


def open_job(options: PtqOptions, folder: Path) -> Job:
    """Load and check everything before any work is done; UserError for whatever does not fit."""
    schemes = find_schemes(options)
    inputs = open_inputs(options, options.image_size)
    for scheme in schemes:
        check_scheme(inputs.model, scheme)
    library = find_library(options.library)
    if library:
        library.resolve_targets(options.targets)
    return Job(options, schemes, inputs, Origin.of(inputs, options.seed), folder, library)


def write_bundles(job: Job) -> list[Path]:
    """Calibrate every scheme and export it, beside the FP32 and FP16 references."""
    model = job.inputs.model
    with job.phase("read calibration images"):
        batches = job.inputs.calibration
    with job.phase("export fp32 and fp16"):
        bundles = [
            write_graphs(job.folder / "fp32", model, job.origin, (CPU_ONNX,), {}),
            write_graphs(job.folder / "fp16", model, job.origin, (FUSED_ONNX,), {}),
        ]
    for scheme in job.schemes:
        with job.phase(f"quantize and export {scheme.name}"):
            quantized = quantize(model, scheme, batches)
            bundle = write_quantized(job.folder / scheme.name, model, quantized, scheme, job.origin, {})
            write_scheme(scheme, bundle / SCHEME)
            if scheme.backend == "torchao":
                job.networks[scheme.name] = load_torchao(bundle, copy.deepcopy(model))
        bundles.append(bundle)
        print_layers(bundle)
    return bundles


def print_layers(bundle: Path) -> None:
    """What a scheme did to each layer."""
    for layer, weight, activation in Manifest.read(bundle).metrics["layers"]:
        print(f"  {layer:<26} {f'weight {weight}, ' if weight else ''}{'input ' if weight else ''}{activation}")


def build_engines(job: Job, bundles: list[Path]) -> None:
    """A TensorRT engine for every bundle with a fused graph."""
    if job.library is None:
        job.not_run.append("No engine was built: no TensorRT that can build is installed here.")
        return
    for bundle in (bundle for bundle in bundles if (bundle / FUSED_ONNX).exists()):
        unfit: tuple[str, ...] = ()
        with job.phase(f"build {bundle.name} engine"):
            try:
                _, unfit = build_fitting(job.library, bundle, EngineOptions(job.options.targets))
            except UserError as error:  # the rest of the table is worth having without this engine
                job.not_run.append(f"No {bundle.name} engine: {error}.")
        if unfit:
            job.not_run.append(f"No {bundle.name} engine for {', '.join(unfit)}: FP8 needs sm89 or newer.")


def images_of(job: Job) -> Images:
    """What the bundles are evaluated on."""
    data, options = job.inputs.data, job.options
    return Images(options.data, data, data.test(), job.origin.preprocessing, options.calibration_images)


def benchmark_bundles(job: Job, bundles: list[Path]) -> Report:
    """Accuracy and latency of everything that was written."""
    options, images, work = job.options, images_of(job), job.folder / UNFINISHED
    with job.phase("evaluate and time"):
        pin_threads(options.threads)
        result = run_benchmark(find_targets(bundles, job.networks), images, options, job.folder, work, store=True)
    shutil.rmtree(work)
    return report_on(result, images, options, os.path.relpath(options.checkpoint), job.seconds, job.not_run)


def main(options: PtqOptions) -> None:
    baseline = check_inputs(options)
    with write_folder(options.out, is_result) as folder:
        job = open_job(options, folder)
        check_baseline(baseline, images_of(job))
        bundles = write_bundles(job)
        build_engines(job, bundles)
        report = benchmark_bundles(job, bundles)
        write_and_tell(report, job.inputs.data.test(), folder, options)
    exit_on_regression(baseline, report)


if __name__ == "__main__":
    run_command(PtqOptions, main)
