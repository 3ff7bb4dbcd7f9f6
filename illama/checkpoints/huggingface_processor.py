"""Reads how transformers prepares images: a folder's ``preprocessor_config.json``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from illama.data.preprocessing import Preprocessing
from illama.errors import UserError
from illama.options import Interpolation
from illama.structured_files import read_json

PROCESSORS = ("preprocessor_config.json", "processor_config.json")
# What processors do where a file says nothing, by a part of their names or of the network's.
_SHORTER = ("clip", "bit", "dinov2")  # a size that is a number is that of the shorter side
_CROPS = (*_SHORTER, "deit")
_RESAMPLE: dict[int, Interpolation] = {2: "bilinear", 3: "bicubic"}  # PIL's numbers


@dataclass(frozen=True)
class _Processor:
    """The part of preprocessor_config.json that is used."""

    image_mean: list[float]
    image_std: list[float]
    size: dict[str, int | None] | int
    image_processor_type: str = ""
    feature_extractor_type: str = ""
    crop_size: dict[str, int | None] | int | None = None
    do_center_crop: bool | None = None
    do_resize: bool | None = True
    do_rescale: bool | None = True
    do_normalize: bool | None = True
    rescale_factor: float | None = None
    resample: int | None = None


@dataclass(frozen=True)
class _Whole:
    """The part of processor_config.json, of a network of images and text, that is used."""

    image_processor: _Processor


def find_processor(folder: Path) -> Path:
    """Returns the file in a folder of transformers that says how images are prepared; UserError if it has none."""
    if found := [folder / name for name in PROCESSORS if (folder / name).exists()]:
        return found[0]
    raise UserError(f"{folder} has no {PROCESSORS[0]}, which says how images are prepared: copy it from the model")


def read_preprocessing(path: Path, model_type: str, channels: int, image_size: int | None) -> Preprocessing:
    """Returns the preprocessing that a file of transformers states.

    Args:
        path: file of :func:`find_processor`.
        model_type: kind of the network, which tells the processor if its own name is missing.
        channels: color channels of the network's input.
        image_size: side length of the input in pixels instead of the file's; the resize keeps its ratio to it.

    Raises:
        UserError: the file is missing or damaged, or prepares images in a way that is not supported.
    """
    whole = path.name != PROCESSORS[0]
    found = read_json(path, _Whole, "ignore").image_processor if whole else read_json(path, _Processor, "ignore")
    name = (found.image_processor_type or found.feature_extractor_type or model_type).lower()
    shorter_side, crops = (any(each in name for each in kinds) for kinds in (_SHORTER, _CROPS))
    factor = 1 / 255 if found.rescale_factor is None else found.rescale_factor
    if not (found.do_resize and found.do_rescale and found.do_normalize) or abs(factor * 255 - 1) > 1e-6:
        raise UserError(f"{path} leaves images as they are in one step: resize, 1/255 and mean are needed")
    resample = (2 if "vit" in name else 3) if found.resample is None else found.resample  # ViT and DINOv3: bilinear
    if resample not in _RESAMPLE:
        raise UserError(f"{path} resizes with PIL's filter {resample}: only {_RESAMPLE} are supported")
    center = crops if found.do_center_crop is None else found.do_center_crop
    crop = _pixels(found.crop_size, path)[0] if center and found.crop_size is not None else None
    resize, warps = _pixels(found.size, path)
    warps = warps and not (shorter_side and isinstance(found.size, int))
    if crop is None and not warps:
        raise UserError(f"{path} gives images of different sizes: a center crop is needed")
    if crop is not None and warps and crop != resize:
        print(f"note: {path} warps images to {resize} x {resize} pixels before the crop; here, they keep their shape")
    side = crop or resize
    size = image_size or side
    shorter = None if crop is None or (crop == resize and warps) else resize * size // side
    facts = tuple(found.image_mean), tuple(found.image_std), shorter, _RESAMPLE[resample]
    return Preprocessing((size, size), channels, *facts, class_order="natural", crop_floor=True)


def _pixels(size: dict[str, int | None] | int, path: Path) -> tuple[int, bool]:
    """Returns the length that images are resized or cropped to, and whether that is of both sides."""
    if isinstance(size, int):
        return size, True
    if (shorter := size.get("shortest_edge")) is not None:
        return shorter, False
    height, width = size.get("height"), size.get("width")
    if height is None or height != width:
        raise UserError(f"{path} has images of {height} x {width} pixels: only square ones are supported")
    return height, True
