"""Draw a small segmentation data set in ADE20K's layout: python benchmarks/draw_shapes.py runs/shapes

It shows rectangles, discs and rings of random colors on noise. The class of a pixel depends on the shape around it, and
on its color only with --coloured. The edge of a shape belongs to no class. The same options draw the same images.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from PIL import Image

from illama.cli import run_command
from illama.atomic_write import write_folder

CLASSES = ("background", "rectangle", "disc", "ring")
_COLORS = {2: (220, 60, 60), 3: (60, 60, 220), 4: (60, 220, 60)}


@dataclass(frozen=True)
class DrawOptions:
    """Draw images of shapes and their label maps.

    Attributes:
        out: path to the new folder, which must not exist or be empty.
        train: number of training images.
        validation: number of validation images.
        side: height in pixels; the width is one to two times that.
        coloured: share of the shapes that have the color of their class instead of a random one.
        seed: seed of the drawing.
    """

    out: Annotated[Path, tyro.conf.Positional]
    train: int = 512
    validation: int = 128
    side: int = 64
    coloured: float = 0.0
    seed: int = 0


def draw(generator: np.random.Generator, height: int, width: int, coloured: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns an image (H, W, 3) and its labels (H, W), both uint8; label 0 means no class, 1 the background."""
    pixels = generator.normal(128, 25, (height, width, 3))
    labels = np.ones((height, width), np.uint8)
    rows, columns = np.mgrid[:height, :width]
    for _ in range(generator.integers(2, 5)):
        size, kind = generator.uniform(0.12, 0.3) * height, int(generator.integers(2, 5))
        y, x = generator.uniform(0, height), generator.uniform(0, width)
        square = np.maximum(abs(rows - y), abs(columns - x))
        far = square if kind == 2 else np.hypot(rows - y, columns - x)
        hole = size / 2 if kind == 4 else -1.0
        inside = (far < size) & (far >= hole)
        labels[(far < size + 1) & (far >= hole - 1)] = 0
        labels[inside] = kind
        color = _COLORS[kind] if generator.uniform() < coloured else generator.uniform(0, 255, 3)
        pixels[inside] = generator.normal(0, 12, (np.count_nonzero(inside), 3)) + color
    return pixels.clip(0, 255).astype(np.uint8), labels


def write_shapes(folder: Path, options: DrawOptions) -> None:
    """Writes the data set into an empty folder."""
    generator, side = np.random.default_rng(options.seed), options.side
    rows = ["Idx\tRatio\tTrain\tVal\tStuff\tName", *(f"{i}\t0\t0\t0\t0\t{name}" for i, name in enumerate(CLASSES, 1))]
    (folder / "objectInfo150.txt").write_text("\n".join(rows) + "\n")
    for split, count in (("training", options.train), ("validation", options.validation)):
        images, maps = folder / "images" / split, folder / "annotations" / split
        images.mkdir(parents=True)
        maps.mkdir(parents=True)
        for index in range(count):
            pixels, labels = draw(generator, side, int(generator.integers(side, 2 * side)), options.coloured)
            Image.fromarray(pixels).save(images / f"{index:04}.jpg", quality=95)
            Image.fromarray(labels).save(maps / f"{index:04}.png")


def main(options: DrawOptions) -> None:
    with write_folder(options.out, is_ours=lambda folder: False) as folder:
        write_shapes(folder, options)


if __name__ == "__main__":
    run_command(DrawOptions, main)
