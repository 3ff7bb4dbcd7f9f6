"""Converts a loaded checkpoint to a bundle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from timm.data import ImageNetInfo
from torch import Tensor

from illama.bundle import WEIGHTS
from illama.checkpoints.load import ILLaMACheckpoint, write_weights
from illama.data.preprocessing import Preprocessing
from illama.errors import UserError
from illama.manifest import Manifest, Provenance
from illama.options import Exif
from illama.structured_files import read_lines


def write_converted(
    checkpoint: ILLaMACheckpoint, classes: Sequence[str], folder: Path, exif: Exif | None = None, half: bool = False
) -> None:
    """Writes a checkpoint's manifest and weights into the folder of a bundle.

    Args:
        classes: class names in the order of the logits.
        exif: see :class:`Preprocessing`. If not given, the checkpoint's, or ``apply`` if it has none.
        half: whether weights are stored in float16; raises UserError for a value outside its range.
    """
    config = checkpoint.model.config
    preprocessing = checkpoint.preprocessing or Preprocessing.imagenet(config.image_size, config.in_channels)
    preprocessing = replace(preprocessing, exif=exif or preprocessing.exif)
    provenance = Provenance(inputs=checkpoint.digests())
    manifest = Manifest(config.kind, config.to_dict(), preprocessing, tuple(classes), provenance)
    state = checkpoint.model.state_dict()
    write_weights(to_half(state) if half else state, config, folder / WEIGHTS)
    manifest.write(folder)


def class_names(file: Path | None, checkpoint: ILLaMACheckpoint) -> list[str]:
    """Returns the class names in the order of the logits.

    They are the lines of ``file``. If it is not given, they are the checkpoint's own names, ImageNet's WordNet IDs for
    1000 classes (such as n01440764, the folder names in ImageNet's layout), or numbers.

    Raises:
        UserError: the file cannot be read, or does not have a name for each class.
    """
    count = checkpoint.model.config.num_classes
    if file is not None:
        names = read_lines(file)
        if len(names) != count:
            raise UserError(f"{file} names {len(names)} classes, the checkpoint has {count}")
        return names
    if checkpoint.classes:
        return list(checkpoint.classes)
    if count == 1000:
        return list(ImageNetInfo().label_names())
    return [str(index) for index in range(count)]


def to_half(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns a state dict in float16; raises UserError for a value outside its range of +-65504."""
    half = {name: value.to(torch.float16) for name, value in state.items()}
    for name, value in half.items():
        if not torch.isfinite(value).all():
            raise UserError(f"{name} has values beyond float16: convert without --half")
    return half
