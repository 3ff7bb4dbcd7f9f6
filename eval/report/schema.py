"""What is measured of every file and engine: the rows of a report, and what they were measured under.

``eval/tradeoff.py`` fills these in, ``eval/report/write_report.py`` draws them, and ``report.json`` holds them as they
stand here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from eval.benchmark.latency import Latency
from eval.metrics.measured import Measured
from eval.metrics.paired import Drop
from illama.errors import UserError
from illama.options import Constraints

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class FlippedImage:
    """An image whose top-1 class is another than the reference row's.

    Attributes:
        image: index in the test split.
        label, before, after: class of the image, as the reference row names it, and as this row does; indices.
    """

    image: int
    label: int
    before: int
    after: int


@dataclass(kw_only=True)
class Row(Measured):
    """One deployable file in one runtime, and what was measured of it.

    Attributes:
        name: unlike any other row's, such as "int8, OpenVINO, CPU (bf16)".
        scheme: number format: fp32, fp16 or a quantization scheme.
        runtime: what the file is for, in words.
        runtime_id: the same, as :func:`deploy.runtimes.open_engine.open_engine` takes it.
        evaluated_with: what computed the logits that the accuracies come from.
        drop: points of top-1 lost against the reference row on the same images.
        flipped: some of the images whose class changes, to be looked at.
        onnx, engine: paths, relative to the report where they lie beside it; None where there is no such file.
        sha256: path of each of these files -> its hash.
        fused: False for an engine whose attention may be in pieces.
        reference: the row that drops are against.
        latency: one for each batch size; empty where the runtime could not run here, or only emulates the format.
        device: what it was timed on; None where it was not.
        note: why something is missing.
    """

    name: str
    scheme: str
    runtime: str
    runtime_id: str
    evaluated_with: str
    drop: Drop
    onnx: str
    onnx_bytes: int
    flipped: list[FlippedImage] = field(default_factory=list)
    engine: str | None = None
    engine_bytes: int | None = None
    sha256: dict[str, str] = field(default_factory=dict)
    fused: bool = True
    reference: bool = False
    latency: list[Latency] = field(default_factory=list)
    device: str | None = None
    note: str | None = None

    @property
    def megabytes(self) -> float:
        """Of the file that is deployed: the engine if there is one, else the ONNX file; 10^6 bytes."""
        return (self.engine_bytes or self.onnx_bytes) / 1e6

    def at(self, batch: int) -> Latency | None:
        """The latency at a batch size, if it was measured."""
        return next((each for each in self.latency if each.batch == batch), None)


@dataclass(frozen=True)
class OtherResult:
    """Tables of another command that belong into the same report.

    Attributes:
        source: the file they were read from.
        command, machine: that made them; empty where the file does not say.
        markdown: the tables.
    """

    title: str
    source: str
    command: str
    machine: dict[str, Any]
    markdown: str


@dataclass
class Report:
    """All that ``report.html`` shows and ``report.json`` holds.

    Attributes:
        classes: names, in the order of the logits.
        conditions: under what the latencies were taken, such as threads, rounds, temperatures and clocks.
        layers: what each scheme did, in rows of layer, weight, input.
        seconds: of the steps, without Python's imports.
        not_run: what was not measured, and why.
    """

    rows: list[Row]
    command: str
    data: str
    checkpoint: str
    classes: tuple[str, ...]
    machine: dict[str, Any]
    versions: dict[str, str]
    constraints: Constraints = field(default_factory=Constraints)
    conditions: dict[str, Any] = field(default_factory=dict)
    calibration_images: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    not_run: list[str] = field(default_factory=list)
    peak_memory_gib: float = 0.0
    layers: dict[str, list[list[str]]] = field(default_factory=dict)
    others: list[OtherResult] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Everything, as ``report.json`` holds it."""
        content = {"schema_version": SCHEMA_VERSION, **plain(asdict(self))}
        for row, written in zip(self.rows, content["rows"], strict=True):
            for latency, figures in zip(row.latency, written["latency"], strict=True):
                figures["images_per_second"] = latency.images_per_second
        return content


def plain(value: Any) -> Any:
    """``value`` with lists in place of arrays and tuples."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, Mapping):
        return {name: plain(each) for name, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, list | tuple) else value


def read_report(path: Path) -> dict[str, Any]:
    """The contents of a ``report.json``.

    Raises:
        UserError: if there is none, or one of another schema.
    """
    try:
        content = json.loads(path.read_text())
        version = content["schema_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no report.json of python eval/tradeoff.py: {error}") from error
    if version != SCHEMA_VERSION:
        raise UserError(f"{path} has schema {version}, and this reads {SCHEMA_VERSION}: make it again")
    return content
