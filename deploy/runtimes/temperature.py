"""Temperatures T that calibrate a network's probabilities, softmax(logits / T), stored in its bundle.

``temperature.json`` holds the temperature of each graph, by file name, with the graph's SHA-256, so that it is never
used with other weights. An engine uses that of the graph it was built from.
:func:`eval.metrics.calibration.fit_temperature` fits them (Guo et al., arXiv 1706.04599).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from deploy.trt.record import EngineRecord
from illama.atomic_write import write_file
from illama.bundle import FUSED_ONNX, TEMPERATURE, bundle_of, sha256
from illama.errors import UserError
from illama.structured_files import read_json


@dataclass(frozen=True)
class StoredTemperature:
    """A temperature and how it was fitted.

    Attributes:
        temperature: divisor of the logits.
        images: number of calibration images, which are of the training split.
        data: the data set, as given by --data.
        fitted_with: the runtime that computed the logits.
        sha256: SHA-256 of the graph.
    """

    temperature: float
    images: int
    data: str
    fitted_with: str
    sha256: str

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"the temperature must be above 0, not {self.temperature}")


def read_temperature(path: Path) -> float | None:
    """Returns the temperature of a file or an engine of a bundle; None if none is stored for its weights.

    Raises:
        UserError: there is no file at ``path``, or temperature.json is damaged.
    """
    if not path.is_file():
        raise UserError(f"{path} not found: give a file of a bundle")
    stored = _find(path)
    return stored.temperature if stored else None


def store_temperature(path: Path, temperature: float, images: int, data: str, fitted_with: str) -> None:
    """Stores the temperature of a file's or an engine's graph in its bundle; those of other graphs are kept.

    Raises:
        UserError: temperature.json is damaged.
        ValueError: the temperature is not above 0.
    """
    name, digest = _graph_of(path)
    target = bundle_of(path) / TEMPERATURE
    stored = {**_read(target), name: StoredTemperature(temperature, images, data, fitted_with, digest)}
    with write_file(target) as draft:
        draft.write_text(json.dumps({each: asdict(values) for each, values in stored.items()}, indent=2) + "\n")


def store_temperatures(fitted: Iterable[tuple[Path, float, str]], images: int, data: str) -> list[str]:
    """Stores the temperatures of several files; returns a message for each file for which this failed.

    Args:
        fitted: (file, temperature, runtime that computed the logits). The last one of each graph is kept.
        images: number of calibration images.
        data: the data set.
    """
    failed = {}
    for path, temperature, runtime in fitted:
        try:
            store_temperature(path, temperature, images, data, runtime)
        except OSError as error:
            failed[path] = f"The temperature of {path} could not be stored: {error.strerror}."
    return list(failed.values())


def copy_temperature(source: Path, target: Path) -> None:
    """Stores the temperature of ``source``, if there is one, for ``target``, which computes the same logits."""
    if stored := _find(source):
        store_temperature(target, stored.temperature, stored.images, stored.data, stored.fitted_with)


def _find(path: Path) -> StoredTemperature | None:
    name, digest = _graph_of(path)
    stored = _read(bundle_of(path) / TEMPERATURE).get(name)
    return stored if stored and stored.sha256 == digest else None


def _graph_of(path: Path) -> tuple[str, str]:
    """Returns (name, SHA-256) of a graph file, or of the graph that an engine was built from."""
    if path.suffix == ".engine":
        return FUSED_ONNX, EngineRecord.read(path).onnx_sha256
    return path.name, sha256(path)


def _read(path: Path) -> dict[str, StoredTemperature]:
    return read_json(path, dict[str, StoredTemperature]) if path.exists() else {}
