"""Where an exported file departs from the PyTorch network it was made of, layer by layer:

python quant/debug_layers.py runs/ptq/int8

The first two columns are what has gathered since the images, and fall from layer to layer by nature; the third feeds
each layer with the file's own numbers, and names the fault. quant/export/verify.py explains.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from illama.bundle import CPU_ONNX, SCHEME, SHIPPED, WEIGHTS, Manifest, sha256
from illama.checkpoints.load import read_preprocessing
from illama.cli import run_command
from illama.errors import UserError
from illama.models.attention import SoftMasked
from quant.export.onnx_export import export_onnx
from quant.export.verify import (
    Difference,
    accumulated_sqnr,
    compare_with_trace,
    first_mismatch,
    observable_layers,
    trace_onnx,
)
from quant.export.weights import read_quantized_weights
from quant.export.write_bundle import SOURCE
from quant.input_options import InputOptions
from quant.inputs import Inputs, open_inputs, scheme_named
from quant.mixed_precision.layer_effects import selection_images
from quant.quantizers.calibrate import calibrate
from quant.schemes.scheme import Scheme


@dataclass(frozen=True)
class DebugOptions:
    """Compare FP32 PyTorch, quantized PyTorch and the exported file, layer by layer, and name the first fault.

    The quantized network is calibrated again, which gives the same one; that of `python quant/qat.py` is read from the
    bundle. What an option leaves out is taken from the bundle's manifest.

    Attributes:
        bundle: a folder with a model.onnx; without one, --scheme is exported for the comparison.
        scheme: a shipped scheme's name, or a YAML file; the bundle's own if not given.
        checkpoint: what the bundle was made from.
        model: timm:NAME where the checkpoint is that of a timm ViT; an iLLaMA's says itself what it is.
        data: where its images come from.
        calibration_images: how many training images its ranges were taken from.
        images: how many images to compare over, none of them a calibration image.
    """

    bundle: Annotated[Path | None, tyro.conf.Positional] = None
    scheme: str | None = None
    checkpoint: Path | None = None
    model: str | None = None
    data: str | None = None
    calibration_images: int | None = None
    images: int = 8


def open_source(options: DebugOptions) -> Inputs:
    """The checkpoint and the images that the bundle was made from, as far as no option says otherwise.

    Raises:
        UserError: the bundle is none, or was made from another checkpoint.
    """
    manifest = Manifest.read(options.bundle) if options.bundle else None
    source = dict(manifest.metrics.get(SOURCE, {})) if manifest else {}
    given = {
        "checkpoint": options.checkpoint,
        "data": options.data,
        "model": options.model,
        "calibration_images": options.calibration_images,
    }
    source |= {name: value for name, value in given.items() if value is not None}
    image_size, checkpoint = source.pop("image_size", None), Path(source.pop("checkpoint", SHIPPED))
    if manifest:
        preprocessing = read_preprocessing(manifest)
        source |= {"exif": preprocessing.exif, "class_order": preprocessing.class_order}
    inputs = open_inputs(InputOptions(checkpoint, **source), image_size)
    if manifest and sha256(inputs.checkpoint.weights) not in manifest.inputs.values():
        raise UserError(f"{options.bundle} was not made from {checkpoint}: give the right --checkpoint")
    return inputs


def find_scheme_of(options: DebugOptions) -> Scheme:
    """The scheme to quantize by: the one named, or the bundle's own."""
    name = options.scheme or "int8"
    if options.bundle and not options.scheme:
        own = options.bundle / SCHEME
        name = str(own) if own.exists() else options.bundle.resolve().name
    return Scheme("float") if name in ("fp32", "float") else scheme_named(name)


def rebuild(options: DebugOptions, inputs: Inputs, scheme: Scheme) -> SoftMasked:
    """The quantized network that the bundle's graph was exported from: read if it was trained, else calibrated."""
    trained = options.bundle / WEIGHTS if options.bundle else None
    if trained and trained.exists() and scheme.tensors:
        return read_quantized_weights(trained)[0]
    return calibrate(inputs.model, scheme, inputs.calibration)


def print_table(differences: dict[str, Difference], sqnr: dict[str, tuple[float, float]]) -> None:
    """One line a tensor, in the order in which they are computed."""
    print(f"{'':30} {'gathered since the images, dB':>32}")
    print(f"{'tensor':30} {'by quantization':>16} {'by export':>15} {'locally':>22}")
    for name, difference in differences.items():
        columns = [f"{value:.1f}" if np.isfinite(value) else "-" for value in sqnr.get(name, (np.inf, np.inf))]
        mark = "  <- departs" if difference.mismatch else ""
        print(f"{name:30} {columns[0]:>16} {columns[1]:>15} {difference!s:>22}{mark}")


def main(options: DebugOptions) -> None:
    inputs, scheme = open_source(options), find_scheme_of(options)
    reference, quantized = inputs.float_model(scheme), rebuild(options, inputs, scheme)
    pool = selection_images(inputs.data, inputs.calibration_images, options.images)
    images = np.concatenate([batch.numpy() for batch, _ in inputs.batches(pool)])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / CPU_ONNX if options.bundle is None else options.bundle / CPU_ONNX
        if options.bundle is None:
            print(f"export {scheme.name} ...", flush=True)
            export_onnx(quantized, path, "plain")
        if not path.exists():
            raise UserError(f"{options.bundle} has no {CPU_ONNX}: it is the file that can be run and compared here")
        trace = trace_onnx(path, images, observable_layers(quantized))
    differences = compare_with_trace(quantized, trace, images)
    print_table(differences, accumulated_sqnr(reference, quantized, trace, images))
    fault = first_mismatch(differences)
    if fault:
        print(f"\nThe first to depart is {fault}: given the same numbers before it, the file and PyTorch differ there.")
    else:
        print(
            "\nNo layer departs: given the same numbers before it, each gives the same, but for float rounding and "
            "the ties it decides. What gathers is those, amplified."
        )


if __name__ == "__main__":
    run_command(DebugOptions, main)
