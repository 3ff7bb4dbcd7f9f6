"""Predictions for image files: the five most probable classes or the features of each, and new images in a folder."""

from __future__ import annotations

import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from deploy.runtimes.engine import Engine
from deploy.runtimes.image_input import ImageInput
from illama.data.images import PICTURES, list_pictures
from illama.errors import UserError

Infer = Callable[[Path], tuple[np.ndarray, Sequence[str]]]
SETTLED = 0.2  # seconds without a change after which a file in a watched folder is complete


def top5(logits: np.ndarray, classes: Sequence[str], temperature: float = 1.0) -> list[tuple[str, float]]:
    """Returns (class, probability) of the five most probable classes of one image, in descending order.

    Args:
        logits: (classes,).
        classes: names of the classes, in the order of the logits.
        temperature: divides the logits.
    """
    if len(classes) != len(logits):
        raise UserError(f"the network has {len(logits)} classes, and its manifest {len(classes)}: export it again")
    wide = np.exp((logits - logits.max()).astype(np.float64) / temperature)
    order = np.argsort(-logits, kind="stable")[:5]
    return [(classes[index], float(wide[index] / wide.sum())) for index in order]


def expand_images(paths: Sequence[Path]) -> list[Path]:
    """Returns the paths, and in place of a folder the image files in it at any depth; UserError if it has none."""
    return [each for path in paths for each in (list_pictures(path) if path.is_dir() else [path])]


def new_images(folder: Path, until: float | None) -> Iterator[Path]:
    """Yields the images in a folder, and then every new or changed image once it is complete.

    Args:
        until: time of ``time.monotonic()`` at which to stop; None for never.

    Raises:
        UserError: there is no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} not found: --watch takes a folder that exists")
    seen: set[tuple[Path, int]] = set()
    while until is None or time.monotonic() < until:
        for path in sorted(folder.iterdir()):
            try:
                status = path.stat()
            except OSError:  # the writer renamed its temporary file, or it is a link to itself
                continue
            version = (path, status.st_mtime_ns)
            is_image = stat.S_ISREG(status.st_mode) and path.suffix.lower() in PICTURES
            if is_image and version not in seen and time.time() - status.st_mtime > SETTLED:
                seen.add(version)
                yield path
        time.sleep(0.02)


def in_engine(engine: Engine, image_input: ImageInput, classes: Sequence[str]) -> Infer:
    """Returns a function from an image file to its output in an engine, and the names of the classes."""
    return lambda path: (engine.infer(image_input.read(str(path), path.__str__)[None])[0], classes)


def classify(infer: Infer, temperature: float, paths: Iterable[Path], skip_broken: bool) -> Iterator[np.ndarray]:
    """Prints one line for each image: its five most probable classes, and the milliseconds from file to result.

    Of features, prints their shape and norm. Yields the output for each image.

    Args:
        infer: takes a path, returns logits (classes,) and the names of the classes in their order, or features and no
            names; may raise UserError.
        temperature: divides the logits.
        skip_broken: print a line for an image that cannot be read, and continue.

    Raises:
        UserError: an image cannot be read.
    """
    for path in paths:
        start = time.perf_counter()
        try:
            output, classes = infer(path)
        except UserError as error:
            if not skip_broken:
                raise
            print(f"{path}: skipped, {error}", flush=True)
            continue
        milliseconds = (time.perf_counter() - start) * 1e3
        result = (
            ", ".join(f"{name} {probability:.1%}" for name, probability in top5(output, classes, temperature))
            if classes
            else f"features {output.shape}, norm {np.linalg.norm(output):.4g}"
        )
        print(f"{path}: {result} ({milliseconds:.1f} ms)", flush=True)
        yield output
