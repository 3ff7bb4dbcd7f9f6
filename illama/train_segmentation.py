"""Train a UperNet on an iLLaMA: python illama/train_segmentation.py --init runs/illama-tiny --data ADEChallengeData2016

It uses the trainer of illama/train.py: the same command resumes an interrupted run, and torchrun starts it on several
GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, TypeVar

import tyro

from illama.cli import run_command
from illama.options import BatchSize, ClassOrder, Count, Fraction, NotNegative
from illama.training.recipe import Recipe
from illama.training.schedules import SoftMaskSchedule

Value = TypeVar("Value")
# An option of a classifier's recipe that does not apply to segmentation.
_NotApplicable = Annotated[Value, tyro.conf.Fixed, tyro.conf.Suppress]


@dataclass(frozen=True)
class SegmentationOptions(Recipe):
    """Train a UperNet, whose backbone is initialized from --init, on a folder in ADE20K's layout.

    Image size, optimizer, learning rate and weight decay are the paper's. The paper gives no batch size, epochs or
    warm-up: those here amount to the usual 160,000 steps of 16 images, of which 1,500 are warm-up, on ADE20K.

    Attributes:
        data: path to a folder in the layout of ADEChallengeData2016 (illama/data/ade20k.py).
        init: initial weights of the backbone: a bundle, a .safetensors file or a released .pth file; position
            embeddings are resized.
        decoder_channels: number of channels of every feature map in the decoder.
    """

    out: Path = Path("runs/segmentation")
    epochs: Count = 127
    batch_size: Count = 16
    micro_batch: BatchSize = 4
    learning_rate: NotNegative = 6e-5
    weight_decay: NotNegative = 0.01
    warmup_epochs: NotNegative = 1.2
    soft_mask: SoftMaskSchedule = "none"
    soft_mask_epochs: NotNegative = 0
    label_smoothing: Fraction = 0.0
    decoder_channels: Count = 256
    class_order: _NotApplicable[ClassOrder | None] = None
    recipe: _NotApplicable[str] = ""
    new_head: _NotApplicable[bool] = True
    fsdp: _NotApplicable[bool] = False
    crop_padding: _NotApplicable[int] = 0
    rand_augment: _NotApplicable[str] = ""
    erasing: _NotApplicable[float] = 0.0
    mixup: _NotApplicable[float] = 0.0
    cutmix: _NotApplicable[float] = 0.0
    mixup_probability: _NotApplicable[float] = 0.0


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
        run = start_segmentation(options, options.decoder_channels, group)
        fit(run)
        bundle = write_bundle(run)
    if group.main:
        scores = Manifest.read(bundle).scores
        assert scores is not None  # write_bundle evaluates
        print(f"mIoU {scores.values[TRAINED]:.2f}% on {scores.images} validation images; bundle in {bundle}")


if __name__ == "__main__":
    run_command(SegmentationOptions, main)
