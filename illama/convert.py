"""A bundle from a released checkpoint:

python illama/convert.py illama-tiny-in1k-75.0.pth --out runs/illama-tiny
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import tyro
from timm.data import ImageNetInfo
from torch import Tensor

from illama.atomic_write import write_folder
from illama.bundle import WEIGHTS, Manifest, command_line, sha256
from illama.checkpoints.load import Checkpoint, load_checkpoint, write_weights
from illama.cli import run_command
from illama.data.datasets import Preprocessing
from illama.errors import UserError
from illama.options import Exif


@dataclass(frozen=True)
class ConvertOptions:
    """Write a bundle from a released .pth, from bare weights, or from another bundle.

    Attributes:
        checkpoint: a released .pth, a .safetensors, or a bundle folder.
        out: the bundle's folder; an earlier bundle there is replaced.
        image_size: side length in pixels to run at: the position embedding is interpolated.
        classes: a text file with the name of one class a line, in the order of the logits. If not given: the
            checkpoint's own names, ImageNet's WordNet IDs for 1000 classes, numbers for any other count.
        exif: apply the orientation that image files declare, or ignore it as published figures did; what a bundle says
            if not given, and apply without one.
        half: store the weights in float16, at half the size; they are used in float32 all the same.
    """

    checkpoint: Annotated[Path, tyro.conf.Positional]
    out: Path
    image_size: int | None = None
    classes: Path | None = None
    exif: Exif | None = None
    half: bool = False


def class_names(file: Path | None, checkpoint: Checkpoint) -> list[str]:
    """Names in the order of the logits, see :class:`ConvertOptions`; UserError if the file's number is wrong.

    ImageNet's are its folders' names (n01440764), which is what a data set in ImageNet's layout is compared by.
    """
    count = checkpoint.model.config.num_classes
    if file is not None:
        return _read_names(file, count)
    if checkpoint.classes:
        return list(checkpoint.classes)
    if count == 1000:
        return list(ImageNetInfo().label_names())
    return [str(index) for index in range(count)]


def _read_names(file: Path, count: int) -> list[str]:
    try:
        names = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except FileNotFoundError as error:
        raise UserError(f"no class names at {file}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not a text file of class names") from error
    if len(names) != count:
        raise UserError(f"{file} names {len(names)} classes, the checkpoint has {count}")
    return names


def to_half(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict in float16; UserError for a value beyond its range of 65504."""
    half = {name: value.to(torch.float16) for name, value in state.items()}
    for name, value in half.items():
        if not torch.isfinite(value).all():
            raise UserError(f"{name} has values beyond float16: convert without --half")
    return half


def main(options: ConvertOptions) -> None:
    with write_folder(options.out) as folder:
        checkpoint = load_checkpoint(options.checkpoint, image_size=options.image_size)
        config = checkpoint.model.config
        preprocessing = checkpoint.preprocessing or Preprocessing.imagenet(config.image_size, config.in_channels)
        preprocessing = replace(preprocessing, exif=options.exif or preprocessing.exif)
        manifest = Manifest(
            made_by=command_line(),
            config=config.to_dict(),
            preprocessing=asdict(preprocessing),
            classes=class_names(options.classes, checkpoint),
            inputs={str(checkpoint.weights): sha256(checkpoint.weights)},
        )
        state = checkpoint.model.state_dict()
        write_weights(to_half(state) if options.half else state, config, folder / WEIGHTS)
        manifest.write(folder)
    print(
        f"{config.width} wide, {config.depth} blocks, {config.heads} heads, {config.image_size} pixels, "
        f"{config.num_classes} classes; bundle in {options.out}"
    )


if __name__ == "__main__":
    run_command(ConvertOptions, main)
