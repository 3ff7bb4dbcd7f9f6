"""Classify images with any engine: python deploy/predict.py --engine runs/ptq/int8 photo.jpg"""

from __future__ import annotations

import stat
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from deploy.runtimes.engine import Engine
from deploy.runtimes.image_input import ImageInput
from deploy.runtimes.names import RuntimeName
from deploy.runtimes.open_engine import open_file
from deploy.runtimes.temperature import read_temperature
from illama.bundle import Manifest, bundle_of
from illama.cli import run_command
from illama.errors import UserError

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
SETTLED = 0.2  # seconds for which a watched file must not have grown, or a camera is still writing it


@dataclass(frozen=True)
class PredictOptions:
    """Print the five likeliest classes of each image.

    Their probabilities are calibrated where a temperature is stored with the file (deploy/runtimes/temperature.py).

    Attributes:
        images: image files.
        engine: a bundle, or an engine's folder, an .engine or an .onnx file of one.
        runtime: openvino, onnxruntime, tensorrt, torch, ...; the best for the engine if not given.
        watch: classify each image that appears in this folder, one line each, until Ctrl-C.
        seconds: stop watching after so long.
        threads: on a CPU; 0 for one a core.
    """

    images: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    engine: Path = Path("runs/ptq/int8")
    runtime: RuntimeName | None = None
    watch: Path | None = None
    seconds: float | None = None
    threads: int = 0


def top5(logits: np.ndarray, classes: list[str], temperature: float = 1.0) -> list[tuple[str, float]]:
    """(class, probability) of the five likeliest classes of one image, the likeliest first; logits (classes,)."""
    wide = np.exp((logits - logits.max()).astype(np.float64) / temperature)
    order = np.argsort(-logits, kind="stable")[:5]
    return [(classes[index], float(wide[index] / wide.sum())) for index in order]


def new_images(folder: Path, until: float | None) -> Iterator[Path]:
    """Images as they appear in a folder, whole ones, each once; those that are there come first."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder} to watch")
    seen: set[tuple[Path, int]] = set()
    while until is None or time.monotonic() < until:
        for path in sorted(folder.iterdir()):
            try:
                facts = path.stat()
            except FileNotFoundError:  # a camera renames what it has written
                continue
            known = (path, facts.st_mtime_ns)
            image = stat.S_ISREG(facts.st_mode) and path.suffix.lower() in SUFFIXES
            if image and known not in seen and time.time() - facts.st_mtime > SETTLED:
                seen.add(known)
                yield path
        time.sleep(0.02)


def classify(
    engine: Engine, takes: ImageInput, classes: list[str], temperature: float, paths: Iterable[Path], skip_broken: bool
) -> None:
    """Print a line for each image: its five likeliest classes, and the milliseconds from file to answer."""
    for path in paths:
        start = time.perf_counter()
        try:
            logits = engine.infer(takes.read(str(path), path.__str__)[None])[0]
        except UserError as error:
            if not skip_broken:
                raise
            print(f"{path}: skipped, {error}", flush=True)
            continue
        taken = (time.perf_counter() - start) * 1e3
        answer = ", ".join(f"{name} {probability:.1%}" for name, probability in top5(logits, classes, temperature))
        print(f"{path}: {answer} ({taken:.1f} ms)", flush=True)


def main(options: PredictOptions) -> None:
    if bool(options.images) == bool(options.watch):
        raise UserError("name images, or a folder with --watch")
    manifest = Manifest.read(bundle_of(options.engine))
    engine, file = open_file(options.engine, options.runtime, options.threads)
    temperature = read_temperature(file)
    calibrated = f"calibrated (temperature {temperature:.3f})" if temperature else "not calibrated"
    print(f"{options.engine} in {engine.runtime}; its probabilities are {calibrated}", flush=True)
    until = time.monotonic() + options.seconds if options.seconds is not None else None
    paths = new_images(options.watch, until) if options.watch else options.images
    try:
        classify(
            engine,
            ImageInput.of(manifest),
            manifest.classes,
            temperature or 1.0,
            paths,
            skip_broken=options.watch is not None,
        )
    finally:
        engine.close()


if __name__ == "__main__":
    run_command(PredictOptions, main)
