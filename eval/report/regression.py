"""Regressions of a report compared with a baseline, an earlier ``report.json``; for continuous integration."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from annotated_types import Interval

from deploy.runtimes.names import TITLES
from eval.metrics.paired import Share
from eval.report.decision import RowKey
from eval.report.schema import Report
from eval.report.table import MISSING, escape
from illama.bundle import ENGINES
from illama.errors import UserError
from illama.manifest import Drop
from illama.markdown_table import markdown
from illama.options import Fraction, NotNegative, Positive
from illama.structured_files import parse_json, read_json

# Titles of the runtimes in reports of version 1 whose rows have no runtime_id.
_IDS = {"ONNX Runtime": "onnxruntime", "OpenVINO": "openvino", "PyTorch": "torch"}
_IDS |= {title: runtime for runtime, title in TITLES.items()}
_Bytes = Annotated[int, Interval(ge=0)]


@dataclass(frozen=True)
class ComparedLatency:
    """See :class:`eval.measure.latency.Latency`."""

    batch: int
    p50: Positive
    p90: Positive | None = None


@dataclass(frozen=True)
class ComparedReliability:
    """See :class:`eval.metrics.calibration.Reliability`."""

    nll: NotNegative
    ece: Fraction


@dataclass(frozen=True)
class ComparedRow:
    """The facts of a row that are compared; see :class:`eval.report.schema.Row`."""

    name: str
    scheme: str
    runtime: str
    images: int
    top1: Share
    drop: Drop
    reliability: ComparedReliability | None
    onnx: str
    onnx_bytes: _Bytes
    engine: str | None
    engine_bytes: _Bytes | None
    fused: bool
    reference: bool
    latency: tuple[ComparedLatency, ...]
    device: str | None
    file: str = ""
    runtime_id: str = ""
    features: bool = False

    def __post_init__(self) -> None:
        if not all(map(math.isfinite, (*vars(self.top1).values(), *vars(self.drop).values()))):
            raise UserError("an accuracy is not a finite number: make the report again with python eval/tradeoff.py")

    @property
    def key(self) -> RowKey:
        """The row's key; what reports of version 1 lack is taken from the paths and the runtime's title."""
        parts = PurePosixPath(self.engine or self.onnx).parts
        start = max((place for place, part in enumerate(parts) if self.engine and part == ENGINES), default=-1)
        runtime = self.runtime_id or _IDS.get(self.runtime.split(",")[0], self.runtime)
        return RowKey(self.scheme, runtime, self.file or "/".join(parts[start:]))

    @property
    def p50(self) -> dict[int, float]:
        """Batch size -> median latency in ms."""
        return {each.batch: each.p50 for each in self.latency}

    def spread(self, batch: int) -> float:
        """Returns p90 / p50 at a batch size; 1 if there were too few calls for a p90."""
        return next((each.p90 or each.p50) / each.p50 for each in self.latency if each.batch == batch)


@dataclass(frozen=True)
class Baseline:
    """The facts of a ``report.json`` that are compared, of version 1 or 2."""

    schema_version: Literal[1, 2]
    data: str
    classes: tuple[str, ...]
    rows: tuple[ComparedRow, ...]
    calibration_images: int = 0

    @property
    def neighbors(self) -> int:
        """Number of images that features are compared with; 0 for a classifier."""
        return self.calibration_images if any(row.features for row in self.rows) else 0

    @classmethod
    def read(cls, path: Path) -> Baseline:
        """Reads a ``report.json``; raises UserError if it cannot be read, is damaged, or has another version."""
        return read_json(path, cls, unknown="ignore")

    @classmethod
    def of(cls, report: Report) -> Baseline:
        """Returns the facts of a report."""
        return parse_json(json.dumps(report.to_json()), cls, "the report", unknown="ignore")

    def ratios(self, row: ComparedRow) -> dict[int, float]:
        """Returns, by batch size, the p50 of a row divided by the reference row's, if both were timed."""
        base = next((each.p50 for each in self.rows if each.reference), {})
        return {batch: p50 / base[batch] for batch, p50 in row.p50.items() if base.get(batch)}


