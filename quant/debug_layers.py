"""Find mismatches between an exported file and its PyTorch network, layer by layer:

python quant/debug_layers.py runs/ptq/int8
python quant/debug_layers.py runs/ptq/int8 --images 8

The first two columns are SQNR in dB and normally fall, because errors accumulate. The third column compares each layer
given the file's own inputs, so it locates a fault: see quant/export/verify.py.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from illama.cli import run_command
from illama.bundle import CPU_ONNX
from illama.errors import check_exists
from illama.options import DATA_FORMS, Count, Existing
from quant.schemes.shipped import SchemeName


@dataclass(frozen=True)
class DebugOptions:
    """Compare FP32 PyTorch, quantized PyTorch and the exported file layer by layer, and name the first mismatch.

    Calibration is repeated, which gives the same network; the network of `python quant/qat.py` is read from the
    bundle. Options that are not given are read from the bundle's manifest.

    Attributes:
        bundle: path to a bundle with a model.onnx; if not given, --scheme is exported for the comparison.
        scheme: name of a shipped scheme, or path to a YAML file; defaults to the bundle's own.
        checkpoint: path to the checkpoint that the bundle was made from.
        model: timm:NAME for the checkpoint of a timm ViT; the architecture of an iLLaMA is read from the checkpoint.
        data: the data set.
        calibration_images: number of training images for calibration.
        images: number of test images to compare.
    """

    bundle: Annotated[Path | None, tyro.conf.Positional] = None
    scheme: SchemeName | None = None
    checkpoint: Existing | None = None
    model: str | None = None
    data: Annotated[str | None, tyro.conf.arg(help=DATA_FORMS)] = None
    calibration_images: Count | None = None
    images: Count = 8


def main(options: DebugOptions) -> None:
    # Imported here, so that --help does not wait for PyTorch.
    import numpy as np

    from quant.export.onnx_export import export_onnx
    from quant.export.open_quantized import bundle_scheme, open_quantized, open_source
    from quant.export.verify import accumulated_sqnr, compare_with_trace, first_mismatch, print_differences, trace_onnx
    from quant.mixed_precision.image_selection import split_images

    bundle, names = options.bundle, ("checkpoint", "model", "data", "calibration_images")
    inputs = open_source(bundle, {name: getattr(options, name) for name in names})
    scheme = bundle_scheme(bundle, options.scheme)
    reference, quantized = inputs.float_model(scheme), open_quantized(bundle, inputs, scheme)
    pool = split_images(inputs.data, "test", inputs.calibration_images, options.images)
    images = np.concatenate([batch.numpy() for batch, _ in inputs.batches(pool)])
    with tempfile.TemporaryDirectory() as folder:
        path = (bundle or Path(folder)) / CPU_ONNX
        if bundle is None:
            print(f"export {scheme.name} ...", flush=True)
            export_onnx(quantized, path, "plain")
        trace = trace_onnx(check_exists(path), images, quantized)
    differences = compare_with_trace(quantized, trace, images)
    print_differences(differences, accumulated_sqnr(reference, quantized, trace, images))
    if mismatch := first_mismatch(differences):
        print(f"\nThe first mismatch is in {mismatch}: given the same inputs, the file and PyTorch differ there.")
    else:
        print(
            "\nNo mismatch: given the same inputs, each layer gives the same outputs up to rounding and ties. "
            "The accumulated errors come from these small differences."
        )


if __name__ == "__main__":
    run_command(DebugOptions, main)
