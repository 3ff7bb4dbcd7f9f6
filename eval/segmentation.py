"""mIoU of segmentation networks:

python eval/segmentation.py runs/ptq-segmentation/* --data FOLDER
python eval/segmentation.py runs/ptq-segmentation/int8 --data FOLDER --out runs/miou

Runs every ONNX file of the bundles in ONNX Runtime on the CPU, over the whole validation split. The first bundle with a
``model.onnx`` is the reference of the drops.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro

from illama.cli import run_command
from illama.errors import UserError
from illama.options import Existing, Positive, Seed


@dataclass(frozen=True)
class SegmentationEvalOptions:
    """Measure the mIoU of every ONNX file of the bundles, on a folder in ADE20K's layout.

    Prints a table, and writes it to OUT.md and OUT.json if --out is given.

    Attributes:
        bundles: bundles of python quant/ptq_segmentation.py; the first with a model.onnx is the reference.
        data: folder of images and annotations; its validation images are used.
        scales: evaluate each image at these multiples of its size, and average the probabilities.
        flip: average with the predictions of the mirrored images.
        overlap: overlap of neighboring windows, as a share of a window's side.
        out: path of the results, written as JSON (.json is added) and as a table (.md is added); none if not given.
        seed: random seed of the bootstrap.
    """

    bundles: Annotated[tuple[Existing, ...], tyro.conf.Positional]
    data: Path
    scales: tuple[Positive, ...] = (1.0,)
    flip: bool = False
    overlap: float = 1 / 3
    out: Path | None = None
    seed: Seed = 0

    def __post_init__(self) -> None:
        if not self.bundles:
            raise UserError("no bundles given: give at least one that python quant/ptq_segmentation.py wrote")


def main(options: SegmentationEvalOptions) -> None:
    # Imported here, so that --help does not wait for PyTorch.
    from eval.metrics.miou import measure_miou, miou_table, open_segmentation_data
    from eval.report.store import write_results
    from illama.atomic_write import make_out
    from illama.segmentation_scores import Views

    views = Views(options.scales, options.flip, options.overlap)
    data, preprocessing = open_segmentation_data(options.data, options.bundles)
    if options.out:
        make_out(options.out.parent)
    rows = measure_miou(options.bundles, data, preprocessing, views, options.seed)
    if options.out is None:
        print(miou_table(rows))
        return
    facts = {
        "images": len(data.test()),  # type: ignore[arg-type]
        "views": asdict(views),
        "classes": data.classes,
        "rows": [asdict(row) for row in rows],
    }
    write_results(options.out.parent, options.out.name, facts, miou_table(rows))


if __name__ == "__main__":
    run_command(SegmentationEvalOptions, main)
