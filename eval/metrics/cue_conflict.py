"""Shape bias by the cue-conflict protocol of Geirhos et al. (arXiv 1811.12231).

Each picture has the shape of one of 16 classes and the texture of another: SHAPE/SHAPEn-TEXTUREm.png. A network of
ImageNet's 1,000 classes decides for the one of the 16 whose ImageNet classes have the largest mean probability. Shape
bias is the share of decisions for the shape among the decisions for the shape or the texture. Pictures whose shape and
texture are of the same class are left out.

The pictures are those of the authors' repository, github.com/rgeirhos/texture-vs-shape, folder
stimuli/style-transfer-preprocessed-512: 1,280, of which 1,200 are in conflict. The bundle's own preprocessing applies.
The iLLaMA paper (arXiv 2404.06773) reports 41.45%.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from eval.metrics.predictions import probabilities
from illama.data.images import decode_image
from illama.data.webdataset import Sample
from illama.errors import UserError
from illama.markdown_table import markdown
from illama.options import Exif

IMAGENET_CLASSES = 1000
_NAME = re.compile(r"([a-z]+)\d+-([a-z]+)\d+\.png")

# The authors' ImageNet classes of each of the 16, by index in the order of WordNet IDs
# (code/helper/human_categories.py).
_FINE_CLASSES = {
    "airplane": "404",
    "bear": "294-297",
    "bicycle": "444 671",
    "bird": "8 10-16 18-20 22-24 80-83 87-96 98-100 127-133 135-145",
    "boat": "472 554 625 814 914",
    "bottle": "440 720 737 898 899 901 907",
    "car": "436 511 817",
    "cat": "281-286",
    "chair": "423 559 765 857",
    "clock": "409 530 892",
    "dog": "152-191 193-203 205-226 228-241 243-250 252-257 259 261-263 265-268",
    "elephant": "385 386",
    "keyboard": "508 878",
    "knife": "499",
    "oven": "766",
    "truck": "555 569 656 675 717 734 864 867",
}


def _numbers(ranges: str) -> tuple[int, ...]:
    ends = [(part.split("-")[0], part.split("-")[-1]) for part in ranges.split()]
    return tuple(number for low, high in ends for number in range(int(low), int(high) + 1))


FINE_CLASSES = {name: _numbers(ranges) for name, ranges in _FINE_CLASSES.items()}
SHAPE_CLASSES = tuple(FINE_CLASSES)


@dataclass(frozen=True)
class ShapeBias:
    """Decisions of a network on pictures whose shape and texture are in conflict.

    Attributes:
        images: number of pictures in conflict.
        shape: number of decisions for the shape.
        texture: number of decisions for the texture; the remaining decisions are for a third class.
        by_class: the shape bias over the pictures of each shape; None where no decision is for shape or texture.
    """

    images: int
    shape: int
    texture: int
    by_class: dict[str, float | None]

    @property
    def bias(self) -> float | None:
        """Share of decisions for the shape among those for shape or texture, in [0, 1]; None if there are none."""
        return _share(self.shape, self.texture)


class Stimuli(Dataset[Sample]):
    """The cue-conflict pictures of a folder, in the order of their paths; the label of a picture is its index.

    Attributes:
        shapes: the class of each picture's shape.
        textures: the class of each picture's texture.

    Raises:
        UserError: there are no pictures, or one that does not follow the published layout.
    """

    def __init__(self, folder: Path, exif: Exif = "apply") -> None:
        self.exif = exif
        self.paths = sorted(folder.glob("*/*.png"))
        if not self.paths:
            raise UserError(f"no pictures in {folder}: expected SHAPE/SHAPEn-TEXTUREm.png, such as cat/cat7-car2.png")
        found = [(path, _NAME.fullmatch(path.name)) for path in self.paths]
        for path, match in found:
            if not match or match[1] != path.parent.name or not {match[1], match[2]} <= set(SHAPE_CLASSES):
                raise UserError(
                    f"{path} is not a cue-conflict picture: expected SHAPE/SHAPEn-TEXTUREm.png of the classes "
                    f"{', '.join(SHAPE_CLASSES)}"
                )
        self.shapes, self.textures = (tuple(match[part] for _, match in found if match) for part in (1, 2))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        path = str(self.paths[index])
        return decode_image(path, lambda: path, self.exif), index


def decide(logits: np.ndarray) -> np.ndarray:
    """Returns the decisions (images,), names of the 16 classes, for logits (images, 1000).

    Raises:
        ValueError: the logits are of another number of classes.
    """
    if logits.shape[1:] != (IMAGENET_CLASSES,):
        raise ValueError(f"decide takes logits of {IMAGENET_CLASSES} classes, not {logits.shape}")
    fine = probabilities(logits)
    coarse = np.stack([fine[:, list(places)].mean(1) for places in FINE_CLASSES.values()], axis=1)
    return np.array(SHAPE_CLASSES)[coarse.argmax(1)]


def shape_bias(decisions: np.ndarray, shapes: Sequence[str], textures: Sequence[str]) -> ShapeBias:
    """Returns the shape bias of decisions on pictures of these shapes and textures; all are (images,) class names."""
    shape, texture = np.array(shapes), np.array(textures)
    conflict = shape != texture
    for_shape, for_texture = conflict & (decisions == shape), conflict & (decisions == texture)
    by_class = {
        name: _share(int(for_shape[shape == name].sum()), int(for_texture[shape == name].sum()))
        for name in SHAPE_CLASSES
    }
    return ShapeBias(int(conflict.sum()), int(for_shape.sum()), int(for_texture.sum()), by_class)


def check_classes(names: Sequence[str], bundle: Path) -> None:
    """Checks that the classes of a bundle are ImageNet's 1,000 in the order of their WordNet IDs.

    Raises:
        UserError: the number or the order differs; the order is checked where the names are WordNet IDs.
    """
    if len(names) != IMAGENET_CLASSES:
        raise UserError(f"{bundle} has {len(names)} classes: shape bias needs a network of ImageNet's 1,000 classes")
    if all(re.fullmatch(r"n\d{8}", name) for name in names) and list(names) != sorted(names):
        raise UserError(f"the classes of {bundle} are not in the order of their WordNet IDs: give another bundle")


def _share(shape: int, texture: int) -> float | None:
    return shape / (shape + texture) if shape + texture else None


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share * 100:.2f}"


def shape_bias_tables(results: Mapping[str, ShapeBias]) -> str:
    """Returns two tables: the shape bias of each model, and of each model by shape."""
    models = [
        (
            model,
            _percent(each.bias),
            str(each.shape),
            str(each.texture),
            str(each.images - each.shape - each.texture),
            str(each.images),
        )
        for model, each in results.items()
    ]
    shapes = [(name, *(_percent(each.by_class[name]) for each in results.values())) for name in SHAPE_CLASSES]
    headings = ("model", "shape bias %", "shape", "texture", "neither", "pictures in conflict")
    return f"{markdown(headings, models)}\n\n{markdown(('shape', *results), shapes)}"
