"""Bundles of a quantized segmentation network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from illama.atomic_write import write_folder
from illama.bundle import CPU_ONNX, FUSED_ONNX, GoldenImages
from illama.data.ade20k import SegmentationFolder
from illama.errors import UserError
from illama.manifest import Provenance
from illama.models.attention import MaskedNetwork
from illama.models.upernet import fold_batch_norms, load_segmentation
from illama.options import SourceOptions
from illama.progress import track
from quant.export.write_bundle import Origin, write_graphs, write_quantized
from quant.inputs import onnx_scheme, schemes_from_options
from quant.quantizers.calibrate import calibrate
from quant.schemes.scheme import QuantizationPlan, resolve

_BATCH = 4  # dense maps of a batch are large


@dataclass(frozen=True)
class SegmentationJob:
    """A segmentation network with its batch norms folded into the convolutions, and schemes and data that fit it."""

    model: MaskedNetwork
    plans: list[QuantizationPlan]
    data: SegmentationFolder
    origin: Origin
    calibration_images: int

    @cached_property
    def calibration(self) -> list[Tensor]:
        """The center crops of evenly spaced training images, in batches (B, C, H, W)."""
        count, transform = self.calibration_images, self.origin.preprocessing.transform()
        images = cast(Any, self.data.calibration(count))
        numbers = track(range(count), "read calibration images", "img")
        return list(torch.stack([transform(images[i][0]).as_subclass(Tensor) for i in numbers]).split(_BATCH))


def open_segmentation_job(
    bundle: Path, folder: Path, names: Sequence[str], calibration_images: int, golden: GoldenImages = "calibration"
) -> SegmentationJob:
    """Opens and checks everything before any work is done.

    Args:
        folder: images in ADE20K's layout.
        names: schemes by name or YAML file.
        golden: images of the golden answers.

    Raises:
        UserError: network, images and schemes do not fit each other, or one cannot be read.
    """
    checkpoint = load_segmentation(bundle)
    model, preprocessing = fold_batch_norms(checkpoint.model), checkpoint.preprocessing
    assert preprocessing is not None  # load_segmentation reads bundles only
    data = SegmentationFolder(folder, preprocessing.exif)
    if data.classes != checkpoint.classes:
        raise UserError(f"{folder} has other classes than {bundle}: they must be the same")
    plans = [resolve(scheme, model) for scheme in schemes_from_options(names, onnx_scheme)]
    source = SourceOptions(bundle, data=str(folder), calibration_images=calibration_images)
    provenance = Provenance(inputs=checkpoint.digests(), source=source)
    origin = Origin(preprocessing, data.classes, provenance, golden)
    return SegmentationJob(model, plans, data, origin, calibration_images)


def write_segmentation_bundles(job: SegmentationJob, out: Path, device: str = "cpu") -> None:
    """Writes bundles of the float references and of every scheme into ``out``, each atomically.

    Args:
        device: where to calibrate, "cpu" or "cuda".
    """
    batches = job.calibration
    for name, file in (("fp32", CPU_ONNX), ("fp16", FUSED_ONNX)):
        print(f"export {name} ...", flush=True)
        with write_folder(out / name) as draft:
            write_graphs(draft, job.model, job.origin, (file,), batches)
    for plan in job.plans:
        print(f"quantize and export {plan.scheme.name} ...", flush=True)
        with write_folder(out / plan.scheme.name) as draft:
            write_quantized(draft, calibrate(job.model, plan, batches, device), plan, job.origin, batches)
