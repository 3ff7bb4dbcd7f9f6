"""One run of quantization-aware training: calibrate, train, and write the result as a bundle."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Sized
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
from timm.layers import DropPath
from torch import nn

from illama.atomic_write import write_folder
from illama.bundle import CPU_ONNX, FUSED_ONNX, TORCHAO, WEIGHTS, sha256
from illama.data.datasets import evenly_spaced
from illama.errors import UserError
from illama.hardware import describe_machine
from illama.inference import Infer, predict, top1, torch_infer
from illama.manifest import Drop, Manifest, Scores
from illama.models.attention import MaskedNetwork
from illama.models.illama import ILLaMA
from illama.nearest_neighbors import Classifier, as_it_is, classified
from illama.training.distributed import Processes
from illama.training.log import plot_curve, read_log
from illama.training.trainer import CHECKPOINT, Run, Task
from quant.export.weights import write_quantized_weights
from quant.export.write_bundle import Origin, plan_quantization, write_quantized
from quant.inputs import Inputs, open_inputs, scheme_from_name_or_file
from quant.quantizers.calibrate import calibrate
from quant.quantizers.distillation import Distillation, make_scales_buffers, make_scales_parameters, scale_groups
from quant.quantizers.qat_options import QatOptions
from quant.quantizers.torchao_backend import convert_qat, load_torchao, prepare_qat
from quant.schemes.scheme import QuantizationPlan

OpenOnnx = Callable[[Path], Infer]
"""Path to an ONNX file -> a function from images to logits."""
PairedDrop = Callable[[np.ndarray, np.ndarray, int], Drop]
"""Correctness (n,) of the reference and of another model, and a seed -> the accuracy drop."""


@dataclass(frozen=True)
class QatJob:
    """The checked inputs of a run."""

    options: QatOptions
    plan: QuantizationPlan
    inputs: Inputs
    origin: Origin

    @cached_property
    def untrained(self) -> MaskedNetwork:
        """The network after post-training quantization, including block reconstruction, with stochastic depth."""
        return self.quantize(self.plan)

    def quantize(self, plan: QuantizationPlan) -> MaskedNetwork:
        """Returns the checkpoint's network quantized by ``plan``, ready for training."""
        model = with_dropout(self.inputs.model, self.options.drop_path, self.options.dropout)
        if plan.scheme.backend == "torchao":
            return prepare_qat(model, plan)
        return calibrate(model, plan, self.inputs.calibration, self.inputs.device)

    def deploy(self, trained: MaskedNetwork) -> MaskedNetwork:
        """Returns the network to export, from a trained network that :meth:`quantize` made."""
        if self.plan.scheme.backend == "torchao":
            return convert_qat(trained, self.plan)
        make_scales_buffers(trained)
        return trained


def with_dropout(network: MaskedNetwork, drop_path: float, dropout: float) -> MaskedNetwork:
    """Returns a copy with stochastic depth, whose rates rise linearly from 0 in the first block, and dropout.

    Raises:
        UserError: dropout is asked for in a timm network.
    """
    if isinstance(network, ILLaMA):
        model = ILLaMA(network.config, drop_path, dropout)
        model.load_state_dict(network.state_dict())
        return model
    if dropout:
        raise UserError("--dropout is for an iLLaMA: set it to 0")
    copied: Any = copy.deepcopy(network)
    blocks = list(copied.vit.blocks)
    for index, block in enumerate(blocks):
        rate = drop_path * index / max(1, len(blocks) - 1)
        for name in [name for name, _ in block.named_modules() if name.rpartition(".")[2].startswith("drop_path")]:
            block.set_submodule(name, DropPath(rate) if rate else nn.Identity())
    return copied


def open_job(options: QatOptions) -> QatJob:
    """Loads and checks all inputs before any work is done.

    Raises:
        UserError: the checkpoint, the scheme and the data do not fit each other, or one cannot be read; or features,
            which no label fits, are to be trained on labels.
    """
    if not options.data:
        raise UserError("no training images: give --data (see --help)")
    scheme = scheme_from_name_or_file(options.scheme)
    inputs = open_inputs(options.source)
    if inputs.model.config.features and options.distillation != 1:
        raise UserError("features are trained by distillation alone: give --distillation 1")
    plan = plan_quantization(inputs.model, scheme)
    inputs.data.training()  # raises without training images, before minutes of calibration
    files = {options.scheme: sha256(Path(options.scheme))} if Path(options.scheme).suffix else {}
    # The hash of the scheme itself keeps a run from resuming under a changed scheme of the same name.
    files[f"scheme {scheme.name}"] = hashlib.sha256(json.dumps(asdict(scheme)).encode()).hexdigest()
    return QatJob(options, plan, inputs, replace(Origin.of(inputs, options.seed, files), golden=options.golden))


