"""Write a bundle from a checkpoint:

python illama/convert.py illama-tiny-in1k-75.0.pth --out runs/illama-tiny
python illama/convert.py vit_small.pth --classes imagenet-classes.txt --out runs/vit-small
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from illama.cli import run_command
from illama.options import Exif, ImageSize


@dataclass(frozen=True)
class ConvertOptions:
    """Write a bundle from a released .pth file, a .safetensors file, or another bundle.

    Attributes:
        checkpoint: path to a released .pth file, a .safetensors file, or a bundle.
        out: path to the new bundle; an existing bundle there is replaced.
        image_size: side length of the input in pixels; position embeddings are interpolated. If not given, the
            checkpoint's own.
        classes: path to a text file with one class name per line, in the order of the logits. If not given, the
            checkpoint's own names, ImageNet's WordNet IDs for 1000 classes, or numbers for any other count.
        exif: whether to apply the orientation that image files declare or to ignore it, as published results did. If
            not given, the bundle's setting, or apply for other files.
        half: store the weights in float16, at half the size; they are loaded as float32.
    """

    checkpoint: Annotated[Path, tyro.conf.Positional]
    out: Path
    image_size: ImageSize | None = None
    classes: Path | None = None
    exif: Exif | None = None
    half: bool = False


def main(options: ConvertOptions) -> None:
    # Imported here, so that --help does not wait for PyTorch.
    from illama.atomic_write import write_folder
    from illama.checkpoints.conversion import class_names, write_converted
    from illama.checkpoints.load import load_checkpoint

    with write_folder(options.out) as folder:
        checkpoint = load_checkpoint(options.checkpoint, image_size=options.image_size)
        classes = class_names(options.classes, checkpoint)
        write_converted(checkpoint, classes, folder, options.exif, options.half)
    config = checkpoint.model.config
    print(
        f"{config.width} wide, {config.depth} blocks, {config.heads} heads, {config.image_size} pixels, "
        f"{config.num_classes} classes; bundle in {options.out}"
    )


if __name__ == "__main__":
    run_command(ConvertOptions, main)
