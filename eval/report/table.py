"""The table of accuracy against latency, cell by cell: what a page shows and sorts, and a terminal prints."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from eval.report.schema import Report, Row

MISSING = "-"
HEADINGS = ("scheme", "runs in", "top-1 %", "drop (95% interval)", "file MB", "engine MB", "p50 ms", "p99 ms")
TIMED = ("p50 ms", "p99 ms", "speed", "front")  # those that are of one batch size


@dataclass(frozen=True)
class Cell:
    """One figure as text, and what it is sorted by; None where it was not measured."""

    text: str
    value: float | str | None


def cells(row: Row, batch: int) -> dict[str, Cell]:
    """A row under each of ``HEADINGS``, with latencies at ``batch`` images; a dash stands for what was not measured."""
    latency = row.at(batch)
    drop = "reference" if row.reference else str(row.drop)
    runtime = row.runtime if row.fused else f"{row.runtime}, unfused"
    return {
        "scheme": Cell(row.scheme, row.scheme),
        "runs in": Cell(runtime, runtime),
        "top-1 %": _number(row.top1.percent),
        "drop (95% interval)": Cell(drop, row.drop.points),
        "file MB": _number(row.onnx_bytes / 1e6),
        "engine MB": _number(row.engine_bytes / 1e6 if row.engine_bytes else None),
        "p50 ms": _number(latency.p50 if latency else None),
        "p99 ms": _number(latency.p99 if latency else None),
    }


def timed_cells(row: Row, batch: int, reference: Row | None, front: Collection[str]) -> dict[str, Cell]:
    """The cells under ``TIMED``: speed is the reference row's p50 over this one's, where both were timed."""
    latency, base = row.at(batch), reference.at(batch) if reference else None
    speed = base.p50 / latency.p50 if base and latency else None
    of_all = cells(row, batch)
    return {
        "p50 ms": of_all["p50 ms"],
        "p99 ms": of_all["p99 ms"],
        "speed": Cell(f"{speed:.2f}×" if speed else MISSING, speed),  # noqa: RUF001
        "front": Cell("yes" if row.name in front else "no" if latency else MISSING, _rank(row, front)),
    }


def _rank(row: Row, front: Collection[str]) -> float | None:
    return float(row.name in front) if row.latency else None


def _number(value: float | None) -> Cell:
    return Cell(MISSING if value is None else f"{value:.2f}", value)


def markdown_table(rows: Sequence[Row], batch: int = 1, front: Collection[str] = ()) -> str:
    """The table in Markdown, its columns aligned so that it reads well on a terminal too; rows of ``front`` in bold."""
    lines = [list(HEADINGS)]
    for row in rows:
        texts = [escape(cell.text) for cell in cells(row, batch).values()]
        lines.append([f"**{texts[0]}**" if row.name in front else texts[0], *texts[1:]])
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADINGS))]
    aligned = [
        "| " + " | ".join(f"{text:<{width}}" for text, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    aligned.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(aligned)


def escape(text: str) -> str:
    """``text`` in one line, without a meaning to Markdown."""
    return re.sub(r"([\\|<`*\[])", r"\\\1", " ".join(text.split()))


def not_measured(report: Report) -> list[str]:
    """What was not measured and why: of the whole run, and of rows, those with one reason together."""
    names: dict[str, list[str]] = {}
    for row in report.rows:
        if row.note:
            names.setdefault(row.note, []).append(row.name)
    return [*report.not_run, *(f"{'; '.join(rows)}: {note}" for note, rows in names.items())]
