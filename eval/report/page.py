"""``report.html``: a single file that opens from disk and makes no requests.

``templates/plot.js`` draws the interactive plot instead of plotly, whose script alone has 4.8 MB: the page is mailed
and opened on phones, and with ten classes and its pictures it has about 250 kB. The plot follows the page's colors
(dark, print), works with a keyboard and a screen reader, and needs neither ``unsafe-inline`` nor ``unsafe-eval``: the
content security policy allows only the page's own script and style, by their hashes. Without JavaScript (a preview in
a mail program) the page shows matplotlib's plot and all tables.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from deploy.runtimes.names import TITLES
from eval.metrics.measured import NN_AGREEMENT
from eval.report.cautions import cautions
from eval.report.markdown_html import markdown_to_html
from eval.report.schema import FlippedImage, Report, Row
from eval.report.table import MISSING, cells, not_measured, range_notes, softmax_notes, timed_cells
from illama.bundle import as_run

TEMPLATES = Path(__file__).parent / "templates"
SCRIPTS = ("report.js", "plot.js")
SHOWN_CLASSES = 40  # the largest losses and gains, half each; the filter shows the others
SHOWN_FLIPS = 24  # for each row
_THUMBNAIL = re.compile(r"data:image/(png|jpeg);base64,[A-Za-z0-9+/]+={0,2}")


def render_html(report: Report, picture: bytes, thumbnails: Mapping[int, str], folder: Path = Path()) -> str:
    """Returns the report as an HTML page.

    Args:
        folder: the report's folder, for the paths in commands.
        picture: plot of accuracy and latency as PNG, shown without JavaScript.
        thumbnails: as :func:`eval.report.write_report.write_report`.

    Raises:
        ValueError: a thumbnail is not a data URI of a PNG or JPEG.
    """
    for image, uri in thumbnails.items():
        if not _THUMBNAIL.fullmatch(uri):
            raise ValueError(f"the thumbnail of image {image} is not a data URI of a PNG or JPEG: {uri[:40]!r}")
    loader = jinja2.FileSystemLoader(TEMPLATES)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    style = _inline(["report.css"])
    script = _inline(SCRIPTS)
    plot = plot_data(report)
    choice, names = report.decision.choice, {row.key: row.name for row in report.rows}
    batch, front = plot["batch"], report.pareto(plot["batch"])
    table = [{**cells(row, batch), **timed_cells(row, batch, report.reference, front)} for row in report.rows]
    return environment.get_template("report.html").render(
        report=report,
        style=style,
        script=script,
        policy=content_policy(style, script),
        picture=f"data:image/png;base64,{base64.b64encode(picture).decode()}",
        thumbnails=thumbnails,
        choice=choice,
        figures=key_figures(report, report.chosen),
        cautions=cautions(report),
        steps=how_to_use(report, folder),
        diagrams=shown_diagrams(report),
        reference=report.reference,
        rejected={names[each.key]: each.violations for each in choice.rejected},
        headings=tuple(table[0]),
        table=table,
        plot=plot,
        span=_span(report.rows),
        fastest=max((each.images_per_second for row in report.rows for each in row.latency), default=1.0),
        classes=class_changes(report),
        galleries={row.name: flipped for row in report.rows if (flipped := shown_flips(row))},
        not_measured=not_measured(report),
        softmax_notes=softmax_notes(report),
        range_notes=range_notes(report),
        files=list_files(report.rows),
        others=[(other, Markup(markdown_to_html(other.markdown))) for other in report.others],
    )


def _inline(names: Sequence[str]) -> Markup:
    """Returns the text of template files, to be inserted without escaping."""
    return Markup("\n".join((TEMPLATES / name).read_text() for name in names))


def content_policy(style: str, script: str) -> str:
    """Returns a Content-Security-Policy that allows this style, this script and inline pictures only."""
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)]
    return (
        f"default-src 'none'; style-src 'sha256-{hashes[0]}'; script-src 'sha256-{hashes[1]}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


@dataclass(frozen=True)
class KeyFigure:
    """A headline figure, with its unit and a comparison."""

    title: str
    value: str
    unit: str
    remark: str


def key_figures(report: Report, row: Row | None) -> list[KeyFigure]:
    """Returns the accuracy, latency, size and agreement of the chosen row; an empty list without one."""
    reference, batch = report.reference, report.constraints.batch
    if row is None:
        return []
    loss = "the reference" if row.reference else f"drop {row.drop} points"
    title = row.metric if row.features else row.metric.capitalize()
    found = [KeyFigure(title, f"{row.top1.percent:.2f}", "%", loss)] if row.labeled else []
    if latency := row.at(batch):
        speed = timed_cells(row, batch, reference, ())["speed"]
        remark = f"p90 {latency.p90:.2f} ms" if latency.p90 else "too few calls for a p90"
        remark += f"; {speed.text} the reference's speed" if speed.value else ""
        found.append(KeyFigure(f"Latency, batch {batch}", f"{latency.p50:.2f}", "ms", remark))
    smaller = reference.megabytes / row.megabytes if reference and reference is not row else None
    remark = "as it is deployed"
    if smaller is not None:
        remark = f"{smaller:.1f} times smaller than the reference" if smaller > 1 else f"{1 / smaller:.1f} times larger"
        remark = "as large as the reference" if 0.95 < smaller < 1.05 else remark
    found.append(KeyFigure("File", f"{row.megabytes:.2f}", "MB", remark))
    if row.change:
        flips = row.change.flips
        changed = len(flips.lost) + len(flips.gained) + len(flips.moved)
        remark = f"{changed:,} of {row.images:,} predictions differ"
        remark += "" if row.sqnr is None else f"; SQNR {row.sqnr:.1f} dB"
        found.append(KeyFigure("Agreement" if row.labeled else title, f"{row.change.agreement:.2f}", "%", remark))
    return found


def how_to_use(report: Report, folder: Path) -> dict[str, str]:
    """Returns what to do with the chosen file: its path, a command and code that run it; nothing without a choice.

    The command for a graph for TensorRT without an engine builds one, and there is no code.

    Args:
        folder: the report's folder.
    """
    if (row := report.chosen) is None:
        return {}
    path = os.path.normpath(folder / (row.engine or row.onnx))
    if row.engine is None and row.runtime_id in TITLES:
        command = as_run(f"python deploy/build.py {shlex.quote(str(Path(path).parent))}")
        return {"path": path, "command": command, "code": ""}
    runtime = "" if row.engine else f" --runtime {row.runtime_id}"
    code = [
        "from pathlib import Path",
        "from deploy.runtimes.open_engine import open_engine",
        f"engine = open_engine(Path({path!r}){'' if row.engine else f', {row.runtime_id!r}'})",
        f"{'features' if row.features else 'logits'} = engine.infer(images)  # images: (B, C, H, W) float32",
    ]
    command = as_run(f"python deploy/predict.py --engine {shlex.quote(path)}{runtime} photo.jpg")
    return {"path": path, "command": command, "code": "\n".join(code)}


def shown_diagrams(report: Report) -> list[Row]:
    """Returns the rows with a reliability diagram: the reference, the chosen row, and the worst calibrated one."""
    if not (errors := {row.key: each.ece for row in report.rows if (each := row.scaled or row.reliability)}):
        return []
    worst = max(report.rows, key=lambda row: errors[row.key])
    keys = {row.key for row in (report.reference, report.chosen, worst) if row}
    return [row for row in report.rows if row.key in keys]


def plot_data(report: Report) -> dict[str, Any]:
    """Returns what the script draws and puts into the table, for every timed batch size."""
    batches = sorted({each.batch for row in report.rows for each in row.latency})
    fronts = {batch: report.pareto(batch) for batch in batches}
    reference = report.reference
    rows = [
        {
            "name": row.name,
            "scheme": row.scheme,
            "runtime": row.runtime,
            "top1": row.top1.percent,
            "low": max(row.top1.percent - (row.drop.high - row.drop.points), 0.0),
            "high": min(row.top1.percent + (row.drop.points - row.drop.low), 100.0),
            "device": row.device,
            "drop": "the reference" if row.reference else f"drop {row.drop} points",
            "metric": row.metric,
            "megabytes": row.megabytes,
            "p50": {each.batch: each.p50 for each in row.latency},
            "pareto": [batch for batch in batches if row.key in fronts[batch]],
            "cells": {
                batch: {name: [cell.text, cell.value] for name, cell in timed.items()}
                for batch in batches
                for timed in [timed_cells(row, batch, reference, fronts[batch])]
            },
        }
        for row in report.rows
    ]
    limits, chosen = report.constraints, report.chosen
    least = reference.top1.percent - limits.drop if reference and limits.drop is not None else None
    return {
        "rows": rows,
        "batches": batches,
        "batch": limits.batch if limits.batch in batches else next(iter(batches), limits.batch),
        "chosen": chosen.name if chosen else None,
        "images": report.rows[0].images,
        "constraints": {"batch": limits.batch, "latency": limits.latency_ms, "top1": least, "drop": limits.drop},
    }


def _span(rows: Sequence[Row]) -> tuple[float, float]:
    """Returns the range of the drops of all rows with their intervals, which includes zero."""
    low, high = min(0.0, *(row.drop.low for row in rows)), max(0.0, *(row.drop.high for row in rows))
    margin = 0.08 * (high - low) or 1.0
    return low - margin, high + margin


@dataclass(frozen=True)
class ClassLine:
    """A class, with its change in points in each row, the p-value of McNemar's test, and whether it is significant."""

    name: str
    images: int
    reference: float
    changes: list[tuple[float, float, bool]]
    shown: bool


