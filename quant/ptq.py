"""From a trained checkpoint to INT8 and FP8, to engines, to a table of accuracy against latency:

python quant/ptq.py

This command is a recipe over the whole project, so it alone may import from every package.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from deploy.build import build_fitting
from deploy.library import Library, find_library, sees_gpu
from eval.machine import describe_machine
from eval.report import SUMMARY, Summary, markdown_table, write_report
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
        targets: compute capabilities of the engines, such as sm86 sm89; the library's portable choice if not given.
        seed: of the bootstrap's intervals; calibration is deterministic.
    """

    checkpoint: Path = SHIPPED
    data: str = "fashion-mnist"
    schemes: tuple[str, ...] = ("int8", "fp8")
    calibration_images: int = 512
    out: Path = Path("runs/ptq")
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

    def write_bundle(self, name: str, model: ILLaMA, on_cpu: bool, fused: bool) -> Path:
        """Export ``model`` in the forms asked for, with a manifest."""
        folder = self.folder / name
        folder.mkdir()
        if on_cpu:
            export_onnx(model, folder / CPU_ONNX, "plain")
        if fused:
            export_onnx(model, folder / FUSED_ONNX, "fused", torch.float16)
        inputs = {str(self.checkpoint.weights): sha256(self.checkpoint.weights)}
        Manifest(command_line(), model.config.to_dict(), asdict(self.preprocessing), list(self.data.classes),
                 self.options.seed, inputs).write(folder)  # fmt: skip
        return folder


def open_job(options: PtqOptions, folder: Path) -> Job:
    """Load and check everything before any work is done; UserError for whatever does not fit."""
    checkpoint = load_checkpoint(options.checkpoint)
    data = open_data(options.data)
    config = checkpoint.model.config
    if len(data.classes) != config.num_classes:
        raise UserError(
            f"{options.checkpoint} has {config.num_classes} classes, {options.data} has {len(data.classes)}: "
            "they must be the same"
        )
    preprocessing = checkpoint.preprocessing or data.preprocessing(config.image_size, config.in_channels)
    library = find_library()
    if library:
        library.check_targets(options.targets)
    return Job(options, checkpoint, data, preprocessing, folder, library)


def write_bundles(job: Job, schemes: list[Scheme]) -> list[Path]:
    """Calibrate every scheme and export it, beside the FP32 and FP16 references."""
    calibration = job.data.calibration(job.options.calibration_images)
    model = job.checkpoint.model
    with job.phase("read calibration images"):
        images, _ = load_images(calibration, job.preprocessing.transform())
    batches = torch.from_numpy(images).split(64)
    with job.phase("export fp32 and fp16"):
        bundles = [job.write_bundle("fp32", model, True, False), job.write_bundle("fp16", model, False, True)]
    for scheme in schemes:
        with job.phase(f"quantize and export {scheme.name}"):
            bundles.append(job.write_bundle(scheme.name, calibrate(model, scheme, batches), True, True))
    return bundles


def build_engines(job: Job, bundles: list[Path]) -> list[str]:
    """A TensorRT engine for every bundle with a fused graph; what could not be built or run, in sentences."""
    if job.library is None:
        return ["No engine was built: neither tensorrt nor tensorrt-rtx is installed here."]
    notes = []
    for bundle in (bundle for bundle in bundles if (bundle / FUSED_ONNX).exists()):
        with job.phase(f"build {bundle.name} engine"):
            notes.append(build_fitting(job.library, bundle, job.options.targets))
    if not sees_gpu():
        notes.append("Engines were built and their fusion checked, not run or timed: that needs an NVIDIA GPU.")
    if job.library.name == "tensorrt_rtx":
        notes.append("TensorRT-RTX multiplies INT8 weights in FP16; INT8 tensor cores need the full TensorRT.")
    return [note for note in notes if note]


def main(options: PtqOptions) -> None:
    schemes = [find_scheme(name) for name in dict.fromkeys(options.schemes)]
    with write_folder(options.out, marker=SUMMARY) as folder:
        job = open_job(options, folder)
        bundles = write_bundles(job, schemes)
        not_run = build_engines(job, bundles)
        with job.phase("evaluate and time"):
            rows = weigh(bundles, job.data.test(), job.preprocessing.transform(), options.seed)
        summary = Summary(rows, command_line(), options.data, str(options.checkpoint), options.calibration_images,
                          describe_machine(), package_versions(), job.seconds, not_run)  # fmt: skip
        write_report(summary, folder)
    print(f"\n{markdown_table(rows)}\n")
    for reason in summary.not_run:
        print(reason)
    print(f"report: {options.out / 'report.html'}")


if __name__ == "__main__":
    run_command(PtqOptions, main)
