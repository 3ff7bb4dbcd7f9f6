"""Bundles opened side by side, to be given the same images."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from deploy.runtimes.names import RuntimeName
from deploy.runtimes.open_engine import open_file
from eval.metrics.predictions import refuse_overflow
from illama.bundle import FRAME, Manifest, bundle_of, sha256
from illama.checkpoints.load import read_preprocessing
from illama.data.datasets import ImageData, Preprocessing, Sample, Transform, open_data
from illama.errors import UserError
from illama.inference import Infer, predict


@dataclass(frozen=True)
class OpenBundles:
    """Bundles, or files of them, that take the same images and name the same classes.

    Attributes:
        models: name of a bundle or file -> images (B, C, H, W) to logits (B, classes).
        paths: name -> the file that is run.
        files: name -> SHA-256 of that file.
        runtimes: name -> what runs it, with its version, device and precision.
        preprocessing, classes: of them all.
    """

    models: dict[str, Infer]
    paths: dict[str, Path]
    files: dict[str, str]
    runtimes: dict[str, str]
    preprocessing: Preprocessing
    classes: tuple[str, ...]

    @property
    def facts(self) -> dict[str, Any]:
        """What of them decides a result, as JSON can hold it."""
        return {"files": self.files, "preprocessing": asdict(self.preprocessing), "classes": self.classes}


def open_bundles(given: Sequence[Path], runtime: RuntimeName | None = "onnxruntime", threads: int = 0) -> OpenBundles:
    """Open the file of each bundle that ``runtime`` takes, under the folder's own name, or the very files given.

    Args:
        runtime: None for the best of each, as :func:`deploy.runtimes.open_engine.open_engine` chooses.
        threads: on a CPU; 0 for one a core.

    Raises:
        UserError: none given, one given twice, one that the runtime does not take, takes a camera's frames, or takes
            other images than the first.
    """
    manifest = check_alike(given)
    opened = {name: open_file(path, runtime, threads) for name, path in zip(_names(given), given, strict=True)}
    return OpenBundles(
        {name: engine.infer for name, (engine, _) in opened.items()},
        {name: path for name, (_, path) in opened.items()},
        {name: sha256(path) for name, (_, path) in opened.items()},
        {name: engine.runtime for name, (engine, _) in opened.items()},
        read_preprocessing(manifest),
        tuple(manifest.classes),
    )


def check_alike(given: Sequence[Path]) -> Manifest:
    """The first bundle's manifest; UserError unless all classify the same images into the same classes."""
    if not given:
        raise UserError("give at least one bundle, such as runs/ptq/fp32")
    manifests = [Manifest.read(bundle_of(path)) for path in given]
    expected = read_preprocessing(manifests[0])
    for path, manifest in zip(given, manifests, strict=True):
        refuse_frames(path, manifest)
        if "decoder_channels" in manifest.config:
            raise UserError(f"{path} is of a segmentation network: judge it with python eval/segmentation.py")
        if manifest.classes != manifests[0].classes or read_preprocessing(manifest) != expected:
            raise UserError(f"{path} takes other images or names other classes than {given[0]}: give bundles alike")
    return manifests[0]


def _names(given: Sequence[Path]) -> list[str]:
    """A name for each: the bundle's, and the file's within it if it is a file; the paths if two have the same."""
    whole = [path.resolve() for path in given]
    bundles = [bundle_of(path) for path in whole]
    names = [(bundle.name / path.relative_to(bundle)).as_posix() for bundle, path in zip(bundles, whole, strict=True)]
    if len(set(names)) < len(names):
        names = [os.path.relpath(path) for path in given]
    if len(set(names)) < len(names):
        raise UserError("the same bundle was given twice: give each once")
    return names


def refuse_frames(bundle: Path, manifest: Manifest) -> None:
    """UserError for a bundle of deploy/camera.py, whose graphs take no preprocessed images."""
    if FRAME in manifest.metrics:
        raise UserError(f"{bundle} takes camera frames: give the bundle that it was made from")


def open_fitting_data(spec: str, classes: Sequence[str], preprocessing: Preprocessing) -> ImageData:
    """The data set that ``spec`` names, read as the bundles say; UserError unless its classes are theirs."""
    data = open_data(spec, preprocessing.exif, preprocessing.class_order)
    if tuple(data.classes) != tuple(classes):
        raise UserError(
            f"{spec} has other classes than the bundles ({len(data.classes)} and {len(classes)}): "
            "give the data that they were trained on"
        )
    return data


def predict_checked(
    bundles: OpenBundles, images: Dataset[Sample], transform: Transform, workers: int = 0
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """:func:`illama.inference.predict` with every bundle; UserError for one whose logits are not finite."""
    logits, labels = predict(bundles.models, images, transform, workers=workers)
    refuse_overflow(logits)
    return logits, labels