@dataclass(frozen=True)
class Tolerances:
    """Tolerances of the comparison with the baseline.

    Attributes:
        drop: increase of the drop, in points of top-1; a regression must also exceed the noise.
        latency: relative increase of the p50 divided by the reference row's of the same report.
        size: relative increase of the size of a file.
        nll: increase of the negative log-likelihood, in nats.
        ece: increase of the calibration error, in [0, 1].
    """

    drop: float = 0.1
    latency: float = 0.1
    size: float = 0.05
    nll: float = 0.02
    ece: float = 0.01


def find_regressions(baseline: Baseline, report: Report, tolerances: Tolerances | None = None) -> list[str]:
    """Returns the regressions compared with ``baseline``, a line for each; rows are matched by their keys.

    * The drop of top-1 increased by more than the tolerance, and significantly: the 95% interval of the increase,
      from those of the two drops, lies above zero (Zou and Donner, Statistics in Medicine 27, 2008). The interval
      assumes independent drops; these are of the same images, so it is too wide rather than too narrow.
    * The reference's top-1 lies below its 95% interval in the baseline.
    * The p50 divided by the reference row's increased, so that the speed of the machine cancels out. On the same
      device the p50 itself must have increased too, so that a faster reference is not a regression of the others. If
      p90 / p50 in either report exceeds the tolerance, it is the tolerance.
    * A batch size is no longer timed, a file is larger, a row is missing, attention is no longer fused, or the negative
      log-likelihood or the calibration error increased.

    Args:
        tolerances: defaults to :class:`Tolerances`.

    Raises:
        UserError: the data, images, classes or reference differ.
    """
    now, limits = Baseline.of(report), tolerances or Tolerances()
    check_comparable(baseline, now)
    rows = {row.key: row for row in now.rows}
    found: list[str] = []
    for old in baseline.rows:
        if new := rows.get(old.key):
            found += _of_row(old, new, limits)
            found += _of_latency(baseline.ratios(old), now.ratios(new), old, new, limits.latency)
            found += [
                f"{new.name}: it is no longer timed at batch {batch}" for batch in old.p50.keys() - new.p50.keys()
            ]
        else:
            found.append(f"{old.name}: it is in the baseline but not in this report")
    return found


def check_images(baseline: Baseline, data: str, classes: Sequence[str], images: int, neighbors: int = 0) -> None:
    """Raises UserError if a baseline is of other data, classes or number of images; checked before the evaluation.

    Args:
        neighbors: see :class:`Baseline`.
    """
    if baseline.neighbors != neighbors:
        was = f"features and {baseline.neighbors} calibration images" if baseline.neighbors else "a classifier"
        raise UserError(f"the baseline is of {was}, and this report is not: give another one")
    counts = {row.images for row in baseline.rows}
    if (baseline.data, baseline.classes, counts) != (data, tuple(classes), {images}):
        was = f"{_listed(counts)} images of {baseline.data}, {len(baseline.classes)} classes"
        raise UserError(
            f"the baseline is of {was}, not of {images} images of {data}, {len(classes)} classes: give another one"
        )


def check_comparable(old: Baseline, new: Baseline) -> None:
    """Raises UserError if two reports are of other data, classes, numbers of images or reference rows."""
    for name in ("data", "classes", "neighbors"):
        if getattr(old, name) != getattr(new, name):
            raise UserError(f"the baseline has other {name} than this report: give a baseline of the same {name}")
    counts = [{row.images for row in each.rows} for each in (old, new)]
    references = [{row.key: row.name for row in each.rows if row.reference} for each in (old, new)]
    for name, same, values in (
        ("numbers of images", counts[0] == counts[1], counts),
        ("reference rows", references[0].keys() == references[1].keys(), [each.values() for each in references]),
    ):
        if not same:
            before, after = map(_listed, values)
            raise UserError(f"the baseline has other {name} ({before}, not {after}): give another one")


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(sorted(map(str, values))) or "none"


