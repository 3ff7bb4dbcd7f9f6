"""Train a UperNet on an iLLaMA: python illama/train_segmentation.py --init runs/illama-tiny --data ADEChallengeData2016

Interrupted or killed, the same command goes on; torchrun spreads it. The trainer is that of ``illama/train.py``.
"""

from __future__ import annotations

from collections.abc import Sized
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar, TypeVar, cast

import numpy as np
import torch.nn.functional as F
import tyro
from torch import Tensor
from torch.utils.data import Dataset, Subset

from illama.atomic_write import lock_folder
from illama.bundle import Manifest
from illama.cli import run_command
from illama.data.ade20k import IGNORED, AugmentedMaps, SegmentationFolder
from illama.data.augmentation import seed_everything
from illama.data.webdataset import Sample
from illama.errors import UserError
from illama.inference import torch_infer
from illama.models.upernet import SegmentationConfig, UperNet
from illama.options import ClassOrder
from illama.segmentation_scores import Scores, score_images
from illama.train import initialise, inputs_of, model_options, write_bundle
from illama.training.distributed import Processes, processes
from illama.training.recipe import Recipe
from illama.training.schedules import SoftMaskSchedule
from illama.training.trainer import Mix, Run, fit

Value = TypeVar("Value")
# What there is of this in a classifier's recipe has no meaning here.
_NotHere = Annotated[Value, tyro.conf.Fixed, tyro.conf.Suppress]


@dataclass(frozen=True)
class SegmentationOptions(Recipe):
    """Train a UperNet, its backbone from --init, on a folder in ADE20K's layout.

    Image size, optimiser, learning rate and weight decay are the paper's. It says nothing of the rest: batch size,
    epochs and warm-up here come to the field's 160,000 steps of 16 images, 1,500 of them warm-up, on ADE20K.

    Attributes:
        data: a folder in the layout of ADEChallengeData2016 (illama/data/ade20k.py).
        init: the weights of a bundle, a .safetensors or a released .pth for the backbone; positions are resized.
        decoder_channels: width of the decoder.
    """

    out: Path = Path("runs/segmentation")
    epochs: int = 127
    batch_size: int = 16
    micro_batch: int = 4
    learning_rate: float = 6e-5
    weight_decay: float = 0.01
    warmup_epochs: float = 1.2
    soft_mask: SoftMaskSchedule = "none"
    soft_mask_epochs: float = 0
    label_smoothing: float = 0.0
    decoder_channels: int = 256
    class_order: _NotHere[ClassOrder | None] = None
    recipe: _NotHere[str] = ""
    new_head: _NotHere[bool] = True
    fsdp: _NotHere[bool] = False
    crop_padding: _NotHere[int] = 0
    rand_augment: _NotHere[str] = ""
    erasing: _NotHere[float] = 0.0
    mixup: _NotHere[float] = 0.0
    cutmix: _NotHere[float] = 0.0
    mixup_probability: _NotHere[float] = 0.0


class SegmentationRun(Run):
    """A training run of a UperNet; it is scored by sliding windows over whole images."""

    score_name: ClassVar[str] = "miou"

    def augmented(self) -> AugmentedMaps:
        return AugmentedMaps(self.images, self.preprocessing, self.recipe.seed)

    def mixer(self) -> Mix:
        return _unmixed

    def score(self, split: Dataset[Sample]) -> float:
        """mIoU in percent; the processes share the images, each counted once."""
        model = self.kept.eval()
        model.soft_mask = 0.0
        own, counted = self.processes.share(len(cast(Sized, split)))
        counts = score_images(
            {"kept": torch_infer(model)},
            Subset(split, own),
            len(self.data.classes),
            self.preprocessing,
            workers=self.recipe.workers,
            progress=self.processes.main,
        )
        own_sum = counts["kept"][:counted].sum(0)
        whole = self.processes.sum(*own_sum.ravel().tolist())
        return Scores.of(np.reshape(whole, own_sum.shape)).miou


def _unmixed(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return images, labels.long()


def map_loss(images: Tensor, logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross entropy with the smoothed labels over the pixels that belong to a class; 0 where there are none.

    Args:
        logits: (B, classes, H, W).
        targets: class indices (B, H, W).
    """
    total = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum", label_smoothing=smoothing)
    return total / (targets != IGNORED).sum().clamp(min=1)


def start_run(options: SegmentationOptions, group: Processes) -> Run:
    """Open the data, make the network, and go on from ``options.out`` if a run was interrupted there."""
    if not options.data:
        raise UserError("no images to train on: give --data (see --help)")
    data = SegmentationFolder(Path(options.data), options.exif or "apply")
    shape = {**model_options(options), "decoder_channels": options.decoder_channels}
    config = SegmentationConfig.preset(options.model, options.variant, **shape, num_classes=len(data.classes))
    seed_everything(options.seed)
    model = initialise(UperNet(config, options.drop_path, options.dropout), options)
    preprocessing = data.preprocessing(config.image_size, config.in_channels)
    loss = partial(map_loss, smoothing=options.label_smoothing)
    return SegmentationRun(options, data, preprocessing, model, group, inputs_of(options), loss)


def main(options: SegmentationOptions) -> None:
    options = replace(options, out=options.out.resolve())
    with processes() as group, lock_folder(options.out, group.main):
        run = start_run(options, group)
        fit(run)
        bundle = write_bundle(run)
    if group.main:
        metrics = Manifest.read(bundle).metrics
        print(f"mIoU {metrics['test_miou']:.2f}% on {metrics['test_images']} validation images; bundle in {bundle}")


if __name__ == "__main__":
    run_command(SegmentationOptions, main)
