"""Where an exported file departs from the PyTorch network it was made of, layer by layer:

python quant/debug_layers.py runs/ptq/int8

The first two columns are what has gathered since the images, and fall from layer to layer by nature; the third feeds
each layer with the file's own numbers, and names the fault. quant/compare.py explains.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from illama.bundle import CPU_ONNX, Manifest
from illama.checkpoint import SHIPPED
from illama.errors import UserError, run_command
from illama.masks import SoftMasked
from quant.calibrate import calibrate
from quant.compare import (
    Difference,
    accumulated_sqnr,
    compare_with_trace,
    first_departure,
    observable_layers,
    trace_onnx,
)
from quant.export import export_onnx
from quant.inputs import Inputs, open_inputs, scheme_named
from quant.layerwise import selection_images
from quant.schemes import Scheme


@dataclass(frozen=True)
class DebugOptions:
    """Compare FP32 PyTorch, quantized PyTorch and the exported file, layer by layer, and name the first fault.

    The quantized network is calibrated again, which gives the same one. What an option leaves out is taken from the
    bundle, or from the summary.json beside it, as `python quant/ptq.py` wrote them.

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


@dataclass(frozen=True)
class _Made:
    """How the bundle came to be."""

    scheme: str
    checkpoint: Path
    model: str | None
    data: str
    calibration_images: int


def _made(options: DebugOptions) -> _Made:
    """The options, completed from what lies in and beside the bundle, and by the defaults of ptq.py."""
    summary: dict[str, Any] = {}
    scheme = options.scheme
    if options.bundle:
        Manifest.read(options.bundle)  # so that a folder that is none is said to be none
        path = options.bundle.resolve().parent / "summary.json"
        try:
            summary = json.loads(path.read_text()) if path.exists() else {}
        except ValueError as error:
            raise UserError(f"{path} is damaged: make the bundles again") from error
        own = options.bundle / "scheme.yaml"
        scheme = scheme or (str(own) if own.exists() else options.bundle.resolve().name)
    return _Made(
        scheme or "int8",
        options.checkpoint or Path(summary.get("checkpoint", SHIPPED)),
        options.model or summary.get("model"),
        options.data or summary.get("data", "fashion-mnist"),
        options.calibration_images or summary.get("calibration_images", 512),
    )


def rebuild(made: _Made) -> tuple[Inputs, SoftMasked, SoftMasked]:
    """The images, the float network and the quantized one, as ``python quant/ptq.py`` made them."""
    scheme = Scheme("float") if made.scheme in ("fp32", "float") else scheme_named(made.scheme)
    inputs = open_inputs(made.checkpoint, made.data, made.calibration_images, made.model)
    return inputs, inputs.float_model(scheme), calibrate(inputs.model, scheme, inputs.calibration)


def print_table(differences: dict[str, Difference], sqnr: dict[str, tuple[float, float]]) -> None:
    """One line a tensor, in the order in which they are computed."""
    print(f"{'':30} {'gathered since the images, dB':>32}")
    print(f"{'tensor':30} {'by quantization':>16} {'by export':>15} {'locally':>22}")
    for name, difference in differences.items():
        columns = [f"{value:.1f}" if np.isfinite(value) else "-" for value in sqnr.get(name, (np.inf, np.inf))]
        mark = "  <- departs" if difference.departs else ""
        print(f"{name:30} {columns[0]:>16} {columns[1]:>15} {difference!s:>22}{mark}")


def main(options: DebugOptions) -> None:
    made = _made(options)
    inputs, reference, quantized = rebuild(made)
    pool = selection_images(inputs.data, made.calibration_images, options.images)
    images = np.concatenate([batch.numpy() for batch, _ in inputs.batches(pool)])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / CPU_ONNX if options.bundle is None else options.bundle / CPU_ONNX
        if options.bundle is None:
            print(f"export {made.scheme} ...", flush=True)
            export_onnx(quantized, path, "plain")
        if not path.exists():
            raise UserError(f"{options.bundle} has no {CPU_ONNX}: it is the file that can be run and compared here")
        trace = trace_onnx(path, images, observable_layers(quantized))
    differences = compare_with_trace(quantized, trace, images)
    print_table(differences, accumulated_sqnr(reference, quantized, trace, images))
    fault = first_departure(differences)
    if fault:
        print(f"\nThe first to depart is {fault}: given the same numbers before it, the file and PyTorch differ there.")
    else:
        print("\nNo layer departs: given the same numbers before it, each gives the same, but for float rounding and "
              "the ties it decides. What gathers is those, amplified.")  # fmt: skip


if __name__ == "__main__":
    run_command(DebugOptions, main)
