"""Regressions of a report compared with a baseline, an earlier ``report.json``; for continuous integration."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eval.report.schema import Report
from eval.report.table import MISSING, escape
from illama.errors import UserError
from illama.markdown_table import markdown

_SAME = ("data", "classes")  # must be equal in both reports


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


def find_regressions(baseline: Mapping[str, Any], report: Report, tolerances: Tolerances | None = None) -> list[str]:
    """Returns the regressions compared with ``baseline``, a line for each; rows are matched by their names.

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
        baseline: contents of a ``report.json``, from :func:`eval.report.schema.read_report`.
        tolerances: defaults to :class:`Tolerances`.

    Raises:
        UserError: the data, images, classes or reference differ, or ``baseline`` lacks fields.
    """
    now = report.to_json()
    limits = tolerances or Tolerances()
    try:
        check_comparable(baseline, now)
        rows = {row["name"]: row for row in now["rows"]}
        found: list[str] = []
        for old in baseline["rows"]:
            if new := rows.get(old["name"]):
                found += _of_row(old, new, limits)
                found += _of_latency(_ratios(baseline, old), _ratios(now, new), old, new, limits.latency)
                found += [
                    f"{old['name']}: it is no longer timed at batch {batch}"
                    for batch in _p50(old).keys() - _p50(new).keys()
                ]
            else:
                found.append(f"{old['name']}: it is in the baseline but not in this report")
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"the baseline is damaged, at {error}: make it again with eval/tradeoff.py") from error
    return found


def check_images(baseline: Mapping[str, Any], data: str, classes: Sequence[str], images: int) -> None:
    """Raises UserError if a baseline is of other data, classes or number of images; checked before the evaluation."""
    try:
        before = (baseline["data"], list(baseline["classes"]), {row["images"] for row in baseline["rows"]})
    except (KeyError, TypeError) as error:
        raise UserError(f"the baseline is damaged, at {error}: make it again with eval/tradeoff.py") from error
    if before != (data, list(classes), {images}):
        was = f"{_listed(before[2])} images of {before[0]}, {len(before[1])} classes"
        raise UserError(
            f"the baseline is of {was}, not of {images} images of {data}, {len(classes)} classes: give another one"
        )


def check_comparable(old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raises UserError if two reports are of other data, classes, numbers of images or reference rows."""
    for name in _SAME:
        if old[name] != new[name]:
            raise UserError(f"the baseline has other {name} than this report: give a baseline of the same {name}")
    kinds = {
        "numbers of images": [{row["images"] for row in report["rows"]} for report in (old, new)],
        "reference rows": [{row["name"] for row in report["rows"] if row["reference"]} for report in (old, new)],
    }
    for name, (before, after) in kinds.items():
        if before != after:
            raise UserError(
                f"the baseline has other {name} ({_listed(before)}, not {_listed(after)}): give another one"
            )


def _listed(values: set[Any]) -> str:
    return ", ".join(sorted(map(str, values))) or "none"


def _of_row(old: Mapping[str, Any], new: Mapping[str, Any], limits: Tolerances) -> Iterator[str]:
    """Yields the regressions of a row, except those of latency."""
    name, before, after = old["name"], old["drop"], new["drop"]
    growth = after["points"] - before["points"]
    noise = math.hypot(after["points"] - after["low"], before["high"] - before["points"])
    if growth > limits.drop and growth > noise:
        yield (
            f"{name}: the drop of top-1 is {after['points']:+.2f} points, and was {before['points']:+.2f}: "
            f"an increase of {growth:.2f} points, with noise of up to {noise:.2f}"
        )
    if new["reference"] and new["top1"]["percent"] < old["top1"]["low"]:
        yield (
            f"{name}: top-1 is {new['top1']['percent']:.2f}%, and was {old['top1']['percent']:.2f}%: it is below the "
            f"95% interval, which starts at {old['top1']['low']:.2f}%"
        )
    for kind in ("onnx", "engine"):
        small, large = old[f"{kind}_bytes"], new[f"{kind}_bytes"]
        if small and large and large > small * (1 + limits.size):
            yield f"{name}: {new[kind]} has {large:,} bytes, and had {small:,}: {large / small - 1:.1%} more"
    if old["fused"] and not new["fused"]:
        yield f"{name}: its attention is no longer fused"
    for kind, title, limit in (
        ("nll", "negative log-likelihood", limits.nll),
        ("ece", "calibration error", limits.ece),
    ):
        low, high = old["reliability"][kind], new["reliability"][kind]
        if high > low + limit:
            yield f"{name}: its {title} is {high:.4f}, and was {low:.4f}"


def _of_latency(
    old: Mapping[int, float],
    new: Mapping[int, float],
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    limit: float,
) -> Iterator[str]:
    """Yields the regressions of a row in latency, given batch size -> p50 divided by the reference row's."""
    same = before["device"] == after["device"]
    other = "" if same else f" (on {after['device']}; the baseline on {before['device']})"
    for batch in old.keys() & new.keys():
        if same and _p50(after)[batch] <= _p50(before)[batch]:
            continue
        if new[batch] > old[batch] * max(1 + limit, *(_spread(row, batch) for row in (before, after))):
            yield (
                f"{after['name']}: p50 at batch {batch} is {new[batch]:.2f} times the reference's, and was "
                f"{old[batch]:.2f} times{other}"
            )


def _p50(row: Mapping[str, Any]) -> dict[int, float]:
    return {each["batch"]: each["p50"] for each in row["latency"]}


def _spread(row: Mapping[str, Any], batch: int) -> float:
    return next(each["p90"] / each["p50"] for each in row["latency"] if each["batch"] == batch)


def _ratios(report: Mapping[str, Any], row: Mapping[str, Any]) -> dict[int, float]:
    """Returns, by batch size, the p50 of a row divided by the reference row's, if both were timed."""
    references = [each for each in report["rows"] if each["reference"]]
    base = _p50(references[0]) if references else {}
    return {batch: p50 / base[batch] for batch, p50 in _p50(row).items() if base.get(batch)}


def compare_markdown(baseline: Mapping[str, Any], report: Report, regressions: list[str]) -> str:
    """Returns the regressions and the figures of both reports, for a comment on a pull request."""
    now, batch = report.to_json(), report.constraints.batch
    old = {row["name"]: row for row in baseline["rows"]}
    lines = []
    for row in now["rows"]:
        pairs = zip(_figures(baseline, old.get(row["name"]), batch), _figures(now, row, batch), strict=True)
        lines.append([escape(row["name"]), *(f"{_text(before)} → {_text(after)}" for before, after in pairs)])
    headings = ("file", "top-1 %", "drop", f"p50, batch {batch}, relative to the reference", "MB", "NLL")
    listed = [f"- {escape(line)}" for line in regressions] or ["No regressions."]
    return "\n".join(["### Compared with the baseline", "", *listed, "", markdown(headings, lines)]) + "\n"


def _figures(report: Mapping[str, Any], row: Mapping[str, Any] | None, batch: int) -> list[float | None]:
    if row is None:
        return [None] * 5
    size = (row["engine_bytes"] or row["onnx_bytes"]) / 1e6
    ratio = _ratios(report, row).get(batch)
    return [row["top1"]["percent"], row["drop"]["points"], ratio, size, row["reliability"]["nll"]]


def _text(value: float | None) -> str:
    return MISSING if value is None else f"{value:.2f}"