def _of_row(old: ComparedRow, new: ComparedRow, limits: Tolerances) -> Iterator[str]:
    """Yields the regressions of a row, except those of latency."""
    name, before, after = new.name, old.drop, new.drop
    growth = after.points - before.points
    noise = math.hypot(after.points - after.low, before.high - before.points)
    if growth > limits.drop and growth > noise:
        yield (
            f"{name}: the drop is {after.points:+.2f} points, and was {before.points:+.2f}: "
            f"an increase of {growth:.2f} points, with noise of up to {noise:.2f}"
        )
    if new.reference and new.top1.percent < old.top1.low:
        yield (
            f"{name}: top-1 is {new.top1.percent:.2f}%, and was {old.top1.percent:.2f}%: it is below the "
            f"95% interval, which starts at {old.top1.low:.2f}%"
        )
    for file, small, large in (
        (new.onnx, old.onnx_bytes, new.onnx_bytes),
        (new.engine, old.engine_bytes, new.engine_bytes),
    ):
        if small and large and large > small * (1 + limits.size):
            yield f"{name}: {file} has {large:,} bytes, and had {small:,}: {large / small - 1:.1%} more"
    if old.fused and not new.fused:
        yield f"{name}: its attention is no longer fused"
    if not (old.reliability and new.reliability):
        return
    for title, low, high, limit in (
        ("negative log-likelihood", old.reliability.nll, new.reliability.nll, limits.nll),
        ("calibration error", old.reliability.ece, new.reliability.ece, limits.ece),
    ):
        if high > low + limit:
            yield f"{name}: its {title} is {high:.4f}, and was {low:.4f}"


def _of_latency(
    old: Mapping[int, float], new: Mapping[int, float], before: ComparedRow, after: ComparedRow, limit: float
) -> Iterator[str]:
    """Yields the regressions of a row in latency, given batch size -> p50 divided by the reference row's."""
    same = before.device == after.device
    other = "" if same else f" (on {after.device}; the baseline on {before.device})"
    for batch in old.keys() & new.keys():
        if same and after.p50[batch] <= before.p50[batch]:
            continue
        if new[batch] > old[batch] * max(1 + limit, *(row.spread(batch) for row in (before, after))):
            yield (
                f"{after.name}: p50 at batch {batch} is {new[batch]:.2f} times the reference's, and was "
                f"{old[batch]:.2f} times{other}"
            )


def compare_markdown(baseline: Baseline, report: Report, regressions: list[str]) -> str:
    """Returns the regressions and the figures of both reports, for a comment on a pull request."""
    now, batch = Baseline.of(report), report.constraints.batch
    old = {row.key: row for row in baseline.rows}
    lines = []
    for row in now.rows:
        pairs = zip(_figures(baseline, old.get(row.key), batch), _figures(now, row, batch), strict=True)
        lines.append([escape(row.name), *(f"{_text(before)} → {_text(after)}" for before, after in pairs)])
    headings = ("file", f"{report.metric} %", "drop", f"p50, batch {batch}, relative to the reference", "MB", "NLL")
    listed = [f"- {escape(line)}" for line in regressions] or ["No regressions."]
    return "\n".join(["### Compared with the baseline", "", *listed, "", markdown(headings, lines)]) + "\n"


def _figures(report: Baseline, row: ComparedRow | None, batch: int) -> list[float | None]:
    if row is None:
        return [None] * 5
    size = (row.engine_bytes or row.onnx_bytes) / 1e6
    ratio = report.ratios(row).get(batch)
    return [row.top1.percent, row.drop.points, ratio, size, row.reliability.nll if row.reliability else None]


def _text(value: float | None) -> str:
    return MISSING if value is None else f"{value:.2f}"
