"""Whether a network goes by shape or by texture where the two disagree: python eval/shape_bias.py BUNDLE --stimuli DIR

The cue-conflict protocol of Geirhos et al. (arXiv 1811.12231): pictures with the shape of one of 16 classes and the
texture of another, SHAPE/SHAPEn-TEXTUREm.png. A network of ImageNet's 1,000 classes decides for the one of the 16
whose fine classes have the largest mean probability. Shape bias is the share of decisions for the shape among those
for the shape or the texture; pictures whose shape and texture are of one class say nothing and are left out.

The pictures are those of the authors' repository, github.com/rgeirhos/texture-vs-shape, folder
stimuli/style-transfer-preprocessed-512: 1,280, of which 1,200 are in conflict. They go through the bundle's own
preprocessing. The iLLaMA paper (arXiv 2404.06773) reports 41.45%.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from torch.utils.data import Dataset

from eval.benchmark.open_bundles import open_bundles, predict_checked
from eval.metrics.predictions import probabilities
from eval.report.store import write_results
from illama.cli import run_command
from illama.data.images import decode_image
from illama.data.webdataset import Sample
from illama.errors import UserError
from illama.markdown_table import markdown
from illama.options import Exif

_NAME = re.compile(r"([a-z]+)\d+-([a-z]+)\d+\.png")
RESULTS = "shape-bias"
IMAGENET_CLASSES = 1000

# The authors' ImageNet classes of each, by their place in the order of WordNet IDs (code/helper/human_categories.py).
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
class ShapeBiasOptions:
    """Measure the shape bias of networks trained on ImageNet-1k.

    Attributes:
        bundles: of python quant/ptq.py, with ImageNet's 1,000 classes in the order of their WordNet IDs.
        stimuli: the folder with the 16 folders of cue-conflict pictures.
        out: folder for the results.
    """

    bundles: Annotated[tuple[Path, ...], tyro.conf.Positional]
    stimuli: Path
    out: Path = Path("runs/shape-bias")


@dataclass(frozen=True)
class ShapeBias:
    """What a network decides where shape and texture are in conflict.

    Attributes:
        images: in conflict.
        shape, texture: decisions for each; the rest are for a third class.
        by_class: the bias over the pictures of each shape, None where no decision is for either.
    """

    images: int
    shape: int
    texture: int
    by_class: dict[str, float | None]

    @property
    def bias(self) -> float | None:
        """Share of shape among decisions for shape or texture, in 0..1; None if there are none."""
        return _share(self.shape, self.texture)


class Stimuli(Dataset[Sample]):
    """The cue-conflict pictures of a folder; the label is a picture's place in ``shapes`` and ``textures``.

    Attributes:
        shapes, textures: the classes of every picture, in the order of the paths.

    Raises:
        UserError: there is no picture, or one whose name or folder is not of the published layout.
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
                    f"{path} is no cue-conflict picture: expected SHAPE/SHAPEn-TEXTUREm.png of the classes "
                    f"{', '.join(SHAPE_CLASSES)}"
                )
        self.shapes, self.textures = (tuple(match[part] for _, match in found if match) for part in (1, 2))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        path = str(self.paths[index])
        return decode_image(path, lambda: path, self.exif), index


def decide(logits: np.ndarray) -> np.ndarray:
    """The decision among the 16 classes, (images,) of their names, for logits (images, 1000).

    Raises:
        ValueError: for another number of classes.
    """
    if logits.shape[1:] != (IMAGENET_CLASSES,):
        raise ValueError(f"decisions are taken from ImageNet's 1,000 classes, not from logits {logits.shape}")
    fine = probabilities(logits)
    coarse = np.stack([fine[:, list(places)].mean(1) for places in FINE_CLASSES.values()], axis=1)
    return np.array(SHAPE_CLASSES)[coarse.argmax(1)]


def shape_bias(decisions: np.ndarray, shapes: Sequence[str], textures: Sequence[str]) -> ShapeBias:
    """The bias of decisions for pictures of these shapes and textures, all (images,) of class names."""
    shape, texture = np.array(shapes), np.array(textures)
    conflict = shape != texture
    for_shape, for_texture = conflict & (decisions == shape), conflict & (decisions == texture)
    by_class = {
        name: _share(int(for_shape[shape == name].sum()), int(for_texture[shape == name].sum()))
        for name in SHAPE_CLASSES
    }
    return ShapeBias(int(conflict.sum()), int(for_shape.sum()), int(for_texture.sum()), by_class)


def _share(shape: int, texture: int) -> float | None:
    return shape / (shape + texture) if shape + texture else None


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share * 100:.2f}"


def tables(results: Mapping[str, ShapeBias]) -> str:
    """The bias of every model, and of every model by shape."""
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


def main(options: ShapeBiasOptions) -> None:
    bundles = open_bundles(options.bundles)
    stimuli = Stimuli(options.stimuli, bundles.preprocessing.exif)
    names = bundles.classes
    if len(names) != IMAGENET_CLASSES:
        raise UserError(f"shape bias needs ImageNet's 1,000 classes, and {options.bundles[0]} has {len(names)}")
    if all(re.fullmatch(r"n\d{8}", name) for name in names) and list(names) != sorted(names):
        raise UserError(f"the classes of {options.bundles[0]} are not in the order of their WordNet IDs")
    logits, order = predict_checked(bundles, stimuli, bundles.preprocessing.transform())
    results = {
        model: shape_bias(decide(values), np.array(stimuli.shapes)[order], np.array(stimuli.textures)[order])
        for model, values in logits.items()
    }
    facts = {"models": {model: {"bias": each.bias, **asdict(each)} for model, each in results.items()}}
    write_results(options.out, RESULTS, facts, tables(results))


if __name__ == "__main__":
    run_command(ShapeBiasOptions, main)
