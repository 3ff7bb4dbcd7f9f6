"""Opens bundles that take the same images and name the same classes, and the data they were trained on."""

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
from illama.bundle import bundle_of, sha256
from illama.data.datasets import ImageData, Sample, note_channels, open_data, unlabeled
from illama.data.preprocessing import Preprocessing, Transform
from illama.errors import UserError
from illama.inference import Infer, predict
from illama.manifest import Manifest
from illama.progress import track


@dataclass(frozen=True)
class OpenBundles:
    """Bundles, or files of them, that take the same images and name the same classes.

    Attributes:
        models: name of a bundle or file -> function from images (B, C, H, W) to logits (B, classes).
        paths: name -> path of the file that runs.
        files: name -> SHA-256 of that file.
        runtimes: name -> its runtime, with version, device and precision.
        preprocessing: preprocessing of all of them.
        classes: names of the classes of all of them.
        data: the data set that the first was made with.
    """

    models: dict[str, Infer]
    paths: dict[str, Path]
    files: dict[str, str]
    runtimes: dict[str, str]
    preprocessing: Preprocessing
    classes: tuple[str, ...]
    data: str

    @property
    def facts(self) -> dict[str, Any]:
        """Everything about them that determines a result, as JSON can hold it."""
        return {"files": self.files, "preprocessing": asdict(self.preprocessing), "classes": self.classes}


def open_bundles(given: Sequence[Path], runtime: RuntimeName | None = "onnxruntime", threads: int = 0) -> OpenBundles:
    """Opens the file of each bundle that ``runtime`` runs, under the folder's name; or the files themselves if given.

    The networks must be classifiers.

    Args:
        given: bundles, or files or engines of them.
        runtime: None for the preferred one of each, as :func:`deploy.runtimes.open_engine.open_engine` chooses.
        threads: number of CPU threads; 0 for one per core.

    Raises:
        UserError: no path is given; a path is given twice, does not run in the runtime, takes camera frames, or takes
            other images than the first.
    """
    manifest = check_alike(given)
    if manifest.features:
        raise UserError(f"{given[0]} computes features, and this command needs classes: try python eval/tradeoff.py")
    named = track([*zip(_names(given), given, strict=True)], "open", "bundle")
    opened = {name: open_file(path, runtime, threads) for name, path in named}
    return OpenBundles(
        {name: engine.infer for name, (engine, _) in opened.items()},
        {name: path for name, (_, path) in opened.items()},
        {name: sha256(path) for name, (_, path) in opened.items()},
        {name: engine.runtime for name, (engine, _) in opened.items()},
        manifest.preprocessing,
        manifest.classes,
        manifest.data,
    )


def check_alike(given: Sequence[Path]) -> Manifest:
    """Returns the first bundle's manifest, after checking that all bundles take the same images and name its classes.

    Raises:
        UserError: a bundle takes other images, or names other classes.
    """
    if not given:
        raise UserError("no bundles given: give at least one, such as runs/ptq/fp32")
    manifests = [Manifest.read(bundle_of(path)) for path in given]
    for path, manifest in zip(given, manifests, strict=True):
        refuse_frames(path, manifest)
        if manifest.network == "segmentation":
            raise UserError(f"{path} holds a segmentation network: evaluate it with python eval/segmentation.py")
        first, own = ((each.classes, each.features, each.preprocessing) for each in (manifests[0], manifest))
        if own != first:
            raise UserError(f"{path} takes other images or has other classes or features than {given[0]}: leave it out")
    return manifests[0]


def _names(given: Sequence[Path]) -> list[str]:
    """Returns the bundle's name for each path, with the file's within it if it is a file; the paths if names repeat."""
    whole = [path.resolve() for path in given]
    bundles = [bundle_of(path) for path in whole]
    names = [(bundle.name / path.relative_to(bundle)).as_posix() for bundle, path in zip(bundles, whole, strict=True)]
    if len(set(names)) < len(names):
        names = [os.path.relpath(path) for path in given]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{twice[0]} was given twice: give each path once")
    return names


def refuse_frames(bundle: Path, manifest: Manifest) -> None:
    """Raises UserError for a bundle of deploy/camera.py, whose graphs do not take preprocessed images."""
    if manifest.frame:
        raise UserError(f"{bundle} takes camera frames: give the bundle that it was made from")


def open_fitting_data(
    spec: str, classes: Sequence[str], preprocessing: Preprocessing, needs_labels: bool = True
) -> ImageData:
    """Opens the data set that ``spec`` names, read as the bundles' preprocessing says.

    Args:
        needs_labels: whether to refuse pictures without classes.

    Raises:
        UserError: its classes are not those of the bundles, if these have a classifier.
    """
    data = open_data(spec, preprocessing.exif, preprocessing.class_order)
    if not data.labeled:
        if needs_labels:
            raise unlabeled(spec)
        data.classes = tuple(classes)
    if classes and tuple(data.classes) != tuple(classes):
        raise UserError(
            f"{spec} has other classes than the bundles ({len(data.classes)} and {len(classes)}): "
            "give the data that they were trained on"
        )
    note_channels(data.test(), preprocessing.in_channels)
    return data


def predict_checked(
    bundles: OpenBundles, images: Dataset[Sample], transform: Transform, workers: int = 0
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Returns the logits (n, classes) of each bundle and the labels (n,), from :func:`illama.inference.predict`.

    Raises:
        UserError: a bundle has logits that are not finite.
    """
    logits, labels = predict(bundles.models, images, transform, workers=workers)
    refuse_overflow(logits)
    return logits, labels
