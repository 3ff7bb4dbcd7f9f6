"""The table of accuracy and latency: its cells, for the HTML page and for Markdown."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from eval.report.decision import RowKey
from eval.report.schema import Report, Row

MISSING = "-"
PARETO = "Pareto"  # heading: whether the row is Pareto-optimal
KEEPS = "keeps"  # heading: the share of the reference's top-1 that the row keeps
TIMED = ("p50 ms", "p90 ms", "speed", PARETO)  # columns that depend on the batch size


@dataclass(frozen=True)
class Cell:
    """Text of a cell, and the value it is sorted by; None if it was not measured."""

    text: str
    value: float | str | None


def cells(row: Row, batch: int) -> dict[str, Cell]:
    """Returns the cells of a row by heading, with latencies at ``batch``; a dash if not measured."""
    latency = row.at(batch)
    runtime = row.runtime if row.fused else f"{row.runtime}, unfused"
    return {
        "scheme": Cell(row.scheme, row.scheme),
        "runs in": Cell(runtime, runtime),
        **_accuracy(row),
        KEEPS: Cell(MISSING if row.reference else row.kept, -row.drop.high),
        "file MB": _number(row.onnx_bytes / 1e6),
        "engine MB": _number(row.engine_bytes / 1e6 if row.engine_bytes else None),
        "p50 ms": _number(latency.p50 if latency else None),
        "p90 ms": _number(latency.p90 if latency else None),
    }


def _accuracy(row: Row) -> dict[str, Cell]:
    sqnr = {"SQNR dB": Cell(MISSING if row.sqnr is None else f"{row.sqnr:.1f}", row.sqnr)}
    cosine = {"cosine": Cell(MISSING if row.reference or row.cosine is None else f"{row.cosine:.5f}", row.cosine)}
    closeness = {**cosine, **sqnr} if row.features else {} if row.labeled else sqnr
    if row.labeled:
        drop = Cell("reference" if row.reference else str(row.drop), row.drop.points)
        return {f"{row.metric} %": _number(row.top1.percent), "drop (95% interval)": drop, **closeness}
    same = Cell("reference" if row.reference else str(row.top1), row.top1.percent)
    return {f"{row.metric} % (95% interval)": same, **closeness}


def timed_cells(row: Row, batch: int, reference: Row | None, pareto: Collection[RowKey]) -> dict[str, Cell]:
    """Returns the cells of a row under ``TIMED``; speed is the reference row's p50 divided by this row's.

    Args:
        pareto: keys of the Pareto-optimal rows at ``batch``.
    """
    latency, base = row.at(batch), reference.at(batch) if reference else None
    speed = base.p50 / latency.p50 if base and latency else None
    all_cells = cells(row, batch)
    optimal = float(row.key in pareto) if row.latency else None
    return {
        "p50 ms": all_cells["p50 ms"],
        "p90 ms": all_cells["p90 ms"],
        "speed": Cell(f"{speed:.2f}×" if speed else MISSING, speed),  # noqa: RUF001
        PARETO: Cell("yes" if row.key in pareto else "no" if latency else MISSING, optimal),
    }


def _number(value: float | None) -> Cell:
    return Cell(MISSING if value is None else f"{value:.2f}", value)


def markdown_table(rows: Sequence[Row], batch: int = 1, pareto: Collection[RowKey] = ()) -> str:
    """Returns the table in Markdown, with aligned columns for terminals; rows in ``pareto`` are bold."""
    lines = [list(cells(rows[0], batch))]
    for row in rows:
        texts = [escape(cell.text) for cell in cells(row, batch).values()]
        lines.append([f"**{texts[0]}**" if row.key in pareto else texts[0], *texts[1:]])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    aligned = [
        "| " + " | ".join(f"{text:<{width}}" for text, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    aligned.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(aligned)


def range_notes(report: Report) -> list[str]:
    """Returns which files for TensorRT are not all in float16, and why."""
    return [f"{scheme}: {sentence}." for scheme, each in report.ranges.items() if (sentence := str(each))]


def softmax_notes(report: Report) -> list[str]:
    """Returns what files for TensorRT compute if their fused attention has its softmax in half precision."""
    notes = []
    for row in report.rows:
        if (other := row.half_softmax) is not None:
            found = f"{row.metric} is {other.top1:.2f}%, drop {other.drop}" if other.drop else "logits are not finite"
            notes.append(f"{row.name}: if attention computes its softmax in half precision, {found}.")
    return notes


def escape(text: str) -> str:
    """Returns ``text`` in one line, with Markdown's special characters escaped."""
    return re.sub(r"([\\|<`*\[])", r"\\\1", " ".join(text.split()))


def not_measured(report: Report) -> list[str]:
    """Returns what was not measured, and why; rows with the same reason share a message."""
    names: dict[str, list[str]] = {}
    for row in report.rows:
        if row.note:
            names.setdefault(row.note, []).append(row.name)
    return [*report.not_run, *(f"{'; '.join(rows)}: {note}" for note, rows in names.items())]
