"""Bundles opened side by side, to be given the same images."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from deploy.engines import OnnxRuntimeEngine
from eval.predictions import check_finite
from illama.accuracy import Infer, predict
from illama.bundle import CPU_ONNX, FRAME, Manifest, sha256
from illama.checkpoint import read_preprocessing
from illama.data import ImageData, Preprocessing, Sample, Transform, open_data
from illama.errors import UserError


@dataclass(frozen=True)
class OpenBundles:
    """Bundles that take the same images and name the same classes.

    Attributes:
        models: name of a bundle -> images (B, C, H, W) to logits (B, classes).
        files: name of a bundle -> SHA-256 of its graph.
        preprocessing, classes: of them all.
    """

    models: dict[str, Infer]
    files: dict[str, str]
    preprocessing: Preprocessing
    classes: tuple[str, ...]


def open_bundles(folders: Sequence[Path]) -> OpenBundles:
    """Open the ``model.onnx`` of each folder in ONNX Runtime, under the folder's own name.

    Raises:
        UserError: none given, one given twice, one that has no graph, takes a camera's frames, or takes
            other images than the first.
    """
    if not folders:
        raise UserError("give at least one bundle, such as runs/ptq/fp32")
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [os.path.relpath(folder) for folder in folders]
    if len(set(names)) < len(names):
        raise UserError("the same bundle was given twice: give each once")
    manifests = [Manifest.read(folder) for folder in folders]
    for folder, manifest in zip(folders, manifests, strict=True):
        if not (folder / CPU_ONNX).exists():
            raise UserError(f"{folder} has no {CPU_ONNX}: quantize it first, with python quant/ptq.py")
        refuse_frames(folder, manifest)
        if (manifest.classes, manifest.preprocessing) != (manifests[0].classes, manifests[0].preprocessing):
            raise UserError(f"{folder} takes other images or names other classes than {folders[0]}: give bundles alike")
    paths = {name: folder / CPU_ONNX for name, folder in zip(names, folders, strict=True)}
    return OpenBundles(
        {name: OnnxRuntimeEngine(path).infer for name, path in paths.items()},
        {name: sha256(path) for name, path in paths.items()},
        read_preprocessing(manifests[0]),
        tuple(manifests[0].classes),
    )


def refuse_frames(bundle: Path, manifest: Manifest) -> None:
    """UserError for a bundle of deploy/camera.py, whose graphs take no preprocessed images."""
    if FRAME in manifest.metrics:
        raise UserError(f"{bundle} takes camera frames: give the bundle that it was made from")


def open_fitting_data(spec: str, bundles: OpenBundles) -> ImageData:
    """The data set that ``spec`` names; UserError unless its classes are the bundles'."""
    data = open_data(spec)
    if tuple(data.classes) != bundles.classes:
        raise UserError(f"{spec} has other classes than the bundles ({len(data.classes)} and {len(bundles.classes)}): "
                        "give the data that they were trained on")  # fmt: skip
    return data


def predict_checked(
    bundles: OpenBundles, images: Dataset[Sample], transform: Transform, workers: int = 0
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """:func:`illama.accuracy.predict` with every bundle; UserError for one whose logits are not finite."""
    logits, labels = predict(bundles.models, images, transform, workers=workers)
    for name, values in logits.items():
        try:
            check_finite(values)
        except ValueError as error:
            raise UserError(f"{name}: {error}: leave it out, or quantize it by another scheme") from error
    return logits, labels
