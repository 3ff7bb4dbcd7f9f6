"""Quantization-aware training of a trained iLLaMA: python quant/qat.py --scheme w4a4

On several GPUs: torchrun --nproc-per-node 8 quant/qat.py --recipe qat-in1k-tiny --checkpoint ... --data /imagenet

Calibrated as for quantization after training, then fine-tuned with its rounding in place, scales and all, by the
trainer of illama/train.py: interrupted or killed, the same command goes on. Like quant/ptq.py this command is a recipe
over the whole project, and may import from every package.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sized
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

from deploy.runtimes.open_engine import OnnxRuntimeEngine
from eval.metrics.paired import paired_drop
from illama.atomic_write import lock_folder, write_folder
from illama.bundle import CPU_ONNX, FUSED_ONNX, SCHEME, SHIPPED, TORCHAO, WEIGHTS, Manifest, sha256
from illama.cli import run_command
from illama.errors import UserError
from illama.hardware import describe_machine
from illama.inference import chance_note, predict, top1, torch_infer
from illama.models.illama import ILLaMA
from illama.training.distributed import Processes, processes
from illama.training.log import plot_curve, read_log
from illama.training.recipe import TrainingOptions, recipe_of_command_line
from illama.training.trainer import CHECKPOINT, Run, fit
from quant.export.weights import write_quantized_weights
from quant.export.write_bundle import Origin, check_scheme, write_quantized
from quant.inputs import Inputs, open_inputs
from quant.options import InputOptions
from quant.quantizers.calibrate import calibrate
from quant.quantizers.distillation import Distillation, learn_scales, scale_groups, settle_scales
from quant.quantizers.torchao_backend import convert_qat, load_torchao, prepare_qat
from quant.schemes.scheme import Scheme, find_scheme, read_scheme, write_scheme

RECIPES = Path(__file__).parent / "recipes"
DEFAULT_RECIPE = "qat-nano-fashion-mnist"


@dataclass(frozen=True)
class QatOptions(TrainingOptions):
    """Fine-tune a trained iLLaMA with its rounding in place. Every option overrides the recipe's.

    Attributes:
        recipe: a name in quant/recipes (see there), or a YAML file of your own.
        checkpoint: a bundle folder, a .safetensors or a released .pth; the shipped nano if not given.
        scheme: of quant/schemes/scheme.py; what is quantized to what.
        scheme_file: a scheme of your own in YAML, instead.
        image_size: run at another resolution than the checkpoint's: its position embedding is interpolated.
        calibration_images: how many training images the first ranges are taken from.
        distillation: share of the loss that compares logits with the unquantized network's; the rest is the labels'.
        temperature: of those soft targets.
        scale_rate: learning rate of the scales relative to their size, in learning rates.
    """

    recipe: str = DEFAULT_RECIPE
    out: Path = Path("runs/qat")
    checkpoint: Path = SHIPPED
    scheme: str = "w4a4"
    scheme_file: Path | None = None
    image_size: int | None = None
    calibration_images: int = 512
    distillation: float = 1.0
    temperature: float = 2.0
    scale_rate: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.distillation <= 1:
            raise UserError("--distillation must lie in 0..1")
        if not 0 < self.temperature < float("inf") or not 0 <= self.scale_rate < float("inf"):
            raise UserError("--temperature must be positive, and --scale-rate not negative")
        if self.calibration_images < 1:
            raise UserError("--calibration-images must be at least 1")


@dataclass(frozen=True)
class Job:
    """What a run starts from, opened and checked."""

    options: QatOptions
    scheme: Scheme
    inputs: Inputs
    origin: Origin

    @property
    def trained(self) -> ILLaMA:
        """The network in floating point."""
        return cast(ILLaMA, self.inputs.model)

    @cached_property
    def untrained(self) -> ILLaMA:
        """The network as quantization after training leaves it, learned rounding and all, with stochastic depth."""
        return self.quantize(self.scheme)

    def quantize(self, scheme: Scheme) -> ILLaMA:
        """The network of the checkpoint quantized by ``scheme``, ready to be trained."""
        model = ILLaMA(self.trained.config, self.options.drop_path, self.options.dropout)
        model.load_state_dict(self.trained.state_dict())
        if scheme.backend == "torchao":
            return cast(ILLaMA, prepare_qat(model, scheme))
        return cast(ILLaMA, calibrate(model, scheme, self.inputs.calibration))

    def deploy(self, trained: ILLaMA) -> ILLaMA:
        """The network that goes to a file, of one that :meth:`quantize` made and training changed."""
        if self.scheme.backend == "torchao":
            return cast(ILLaMA, convert_qat(trained, self.scheme))
        settle_scales(trained)
        return trained


def open_job(options: QatOptions) -> Job:
    """Load and check everything before any work is done; UserError for whatever does not fit."""
    if not options.data:
        raise UserError("no images to train on: give --data (see --help)")
    scheme = read_scheme(options.scheme_file) if options.scheme_file else find_scheme(options.scheme)
    source = InputOptions(
        options.checkpoint, None, options.data, options.calibration_images, options.exif, options.class_order
    )
    inputs = open_inputs(source, options.image_size)
    check_scheme(inputs.model, scheme)
    files = {str(options.scheme_file): sha256(options.scheme_file)} if options.scheme_file else {}
    # A shipped scheme has no file, but a run under another one must not go on under this.
    files[f"scheme {scheme.name}"] = hashlib.sha256(json.dumps(asdict(scheme)).encode()).hexdigest()
    return Job(options, scheme, inputs, Origin.of(inputs, options.seed, files))


def start_run(job: Job, group: Processes) -> Run:
    """Quantize the network, and go on from ``out`` if a run was interrupted there."""
    options = job.options
    # A checkpoint's weights replace those that rounding would be learned for, which takes minutes.
    interrupted = (options.out / CHECKPOINT).exists()
    quantized = job.quantize(replace(job.scheme, learned=0)) if interrupted else copy.deepcopy(job.untrained)
    learn_scales(quantized)
    loss = Distillation(job.trained, options.temperature, options.distillation, options, group.device)
    return Run(
        options,
        job.inputs.data,
        job.origin.preprocessing,
        quantized,
        group,
        dict(job.origin.inputs),
        loss,
        scale_groups(options.scale_rate),
    )


def measure(job: Job, trained: ILLaMA, folder: Path) -> dict[str, Any]:
    """Top-1 in percent and drops from FP32 over the whole test split, before training, after it, and of the files.

    The file for TensorRT is there only where TensorRT has the kernels; see
    :func:`quant.export.write_bundle.write_quantized`.
    """
    test = job.inputs.data.test()
    models = {"fp32": torch_infer(job.trained), "ptq": torch_infer(job.untrained), "qat": torch_infer(trained)}
    files = {"onnx": folder / CPU_ONNX, "fused_onnx": folder / FUSED_ONNX}
    models |= {name: OnnxRuntimeEngine(path).infer for name, path in files.items() if path.exists()}
    if (folder / TORCHAO).exists():
        models["torchao"] = torch_infer(load_torchao(folder))
    logits, labels = predict(models, test, job.origin.preprocessing.transform(), workers=job.options.workers)
    right = {name: values.argmax(1) == labels for name, values in logits.items()}
    drops = {name: asdict(paired_drop(right["fp32"], right[name], job.options.seed)) for name in right}
    return {
        **{f"{name}_top1": top1(values, labels) for name, values in logits.items()},
        **{f"{name}_drop": drop for name, drop in drops.items() if name != "fp32"},
        "test_images": len(cast(Sized, test)),
    }


def write_bundle(job: Job, run: Run) -> Path:
    """The finished run as a bundle named after its scheme: weights and scales, graphs, scheme, log and curve."""
    options, folder = job.options, job.options.out / f"{job.scheme.name}-qat"
    trained = cast(ILLaMA, copy.deepcopy(run.kept).cpu().eval())
    trained.soft_mask = 0.0
    trained = job.deploy(trained)
    with write_folder(folder) as draft:
        facts = {"epochs": options.epochs, "machine": describe_machine()}
        write_quantized(draft, job.trained, trained, job.scheme, job.origin, facts)
        if job.scheme.backend == "onnx":
            write_quantized_weights(trained, job.scheme, draft / WEIGHTS)
        write_scheme(job.scheme, draft / SCHEME)
        (draft / "log.csv").write_text((options.out / "log.csv").read_text())
        plot_curve(read_log(options.out / "log.csv"), draft / "curve.png")
        manifest = Manifest.read(draft)
        manifest.metrics |= measure(job, trained, draft)
        manifest.write(draft)
    return folder


def main(options: QatOptions) -> None:
    options = replace(options, out=options.out.resolve())
    with processes() as group, lock_folder(options.out, group.main):
        job = open_job(options)
        run = start_run(job, group)
        fit(run)
        if not group.main:
            return
        metrics = Manifest.read(bundle := write_bundle(job, run)).metrics
    file = "torchao_top1" if "torchao_top1" in metrics else "onnx_top1"
    print(
        f"top-1 of {metrics['test_images']} test images: FP32 {metrics['fp32_top1']:.2f}%, quantized after training "
        f"{metrics['ptq_top1']:.2f}%, trained {metrics['qat_top1']:.2f}%, its file {metrics[file]:.2f}%; "
        f"bundle in {bundle}"
    )
    if note := chance_note("FP32", metrics["fp32_top1"], len(job.inputs.data.classes)):
        print(note)


if __name__ == "__main__":
    run_command(QatOptions, main, partial(recipe_of_command_line, QatOptions, RECIPES, DEFAULT_RECIPE))
