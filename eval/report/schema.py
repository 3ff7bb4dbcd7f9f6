"""Schema of a report: a row for each file in a runtime, and the conditions of the measurement.

``eval/tradeoff.py`` fills it in, ``eval/report/write_report.py`` renders it, and ``report.json`` holds these fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from eval.measure.latency import Latency
from eval.metrics.measured import Measured
from eval.report.decision import Decision, RowKey
from illama.manifest import Drop, NumericRange
from illama.options import Constraints

SCHEMA_VERSION = 2
Kept = Literal["99.9%", "99%", "less than 99%", "too few images"]


@dataclass(frozen=True)
class FlippedImage:
    """An image whose predicted class differs from the reference row's.

    Attributes:
        image: index in the test split.
        label: index of its class.
        before: index of the class that the reference row predicts.
        after: index of the class that this row predicts.
    """

    image: int
    label: int
    before: int
    after: int


@dataclass(frozen=True)
class HalfSoftmax:
    """What a file for TensorRT computes if the softmax inside attention is in half precision.

    Attributes:
        top1: accuracy in percent; None if logits are not finite.
        drop: accuracy drop from the reference row; None likewise.
    """

    top1: float | None = None
    drop: Drop | None = None


@dataclass(kw_only=True)
class Row(Measured):
    """A deployable file in a runtime, with its measurements.

    Attributes:
        scheme: fp32, fp16 or a quantization scheme.
        runtime: the runtime that the file is for, for people.
        runtime_id: the runtime's name, as :func:`deploy.runtimes.open_engine.open_engine` takes it.
        file: path of the deployed file within its bundle.
        precision: float type that the runtime chose for this machine; None if the file alone determines it.
        evaluated_with: runtime that computed the logits, with version, device and precision.
        drop: points of top-1 lost against the reference row on the same images.
        flipped: some of the images whose predicted class changes.
        onnx: path of the ONNX file, or of PyTorch's weights, relative to the report.
        onnx_bytes: its size.
        engine: path of the TensorRT engine, relative to the report; None if there is none.
        engine_bytes: its size.
        sha256: path of each of these files -> its SHA-256.
        quantized: whether its network is quantized.
        fused: whether attention is fused in an engine; True for other files.
        reference: whether it is the row that drops are measured against.
        latency: latency at each batch size; empty if the file was not timed.
        device: device that it was timed on; None if it was not timed.
        note: why a measurement is missing.
        half_softmax: a second measurement of a file whose half precision was emulated, if the interval of its drop
            excludes zero: a fused attention kernel may compute the softmax in float32, as in the row, or in half
            precision.
    """

    scheme: str
    runtime: str
    runtime_id: str
    file: str
    evaluated_with: str
    drop: Drop
    onnx: str
    onnx_bytes: int
    flipped: list[FlippedImage] = field(default_factory=list)
    precision: str | None = None
    engine: str | None = None
    engine_bytes: int | None = None
    sha256: dict[str, str] = field(default_factory=dict)
    quantized: bool = False
    fused: bool = True
    reference: bool = False
    latency: list[Latency] = field(default_factory=list)
    device: str | None = None
    note: str | None = None
    half_softmax: HalfSoftmax | None = None

    @property
    def name(self) -> str:
        """Unique name for people, such as "int8, OpenVINO, CPU"; :attr:`key` identifies the row."""
        return f"{self.scheme}, {self.runtime}"

    @property
    def key(self) -> RowKey:
        return RowKey(self.scheme, self.runtime_id, self.file)

    @property
    def kept(self) -> Kept:
        """The largest share of the reference's top-1 that it keeps, at the upper end of the drop's interval."""
        reference = self.top1.percent + self.drop.points
        shares: dict[Kept, float] = {"99.9%": 0.001, "99%": 0.01}
        for name, loss in shares.items():
            if self.drop.high <= loss * reference:
                return name
        return "less than 99%" if self.drop.low > 0.01 * reference else "too few images"

    @property
    def megabytes(self) -> float:
        """Size of the deployed file, the engine if there is one and else the ONNX file, in 10^6 bytes."""
        return (self.engine_bytes or self.onnx_bytes) / 1e6

    def at(self, batch: int) -> Latency | None:
        """Returns the latency at a batch size; None if it was not measured."""
        return next((each for each in self.latency if each.batch == batch), None)


@dataclass(frozen=True)
class FailedRow:
    """A file in a runtime that has no measurements.

    Attributes:
        scheme, runtime, runtime_id, file: see :class:`Row`.
        reason: what failed, for people.
    """

    scheme: str
    runtime: str
    runtime_id: str
    file: str
    reason: str

    @property
    def name(self) -> str:
        """Unique name for people."""
        return f"{self.scheme}, {self.runtime}"


@dataclass(frozen=True)
class OtherResult:
    """Results of another command, shown in the same report.

    Attributes:
        source: path of the results.
        command: command that wrote them.
        machine: machine that it ran on; empty if the results do not say.
        markdown: the tables.
    """

    title: str
    source: str
    command: str
    machine: dict[str, Any]
    markdown: str


@dataclass
class Report:
    """Everything that ``report.html`` shows and ``report.json`` holds.

    Attributes:
        classes: names of the classes, in the order of the logits.
        decision: what the report concludes from its rows.
        conditions: conditions of the latency measurement, such as threads, rounds, temperatures and clocks.
        seconds: step -> its duration, without Python's imports.
        not_run: messages about what was not measured, and why.
        layers: scheme -> rows of layer, format of its weight, format of its input.
        ranges: scheme -> the range of half precision that its graph for TensorRT uses.
        findings: ONNX file -> what the linter finds in it, for people.
        others: results of other commands.
        failed: files that could not be measured; one of them never costs the others.
        preprocessing: how an image becomes the networks' input, for people.
    """

    rows: list[Row]
    decision: Decision
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
    ranges: dict[str, NumericRange] = field(default_factory=dict)
    findings: dict[str, list[str]] = field(default_factory=dict)
    others: list[OtherResult] = field(default_factory=list)
    failed: list[FailedRow] = field(default_factory=list)
    preprocessing: str = ""

    @property
    def metric(self) -> str:
        """What the report measures; see :attr:`eval.metrics.measured.Measured.metric`."""
        return self.rows[0].metric if self.rows else "top-1"

    @property
    def reference(self) -> Row | None:
        """Row that the others are compared with."""
        return self._row(self.decision.reference)

    @property
    def chosen(self) -> Row | None:
        """Row to deploy."""
        return self._row(self.decision.choice.row)

    def pareto(self, batch: int) -> frozenset[RowKey]:
        """Returns the Pareto-optimal rows at a batch size."""
        return frozenset(self.decision.pareto.get(batch, ()))

    def _row(self, key: RowKey | None) -> Row | None:
        return next((row for row in self.rows if row.key == key), None)

    def to_json(self) -> dict[str, Any]:
        """Returns the contents of ``report.json``."""
        content = {"schema_version": SCHEMA_VERSION, **plain(asdict(self))}
        for row, written in zip(self.rows, content["rows"], strict=True):
            written["name"], written["kept"] = row.name, row.kept
            for latency, figures in zip(row.latency, written["latency"], strict=True):
                figures["images_per_second"] = latency.images_per_second
        return content


def plain(value: Any) -> Any:
    """Returns ``value`` with lists instead of arrays and tuples."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, Mapping):
        return {name: plain(each) for name, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, list | tuple) else value
