"""mIoU of segmentation networks side by side: python eval/segmentation.py runs/ptq-segmentation/* --data FOLDER

Of every ONNX file in the bundles, over the whole validation split, by ONNX Runtime on the CPU; the first bundle with a
``model.onnx`` is what the drops are against.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from deploy.runtimes.open_engine import OnnxRuntimeEngine
from eval.metrics.accuracy_drop import Drop
from eval.report.store import write_results
from illama.atomic_write import make_out
from illama.bundle import CPU_ONNX, FUSED_ONNX, Manifest
from illama.checkpoints.load import read_preprocessing
from illama.cli import run_command
from illama.data.ade20k import SegmentationFolder
from illama.data.datasets import Preprocessing
from illama.errors import UserError
from illama.markdown_table import markdown
from illama.segmentation_scores import Scores, Views, class_ious, score_images

HEADINGS = ("file", "mIoU %", "drop (95% interval)", "aAcc %", "mAcc %", "file MB")


@dataclass(frozen=True)
class SegmentationEvalOptions:
    """Score every ONNX file of the bundles by mIoU on a folder in ADE20K's layout.

    Attributes:
        bundles: what python quant/ptq_segmentation.py wrote; the first with a model.onnx is the reference.
        data: the folder; its validation images are used.
        scales: judge each image at these times its size, and average.
        flip: mirrored too.
        overlap: of neighbouring windows, as a share of a window's side.
        out: also write the result there, as JSON (.json is added to the name) and as a table (.md).
        seed: of the bootstrap.
    """

    bundles: Annotated[tuple[Path, ...], tyro.conf.Positional]
    data: Path
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    overlap: float = 1 / 3
    out: Path | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.bundles:
            raise UserError("give at least one bundle that python quant/ptq_segmentation.py wrote")
        if self.seed < 0:
            raise UserError(f"--seed must be 0 or more, not {self.seed}")


@dataclass(frozen=True)
class Row:
    """One file and what was measured of it; ``drop`` is in points of mIoU against the first row's."""

    file: str
    scores: Scores
    drop: Drop
    megabytes: float

    def cells(self, is_reference: bool) -> tuple[str, ...]:
        """The row as text, in the order of HEADINGS."""
        drop, scores = self.drop, self.scores
        interval = f"{drop.points:+.2f} ({drop.low:+.2f} to {drop.high:+.2f})"
        percents = (f"{value:.2f}" for value in (scores.pixel_accuracy, scores.mean_accuracy, self.megabytes))
        return (self.file, f"{scores.miou:.2f}", "reference" if is_reference else interval, *percents)


def miou_drop(reference: np.ndarray, other: np.ndarray, seed: int = 0, resamples: int = 2000) -> Drop:
    """The drop in points of mIoU from one model to another, with a percentile interval from a paired bootstrap.

    Args:
        reference, other: counts (n, 3, classes) of the same n images (:func:`illama.segmentation_scores.count`).
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


def run_benchmark(
    bundles: Sequence[Path], data: SegmentationFolder, preprocessing: Preprocessing, views: Views, seed: int
) -> list[Row]:
    """A row for every ONNX file of the bundles, those for CPUs first."""
    paths = [bundle / name for name in (CPU_ONNX, FUSED_ONNX) for bundle in bundles if (bundle / name).exists()]
    if not paths:
        raise UserError(f"no {CPU_ONNX} in {bundles[0]}: make bundles with python quant/ptq_segmentation.py")
    models = {str(path): OnnxRuntimeEngine(path).infer for path in paths}
    counts = score_images(models, data.test(), len(data.classes), preprocessing, views)
    reference = counts[str(paths[0])]
    rows = []
    for path in paths:
        own = counts[str(path)]
        drop, megabytes = miou_drop(reference, own, seed), path.stat().st_size / 1e6
        rows.append(Row(f"{path.parent.name}/{path.name}", Scores.of(own.sum(0)), drop, megabytes))
    return rows


def markdown_table(rows: Sequence[Row]) -> str:
    """The rows in Markdown."""
    return markdown(HEADINGS, (row.cells(row is rows[0]) for row in rows))


def main(options: SegmentationEvalOptions) -> None:
    views = Views(options.scales, options.flip, options.overlap)
    manifests = [Manifest.read(bundle) for bundle in options.bundles]
    kinds = [read_preprocessing(manifest) for manifest in manifests]
    data = SegmentationFolder(options.data, kinds[0].exif)
    for bundle, manifest, kind in zip(options.bundles, manifests, kinds, strict=True):
        if kind != kinds[0] or tuple(manifest.classes) != data.classes:
            raise UserError(f"{bundle} does not have the classes of {options.data} or the first bundle's preprocessing")
    if options.out:
        make_out(options.out.parent)
    rows = run_benchmark(options.bundles, data, kinds[0], views, options.seed)
    table = markdown_table(rows)
    if options.out is None:
        print(table)
    else:
        facts = {
            "images": len(data.test()),  # type: ignore[arg-type]
            "views": asdict(views),
            "classes": data.classes,
            "rows": [asdict(row) for row in rows],
        }
        write_results(options.out.parent, options.out.name, facts, table)


if __name__ == "__main__":
    run_command(SegmentationEvalOptions, main)