def class_changes(report: Report) -> list[ClassLine]:
    """Returns all classes of the test images, sorted by their largest change in any row, worst first."""
    changed = [row.change for row in report.rows if row.change]
    if not changed or report.metric == NN_AGREEMENT:  # each calibration image is a class
        return []
    lines = []
    for each in zip(*(change.classes for change in changed), strict=True):
        changes = [(one.other - one.reference, one.p, one.significant) for one in each]
        largest = max((change for change, _, _ in changes), key=abs)
        lines.append((largest, report.classes[each[0].label], each[0], changes))
    lines.sort(key=lambda line: line[0])
    half = SHOWN_CLASSES // 2
    return [
        ClassLine(name, first.images, first.reference, changes, not half <= i < len(lines) - half)
        for i, (_, name, first, changes) in enumerate(lines)
    ]


def shown_flips(row: Row) -> list[tuple[str, FlippedImage]]:
    """Returns the flipped images of a row that are shown, with their kinds; some of each kind, lost ones first."""
    kinds: dict[str, list[FlippedImage]] = {"right to wrong": [], "wrong to right": [], "wrong to wrong": []}
    for flip in row.flipped:
        now_right = flip.after == flip.label
        kind = "right to wrong" if flip.before == flip.label else "wrong to right" if now_right else "wrong to wrong"
        kinds[kind].append(flip)
    first = {kind: flips[: SHOWN_FLIPS // len(kinds)] for kind, flips in kinds.items()}
    left = SHOWN_FLIPS - sum(map(len, first.values()))
    for kind, flips in kinds.items():  # the remaining places go to lost images first
        more = flips[len(first[kind]) :][:left]
        first[kind], left = first[kind] + more, left - len(more)
    return [(kind, flip) for kind, flips in first.items() for flip in flips]


def list_files(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Returns all files: path, size in bytes, SHA-256, and the runtimes that computed the accuracies of its rows."""
    files: dict[str, dict[str, Any]] = {}
    for row in rows:
        for path, size in ((row.onnx, row.onnx_bytes), (row.engine, row.engine_bytes)):
            if path is not None:
                known = files.setdefault(path, {"path": path, "size": size or 0, "evaluated_with": []})
                known["sha256"] = row.sha256.get(path, MISSING)
                known["evaluated_with"].append(row.evaluated_with)
    return list(files.values())