def start_run(job: QatJob, group: Processes) -> Run:
    """Quantizes the network and returns its training run, resumed if ``out`` holds an unfinished one."""
    options = job.options
    # A resumed run loads its weights from the training checkpoint, so GPTQ and block reconstruction are skipped.
    interrupted = (options.out / CHECKPOINT).exists()
    as_it_is = replace(job.plan, scheme=job.plan.scheme.rounding_to_nearest())
    quantized = job.quantize(as_it_is) if interrupted else copy.deepcopy(job.untrained)
    make_scales_parameters(quantized)
    loss = Distillation(job.inputs.model, options.temperature, options.distillation, options, group.device)
    inputs, groups = job.origin.provenance.inputs, scale_groups(options.scale_rate)
    task = Task(job.inputs.data, job.origin.preprocessing, inputs, loss, groups, validation_classifier(job.inputs))
    return Run(options, task, quantized, group)


def validation_classifier(inputs: Inputs) -> Classifier:
    """Returns the classifier of the validation images; of features, with other neighbors than these."""
    if not inputs.model.config.features:
        return as_it_is
    images: Any = inputs.data.training()[0]
    return inputs.neighbors_of(evenly_spaced(images, min(len(images), inputs.calibration_images))).logits


def write_qat_bundle(job: QatJob, run: Run, open_onnx: OpenOnnx, drop: PairedDrop) -> Path:
    """Writes a finished run as a bundle, atomically: weights, scales, graphs, scheme, log and learning curve.

    Args:
        open_onnx: opens the exported files for the evaluation.
        drop: computes accuracy drops.

    Returns:
        Path to the bundle, a folder named after the scheme.
    """
    options, folder = job.options, job.options.out / f"{job.plan.scheme.name}-qat"
    trained = copy.deepcopy(run.kept).cpu().eval()
    trained.soft_mask = 0.0
    trained = job.deploy(trained)
    with write_folder(folder) as draft:
        write_quantized(draft, trained, job.plan, job.origin, job.inputs.calibration)
        if job.plan.scheme.backend == "onnx":
            write_quantized_weights(trained, job.plan.scheme, draft / WEIGHTS)
        (draft / "log.csv").write_text((options.out / "log.csv").read_text())
        plot_curve(read_log(options.out / "log.csv"), draft / "curve.png")
        scores = _evaluate(job, trained, draft, open_onnx, drop)
        replace(Manifest.read(draft), scores=scores).write(draft)
    return folder


def _evaluate(job: QatJob, trained: MaskedNetwork, folder: Path, open_onnx: OpenOnnx, drop: PairedDrop) -> Scores:
    """Top-1 in percent and accuracy drops from FP32 over the test split: before training, after it, and of the files.

    There is no file for TensorRT if it cannot run the scheme: see :func:`quant.export.write_bundle.write_quantized`.
    """
    test = job.inputs.data.test()
    models = {"fp32": torch_infer(job.inputs.model), "ptq": torch_infer(job.untrained), "qat": torch_infer(trained)}
    files = {"onnx": folder / CPU_ONNX, "fused_onnx": folder / FUSED_ONNX}
    models |= {name: open_onnx(path) for name, path in files.items() if path.exists()}
    if (folder / TORCHAO).exists():
        models["torchao"] = torch_infer(load_torchao(folder, copy.deepcopy(job.inputs.model)))
    models = {name: classified(infer, job.inputs.classifier) for name, infer in models.items()}
    logits, labels = predict(models, test, job.origin.preprocessing.transform(), workers=job.options.workers)
    correct = {name: values.argmax(1) == labels for name, values in logits.items()}
    drops = {name: drop(correct["fp32"], correct[name], job.options.seed) for name in correct if name != "fp32"}
    values = {name: top1(found, labels) for name, found in logits.items()}
    return Scores("top1", len(cast(Sized, test)), values, drops, job.options.epochs, describe_machine())
