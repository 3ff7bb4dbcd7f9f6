"""Inputs of the commands of this package: a checkpoint, images and schemes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from illama.checkpoints.load import Checkpoint
from illama.checkpoints.open_checkpoint import open_checkpoint
from illama.checkpoints.timm_checkpoint import TimmCheckpoint
from illama.data.datasets import ImageData, Sample, Transformed, calibration_count, note_channels, open_data, unlabeled
from illama.data.preprocessing import Preprocessing, box_of
from illama.errors import UserError
from illama.hardware import torch_device
from illama.inference import images_per_call, load_images, torch_infer
from illama.models.attention import MaskedNetwork
from illama.nearest_neighbors import Classifier, NearestNeighbors, as_it_is
from illama.options import SourceOptions
from quant.quantizers.rotation import prepare
from quant.schemes.scheme import Scheme, read_scheme, shipped_scheme

_BATCH = 64
_GIVEN = ("mean", "std", "interpolation")  # options that replace values of the preprocessing


@dataclass(frozen=True)
class Inputs:
    """A network and data with the same classes.

    Attributes:
        source: options that open the same inputs again, here or on another machine.
        device: where to calibrate, "cpu" or "cuda".
    """

    checkpoint: Checkpoint[MaskedNetwork]
    data: ImageData
    preprocessing: Preprocessing
    source: SourceOptions
    device: str = "cpu"

    @cached_property
    def calibration(self) -> list[Tensor]:
        """Calibration images in batches (B, C, H, W)."""
        images, _ = load_images(self.data.calibration(self.calibration_images), self.preprocessing.transform())
        return split_images(torch.from_numpy(images))

    @cached_property
    def neighbors(self) -> NearestNeighbors | None:
        """The calibration images with the network's features, which classify others; None for a classifier."""
        if not self.model.config.features:
            return None
        return self.neighbors_of(self.data.calibration(self.calibration_images))

    def neighbors_of(self, images: Dataset[Sample]) -> NearestNeighbors:
        """Returns labeled images with the network's features, which classify others."""
        infer, transform = torch_infer(self.model), self.preprocessing.transform()
        return NearestNeighbors.of(infer, images, transform, len(self.data.classes))

    @property
    def classifier(self) -> Classifier:
        """Computes logits from the network's output."""
        return self.neighbors.logits if self.neighbors else as_it_is

    @property
    def metric(self) -> str:
        """What the accuracy of :attr:`classifier` is called."""
        return "k-NN top-1" if self.model.config.features else "top-1"

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes: the data's; if it has no labels, the checkpoint's, or numbers; none for features."""
        return tuple(self.data.classes) if self.model.config.num_classes else ()

    @property
    def calibration_images(self) -> int:
        """Number of calibration images."""
        return calibration_count(self.data, self.source.calibration_images)

    @property
    def model(self) -> MaskedNetwork:
        return self.checkpoint.model

    def plain_model(self) -> MaskedNetwork:
        """Returns a copy with attention in plain form, which has all tensors that can be quantized."""
        model = copy.deepcopy(self.model)
        model.set_attention_form("plain")
        return model

    def float_model(self, scheme: Scheme) -> MaskedNetwork:
        """Returns :meth:`plain_model`, rotated and smoothed by ``scheme``, so that every tensor can be compared."""
        model = self.plain_model()
        prepare(model, scheme, self.calibration)
        return model

    def batches(self, images: Dataset[Sample]) -> DataLoader[tuple[Tensor, int]]:
        """Returns a loader of a split with batches of images (B, C, H, W) and labels (B,)."""
        count = images_per_call(self.preprocessing.size, _BATCH)
        return DataLoader(Transformed(images, self.preprocessing.transform()), batch_size=count)


def split_images(images: Tensor) -> list[Tensor]:
    """Returns images (n, C, H, W) in batches for calibration, smaller ones if the images are large."""
    return list(images.split(images_per_call(images.shape[-2:], _BATCH)))


def open_inputs(options: SourceOptions, needs_labels: bool = True, calibration_share: int = 1) -> Inputs:
    """Opens the checkpoint and the data.

    Args:
        needs_labels: whether to refuse pictures without classes, which are enough for calibration.
        calibration_share: unless a number is given, at most 1/``calibration_share`` of the training images calibrate,
            so that others are left.

    Raises:
        UserError: one cannot be opened, or their classes differ.
    """
    data, device = options.data, torch_device(options.device)
    loaded = open_checkpoint(options)
    stored, config = loaded.preprocessing, loaded.model.config
    exif = options.exif or (stored.exif if stored else "apply")
    images = open_data(data, exif, options.class_order or (stored.class_order if stored else "words"))
    if not images.labeled:
        if needs_labels:
            raise unlabeled(data)
        images.classes = loaded.classes or tuple(map(str, range(config.num_classes)))
    if config.num_classes:
        _check_classes(loaded, images.classes, options)
    fitting = stored or images.preprocessing(config.size[0], config.in_channels)
    changes: dict[str, Any] = {name: value for name in _GIVEN if (value := getattr(options, name)) is not None}
    if options.crop_pct is not None:
        changes["resize"] = box_of(fitting.size, options.crop_pct)
    preprocessing = replace(fitting, exif=images.exif, class_order=images.class_order, **changes)
    count = calibration_count(images, options.calibration_images, calibration_share)
    note_channels(images.calibration(count), config.in_channels)
    source = replace(options, exif=images.exif, class_order=images.class_order, calibration_images=count, device="auto")
    return Inputs(loaded, images, preprocessing, source, device)


def _check_classes(loaded: Checkpoint[MaskedNetwork], given: Sequence[str], options: SourceOptions) -> None:
    """Raises UserError if the classes of the data are not those of the network."""
    checkpoint, data, count, names = options.checkpoint, options.data, loaded.model.config.num_classes, loaded.classes
    if len(given) != count:
        raise UserError(f"{checkpoint} has {count} classes, {data} has {len(given)}: they must be the same")
    if isinstance(loaded, TimmCheckpoint) and names and not {*names} & {*given}:
        print(f"note: {checkpoint} names its classes otherwise ({names[0]!r}, ...) than {data}: in the same order?")
        names = ()  # such as ImageNet's numbers and words
    for trained, here in zip(names, given, strict=False):
        if trained != here:
            raise UserError(f"{checkpoint} was trained for the class {trained!r} where {data} has {here!r}")


def scheme_from_name_or_file(name: str) -> Scheme:
    """Returns a shipped scheme by its name, or the scheme in a .yaml or .yml file; UserError if there is none."""
    return read_scheme(Path(name)) if name.endswith((".yaml", ".yml")) else shipped_scheme(name)


def schemes_from_options(
    names: Sequence[str], read: Callable[[str], Scheme] = scheme_from_name_or_file
) -> list[Scheme]:
    """Returns schemes that ``read`` opens; raises UserError if two have one name, or one that of a reference bundle."""
    schemes = [read(name) for name in dict.fromkeys(names)]
    taken = [*(scheme.name for scheme in schemes), "fp32", "fp16"]
    if clash := next((name for name in taken if taken.count(name) > 1), None):
        raise UserError(f"two schemes are called {clash!r}: change the name in the scheme file")
    return schemes


def onnx_scheme(name: str) -> Scheme:
    """Returns a scheme as :func:`scheme_from_name_or_file`; raises UserError if its backend is not ONNX."""
    scheme = scheme_from_name_or_file(name)
    if scheme.backend != "onnx":
        raise UserError(
            f"scheme {name} has backend {scheme.backend} and cannot be exported to ONNX: choose another scheme"
        )
    return scheme
