"""Train a UperNet on an iLLaMA:

python illama/train_segmentation.py --init runs/illama-tiny --data ADEChallengeData2016
python illama/train_segmentation.py --data ADEChallengeData2016 --out runs/segmentation

It uses the trainer of illama/train.py: the same command resumes an interrupted run, and torchrun starts it on several
GPUs.
"""

from __future__ import annotations

from illama.cli import run_command
from illama.training.segmentation_options import SegmentationOptions


def main(options: SegmentationOptions) -> None:
    # Imported here, so that --help does not wait for PyTorch.
    from illama.training.finish import train
    from illama.training.segmentation_run import start_segmentation

    train(options, start_segmentation)


if __name__ == "__main__":
    run_command(SegmentationOptions, main)
