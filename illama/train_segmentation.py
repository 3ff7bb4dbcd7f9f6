"""Train a UperNet on an iLLaMA:

python illama/train_segmentation.py --init runs/illama-tiny --data ADEChallengeData2016
python illama/train_segmentation.py --data ADEChallengeData2016 --out runs/segmentation

It uses the trainer of illama/train.py: the same command resumes an interrupted run, and torchrun starts it on several
GPUs.
"""

from __future__ import annotations

import os
from dataclasses import replace

from illama.cli import run_command
from illama.training.segmentation_options import SegmentationOptions


def main(options: SegmentationOptions) -> None:
    # Imported here, so that --help does not wait for PyTorch.
    from illama.atomic_write import lock_folder
    from illama.manifest import TRAINED, Manifest
    from illama.training.distributed import processes
    from illama.training.finish import write_bundle
    from illama.training.segmentation_run import start_segmentation
    from illama.training.trainer import fit

    options = replace(options, out=options.out.resolve())
    with processes() as group, lock_folder(options.out, group.main):
        run = start_segmentation(options, group)
        fit(run)
        bundle = write_bundle(run)
    if group.main:
        scores = Manifest.read(bundle).scores
        assert scores is not None  # write_bundle evaluates
        where = os.path.relpath(bundle)
        print(f"mIoU {scores.values[TRAINED]:.2f}% on {scores.images} validation images; bundle in {where}")


if __name__ == "__main__":
    run_command(SegmentationOptions, main)
