"""From a trained checkpoint to INT8 and FP8, to engines, to a table of accuracy against latency:

python quant/ptq.py

This command is a recipe over the whole project, so it alone may import from every package.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from deploy.build import build_fitting
from deploy.library import Library, find_library
from eval.machine import describe_machine, peak_memory_gib
from eval.report import Summary, is_result, markdown_table, write_report
from eval.tradeoff import weigh
from illama.accuracy import load_images
from illama.bundle import CPU_ONNX, FUSED_ONNX, Manifest, command_line, package_versions, sha256, write_folder
from illama.checkpoint import SHIPPED, Checkpoint, load_checkpoint
from illama.data import ImageData, Preprocessing, open_data
from illama.errors import UserError, run_command
from illama.model import ILLaMA
from quant.calibrate import calibrate
from quant.export import export_onnx
from quant.schemes import Scheme, find_scheme


@dataclass(frozen=True)
class PtqOptions:
    """Quantize a trained iLLaMA after training, build engines, and weigh accuracy against latency.

    Attributes:
        checkpoint: a bundle folder, a .safetensors or a released .pth; the shipped nano if not given.
        data: fashion-mnist, cifar10:FOLDER, cifar100:FOLDER, or a folder with train/ and val/.
        schemes: any of int8, fp8.
        calibration_images: how many training images the ranges are taken from.
        out: where the bundles, summary.json and report.html go; an earlier result there is replaced.
        image_size: run at another resolution than the checkpoint's: its position embedding is interpolated.
        targets: compute capabilities of the engines, such as sm86 sm89; the library's portable choice if not given.
        seed: of the bootstrap's intervals; calibration is deterministic.
    """

    checkpoint: Path = SHIPPED
    data: str = "fashion-mnist"
    schemes: tuple[str, ...] = ("int8", "fp8")
    calibration_images: int = 512
    out: Path = Path("runs/ptq")
    image_size: int | None = None
    targets: tuple[str, ...] = ()
    seed: int = 0


@dataclass
class Job:
    """What every step of the recipe needs."""

    options: PtqOptions
    checkpoint: Checkpoint
    data: ImageData
    preprocessing: Preprocessing
    folder: Path
    library: Library | None
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Name the step on the terminal, and note what it took."""
        print(f"{name} ...", flush=True)
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def write_bundle(self, name: str, model: ILLaMA, *files: str) -> Path:
        """Export ``model`` as the ONNX files named, with a manifest."""
        folder = self.folder / name
        folder.mkdir()
        if CPU_ONNX in files:
            export_onnx(model, folder / CPU_ONNX, "plain")
        if FUSED_ONNX in files:
            export_onnx(model, folder / FUSED_ONNX, "fused", torch.float16)
        inputs = {str(self.checkpoint.weights): sha256(self.checkpoint.weights)}
        Manifest(command_line(), model.config.to_dict(), asdict(self.preprocessing), list(self.data.classes),
                 self.options.seed, inputs).write(folder)  # fmt: skip
        return folder


def open_job(options: PtqOptions, folder: Path) -> Job:
    """Load and check everything before any work is done; UserError for whatever does not fit."""
    checkpoint = load_checkpoint(options.checkpoint, image_size=options.image_size)
    data = open_data(options.data)
    config = checkpoint.model.config
    if len(data.classes) != config.num_classes:
        raise UserError(
            f"{options.checkpoint} has {config.num_classes} classes, {options.data} has {len(data.classes)}: "
            "they must be the same"
        )
    for trained, given in zip(checkpoint.classes, data.classes, strict=False):
        if trained != given:
            raise UserError(
                f"{options.checkpoint} was trained for the class {trained!r} where {options.data} has {given!r}"
            )
    preprocessing = checkpoint.preprocessing or data.preprocessing(config.image_size, config.in_channels)
    library = find_library()
    if library:
        library.resolve_targets(options.targets)
    return Job(options, checkpoint, data, preprocessing, folder, library)


def write_bundles(job: Job, schemes: list[Scheme]) -> list[Path]:
    """Calibrate every scheme and export it, beside the FP32 and FP16 references."""
    calibration = job.data.calibration(job.options.calibration_images)
    model = job.checkpoint.model
    with job.phase("read calibration images"):
        images, _ = load_images(calibration, job.preprocessing.transform())
    batches = torch.from_numpy(images).split(64)
    with job.phase("export fp32 and fp16"):
        bundles = [job.write_bundle("fp32", model, CPU_ONNX), job.write_bundle("fp16", model, FUSED_ONNX)]
    for scheme in schemes:
        with job.phase(f"quantize and export {scheme.name}"):
            quantized = calibrate(model, scheme, batches)
            bundles.append(job.write_bundle(scheme.name, quantized, CPU_ONNX, FUSED_ONNX))
    return bundles


def build_engines(job: Job, bundles: list[Path]) -> list[str]:
    """A TensorRT engine for every bundle with a fused graph; what could not be built or run, in sentences."""
    if job.library is None:
        return ["No engine was built: neither tensorrt nor tensorrt-rtx is installed here."]
    notes = []
    for bundle in (bundle for bundle in bundles if (bundle / FUSED_ONNX).exists()):
        with job.phase(f"build {bundle.name} engine"):
            _, unfit = build_fitting(job.library, bundle, job.options.targets)
        if unfit:
            notes.append(f"No {bundle.name} engine for {', '.join(unfit)}: FP8 needs sm89 or newer.")
    notes.append(
        "Engines were built and their attention proven fused; they were not run or timed: that "
        "needs an NVIDIA GPU, and this version builds engines only."
    )
    if job.library.name == "tensorrt_rtx":
        notes.append("TensorRT-RTX multiplies INT8 weights in FP16; INT8 tensor cores need the full TensorRT.")
    return notes


def main(options: PtqOptions) -> None:
    schemes = [find_scheme(name) for name in dict.fromkeys(options.schemes)]
    with write_folder(options.out, is_result) as folder:
        job = open_job(options, folder)
        bundles = write_bundles(job, schemes)
        not_run = build_engines(job, bundles)
        with job.phase("evaluate and time"):
            rows = weigh(bundles, job.data.test(), job.preprocessing.transform(), options.seed)
        summary = Summary(
            rows=rows,
            command=command_line(),
            data=options.data,
            checkpoint=os.path.relpath(options.checkpoint),
            calibration_images=options.calibration_images,
            machine=describe_machine(),
            versions=package_versions(),
            seconds={**job.seconds, "all": sum(job.seconds.values())},
            not_run=not_run,
            peak_memory_gib=round(peak_memory_gib(), 2),
        )
        write_report(summary, folder)
    print(f"\n{markdown_table(rows)}\n")
    for reason in summary.not_run:
        print(reason)
    print(f"{summary.seconds['all']:.0f} s, {summary.peak_memory_gib} GiB; report: {options.out / 'report.html'}")


if __name__ == "__main__":
    run_command(PtqOptions, main)
