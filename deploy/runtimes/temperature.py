"""The temperature T of a network's probabilities, softmax(logits / T), stored with its engines.

``temperature.json`` in a bundle holds one for each graph, by the file's name, with the graph's SHA-256: a temperature
never goes with other weights. An engine takes that of the graph it was built from. What fits one is
:func:`eval.metrics.calibration.fit_temperature` (Guo et al., arXiv 1706.04599).
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


@dataclass(frozen=True)
class StoredTemperature:
    """A temperature, and what it was fitted on.

    Attributes:
        temperature: what logits are divided by.
        images: how many calibration images, of the training split.
        data: what they are of, as --data names it.
        fitted_with: the runtime that computed their logits.
        sha256: of the graph.
    """

    temperature: float
    images: int
    data: str
    fitted_with: str
    sha256: str

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"a temperature is above 0, not {self.temperature}")


def read_temperature(path: Path) -> float | None:
    """The temperature stored for a file or an engine of a bundle; None if there is none, or one of other weights.

    Raises:
        UserError: a damaged temperature.json, or no file at ``path``.
    """
    if not path.is_file():
        raise UserError(f"there is no {path}")
    stored = _find(path)
    return stored.temperature if stored else None


def store_temperature(path: Path, temperature: float, images: int, data: str, fitted_with: str) -> None:
    """Store it for the graph of a file or an engine, in its bundle, beside those of the bundle's other graphs.

    Raises:
        UserError: a damaged temperature.json.
        ValueError: a temperature that is not above 0.
    """
    name, digest = _graph_of(path)
    target = bundle_of(path) / TEMPERATURE
    stored = {**_read(target), name: StoredTemperature(temperature, images, data, fitted_with, digest)}
    with write_file(target) as draft:
        draft.write_text(json.dumps({each: asdict(values) for each, values in stored.items()}, indent=2) + "\n")


def store_temperatures(fitted: Iterable[tuple[Path, float, str]], images: int, data: str) -> list[str]:
    """Store those of several files: (file, temperature, runtime that it was fitted with). What could not be, in words.

    Of several runtimes of one graph the last one's stays.
    """
    failed = {}
    for path, temperature, runtime in fitted:
        try:
            store_temperature(path, temperature, images, data, runtime)
        except OSError as error:
            failed[path] = f"The temperature of {path} was not stored with it: {error.strerror}."
    return list(failed.values())


def copy_temperature(source: Path, target: Path) -> None:
    """Store for ``target`` what is stored for ``source``, whose logits it gives; nothing if nothing is."""
    if stored := _find(source):
        store_temperature(target, stored.temperature, stored.images, stored.data, stored.fitted_with)


def _find(path: Path) -> StoredTemperature | None:
    name, digest = _graph_of(path)
    stored = _read(bundle_of(path) / TEMPERATURE).get(name)
    return stored if stored and stored.sha256 == digest else None


def _graph_of(path: Path) -> tuple[str, str]:
    """(name, SHA-256) of the graph that a file is, or that an engine was built from."""
    if path.suffix == ".engine":
        return FUSED_ONNX, EngineRecord.read(path).onnx_sha256
    return path.name, sha256(path)


def _read(path: Path) -> dict[str, StoredTemperature]:
    try:
        return {name: StoredTemperature(**values) for name, values in json.loads(path.read_text()).items()}
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged: delete it, and fit again with python eval/accuracy.py --store") from error
