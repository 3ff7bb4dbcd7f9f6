"""Quantize a trained UperNet after training: python quant/ptq_segmentation.py runs/segmentation/bundle --data FOLDER

A bundle for each scheme beside the float references, as ``python quant/ptq.py`` has them for classifiers. Then
``python eval/segmentation.py`` compares them, and ``python deploy/build.py`` builds their engines.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from illama.atomic_write import make_out, write_folder
from illama.bundle import CPU_ONNX, FUSED_ONNX, SCHEME, sha256
from illama.cli import run_command
from illama.data.ade20k import SegmentationFolder
from illama.data.datasets import Preprocessing
from illama.errors import UserError
from illama.models.upernet import fold_batch_norms, load_segmentation
from quant.export.write_bundle import Origin, write_graphs, write_quantized
from quant.inputs import check_names, scheme_named
from quant.quantizers.calibrate import calibrate
from quant.schemes.scheme import resolve, write_scheme

_BATCH = 4  # dense maps of a batch are large


@dataclass(frozen=True)
class PtqSegmentationOptions:
    """Calibrate and export a segmentation network, its batch norms folded into the convolutions.

    Attributes:
        bundle: what python illama/train_segmentation.py wrote.
        data: a folder in ADE20K's layout; ranges are taken from its training images.
        schemes: any of those that python quant/schemes/scheme.py lists for ONNX, or YAML files of your own.
        calibration_images: how many, evenly spaced over the training split.
        out: where the bundles go, each under its scheme's name; earlier ones of these names are replaced.
    """

    bundle: Annotated[Path, tyro.conf.Positional]
    data: Path
    schemes: tuple[str, ...] = ("int8", "fp8")
    calibration_images: int = 64
    out: Path = Path("runs/ptq-segmentation")


def calibration_batches(data: SegmentationFolder, count: int, preprocessing: Preprocessing) -> list[Tensor]:
    """The centre of evenly spaced training images, in batches (B, C, H, W)."""
    images, transform = cast(Any, data.calibration(count)), preprocessing.transform()
    inputs = [transform(images[i][0]).as_subclass(Tensor) for i in tqdm(range(count), "read", unit="img", leave=False)]
    return list(torch.stack(inputs).split(_BATCH))


def main(options: PtqSegmentationOptions) -> None:
    checkpoint = load_segmentation(options.bundle)
    model, preprocessing = fold_batch_norms(checkpoint.model), checkpoint.preprocessing
    assert preprocessing is not None  # load_segmentation reads bundles alone
    data = SegmentationFolder(options.data, preprocessing.exif)
    if data.classes != checkpoint.classes:
        raise UserError(f"{options.data} has other classes than {options.bundle}: they must be the same")
    schemes = [scheme_named(name) for name in dict.fromkeys(options.schemes)]
    check_names(schemes)
    for scheme in schemes:
        resolve(scheme, model)
    source = {
        "checkpoint": str(options.bundle),
        "data": str(options.data),
        "calibration_images": options.calibration_images,
    }
    origin = Origin(preprocessing, data.classes, {str(checkpoint.weights): sha256(checkpoint.weights)}, source)
    make_out(options.out)
    batches = calibration_batches(data, options.calibration_images, preprocessing)
    for name, file in (("fp32", CPU_ONNX), ("fp16", FUSED_ONNX)):
        print(f"export {name} ...", flush=True)
        with write_folder(options.out / name) as draft:
            write_graphs(draft, model, origin, (file,), {})
    for scheme in schemes:
        print(f"quantize and export {scheme.name} ...", flush=True)
        with write_folder(options.out / scheme.name) as draft:
            write_quantized(draft, model, calibrate(model, scheme, batches), scheme, origin, {})
            write_scheme(scheme, draft / SCHEME)
    print(f"bundles in {options.out}; compare them with python eval/segmentation.py {options.out}/*")


if __name__ == "__main__":
    run_command(PtqSegmentationOptions, main)
