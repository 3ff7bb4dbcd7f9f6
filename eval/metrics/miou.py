"""mIoU of the ONNX files of segmentation bundles, and the drop of each against the first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from deploy.runtimes.onnxruntime_engine import OnnxRuntimeEngine
from illama.bundle import CPU_ONNX, FUSED_ONNX, size_of
from illama.data.ade20k import SegmentationFolder
from illama.data.preprocessing import Preprocessing
from illama.errors import UserError
from illama.manifest import Drop, Manifest
from illama.markdown_table import markdown
from illama.segmentation_scores import Scores, Views, class_ious, predict_map, score_images

HEADINGS = ("file", "mIoU %", "drop (95% interval)", "aAcc %", "mAcc %", "file MB")


@dataclass(frozen=True)
class FileScores:
    """Scores of one ONNX file; ``drop`` is in points of mIoU against the first file."""

    file: str
    scores: Scores
    drop: Drop
    megabytes: float

    def cells(self, is_reference: bool) -> tuple[str, ...]:
        """Returns the cells of the table's row, in the order of ``HEADINGS``."""
        scores, drop = self.scores, "reference" if is_reference else str(self.drop)
        others = (f"{value:.2f}" for value in (scores.pixel_accuracy, scores.mean_accuracy, self.megabytes))
        return (self.file, f"{scores.miou:.2f}", drop, *others)


def open_segmentation_data(folder: Path, bundles: Sequence[Path]) -> tuple[SegmentationFolder, Preprocessing]:
    """Opens the data, read as the bundles' preprocessing says; returns it with the preprocessing.

    Raises:
        UserError: a bundle has other classes than the data, or another preprocessing than the first bundle.
    """
    manifests = [Manifest.read(bundle) for bundle in bundles]
    preprocessing = manifests[0].preprocessing
    data = SegmentationFolder(folder, preprocessing.exif)
    for bundle, manifest in zip(bundles, manifests, strict=True):
        if manifest.preprocessing != preprocessing or manifest.classes != data.classes:
            raise UserError(
                f"{bundle} has other classes than {folder} or another preprocessing than {bundles[0]}: leave it out"
            )
    return data, preprocessing


def miou_drop(reference: np.ndarray, other: np.ndarray, seed: int = 0, resamples: int = 2000) -> Drop:
    """Returns the drop in points of mIoU from a reference to another model, with a 95% paired bootstrap interval.

    Args:
        reference: counts (n, 3, classes) of n images (:func:`illama.segmentation_scores.count`).
        other: the other model's counts of the same images.
    """
    images = len(reference)
    draws = np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images), size=resamples)

    def mious(counts: np.ndarray, weights: np.ndarray) -> Any:
        sums = np.tensordot(weights.astype(np.float64), counts.astype(np.float64), axes=1)
        return np.nanmean(class_ious(sums), axis=-1)

    drops = mious(reference, draws) - mious(other, draws)
    points = float(np.subtract(*(mious(counts, np.ones(images)) for counts in (reference, other))))
    low, high = np.percentile(drops, [2.5, 97.5])
    return Drop(points, float(low), float(high))


def measure_miou(
    bundles: Sequence[Path], data: SegmentationFolder, preprocessing: Preprocessing, views: Views, seed: int
) -> list[FileScores]:
    """Returns the scores of every ONNX file of the bundles; the files for CPUs come first.

    Raises:
        UserError: the bundles have no ONNX file.
    """
    paths = [bundle / name for name in (CPU_ONNX, FUSED_ONNX) for bundle in bundles if (bundle / name).exists()]
    if not paths:
        raise UserError(f"no {CPU_ONNX} in {bundles[0]}: run python quant/ptq_segmentation.py first")
    models = {str(path): OnnxRuntimeEngine(path).infer for path in paths}
    counts = score_images(
        models, data.test(), len(data.classes), partial(predict_map, preprocessing=preprocessing, views=views)
    )
    reference = counts[str(paths[0])]
    rows = []
    for path in paths:
        own = counts[str(path)]
        drop, megabytes = miou_drop(reference, own, seed), size_of(path) / 1e6
        rows.append(FileScores(f"{path.parent.name}/{path.name}", Scores.of(own.sum(0)), drop, megabytes))
    return rows


def miou_table(rows: Sequence[FileScores]) -> str:
    """Returns the scores as a Markdown table."""
    return markdown(HEADINGS, (row.cells(row is rows[0]) for row in rows))
