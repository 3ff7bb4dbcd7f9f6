"""``report.html``: one file that opens anywhere, from disk, without a single request.

The interactive plot is drawn by ``templates/plot.js`` and not by plotly, whose script alone is 4.8 MB: this page is
sent by mail and opened on phones, and all of it, for ten classes and with its pictures, is some 250 kB. Own marks also
take the page's colours (dark, print), can be reached by keyboard and read aloud, and need no ``unsafe-inline`` or
``unsafe-eval``: the page's policy admits its own script and style by their hashes, and no network. Where no script runs
(a preview in a mail program), matplotlib's picture stands in the plot's place and every table is there all the same.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from eval.report.markdown_html import markdown_to_html
from eval.report.pareto import choose, pareto_front
from eval.report.schema import FlippedImage, Report, Row
from eval.report.table import HEADINGS, MISSING, TIMED, Cell, cells, not_measured, timed_cells

TEMPLATES = Path(__file__).parent / "templates"
SCRIPTS = ("report.js", "plot.js")
SHOWN_CLASSES = 40  # the largest losses and gains, half each; a filter finds the others
SHOWN_FLIPS = 24  # a row
_THUMBNAIL = re.compile(r"data:image/(png|jpeg);base64,[A-Za-z0-9+/]+={0,2}")


def render_html(report: Report, picture: bytes, thumbnails: Mapping[int, str]) -> str:
    """The report as one HTML page.

    Args:
        picture: of the tradeoff, PNG; shown where no script runs.
        thumbnails: see :func:`eval.report.write_report.write_report`.

    Raises:
        ValueError: for a thumbnail that is no data URI of a PNG or JPEG.
    """
    for image, uri in thumbnails.items():
        if not _THUMBNAIL.fullmatch(uri):
            raise ValueError(f"the thumbnail of image {image} is no data URI of a PNG or JPEG: {uri[:40]!r}")
    loader = jinja2.FileSystemLoader(TEMPLATES)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    style = _inline(["report.css"])
    script = _inline(SCRIPTS)
    plot = plot_data(report)
    choice = choose(report.rows, report.constraints)
    return environment.get_template("report.html").render(
        report=report,
        style=style,
        script=script,
        policy=content_policy(style, script),
        picture=f"data:image/png;base64,{base64.b64encode(picture).decode()}",
        thumbnails=thumbnails,
        choice=choice,
        figures=key_figures(report, choice.row),
        reference=_reference(report.rows),
        rejected={name: violations for name, violations in choice.violations.items() if violations},
        headings=HEADINGS + tuple(name for name in TIMED if name not in HEADINGS),
        table=[table_row(report, row, plot["batch"]) for row in report.rows],
        plot=plot,
        span=_span(report.rows),
        fastest=max((each.images_per_second for row in report.rows for each in row.latency), default=1.0),
        classes=class_changes(report),
        galleries={row.name: flipped for row in report.rows if (flipped := shown_flips(row))},
        not_measured=not_measured(report),
        files=list_files(report.rows),
        others=[(other, Markup(markdown_to_html(other.markdown))) for other in report.others],
    )


def _inline(names: Sequence[str]) -> Markup:
    """Files of the templates, to stand in the page as they are."""
    return Markup("\n".join((TEMPLATES / name).read_text() for name in names))


def content_policy(style: str, script: str) -> str:
    """A Content-Security-Policy: this style, this script and inlined pictures, and nothing from anywhere."""
    hashes = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script))
    style_hash, script_hash = hashes
    return (
        f"default-src 'none'; style-src 'sha256-{style_hash}'; script-src 'sha256-{script_hash}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _reference(rows: Sequence[Row]) -> Row | None:
    return next((row for row in rows if row.reference), None)


@dataclass(frozen=True)
class KeyFigure:
    """A figure in large type, what it is of, and what it is to be held against."""

    title: str
    value: str
    unit: str
    remark: str


def key_figures(report: Report, row: Row | None) -> list[KeyFigure]:
    """Of the row that was chosen: accuracy, latency, size, and how many images it names alike; none without one."""
    reference, batch = _reference(report.rows), report.constraints.batch
    if row is None:
        return []
    loss = "the reference" if row.reference else f"drop {row.drop} points"
    found = [KeyFigure("Top-1", f"{row.top1.percent:.2f}", "%", loss)]
    if latency := row.at(batch):
        speed = timed_cells(row, batch, reference, ())["speed"]
        remark = f"p99 {latency.p99:.2f} ms" + (f"; {speed.text} the reference's speed" if speed.value else "")
        found.append(KeyFigure(f"Latency, batch {batch}", f"{latency.p50:.2f}", "ms", remark))
    smaller = reference.megabytes / row.megabytes if reference and reference is not row else None
    times = f"{smaller:.1f} times smaller than the reference" if smaller and smaller >= 1 else ""
    larger = f"{1 / smaller:.1f} times the reference's" if smaller and smaller < 1 else ""
    found.append(KeyFigure("File", f"{row.megabytes:.2f}", "MB", times or larger or "as it is deployed"))
    if row.change:
        flips = row.change.flips
        changed = len(flips.lost) + len(flips.gained) + len(flips.moved)
        remark = f"{changed:,} of {row.images:,} images named otherwise"
        found.append(KeyFigure("Same answer", f"{row.change.agreement:.2f}", "%", remark))
    return found


def table_row(report: Report, row: Row, batch: int) -> dict[str, Cell]:
    """A row of the table, under every heading of the page."""
    return {**cells(row, batch), **timed_cells(row, batch, _reference(report.rows), pareto_front(report.rows, batch))}


def plot_data(report: Report) -> dict[str, Any]:
    """What the script draws and puts into the table, for every batch size that was timed."""
    batches = sorted({each.batch for row in report.rows for each in row.latency})
    fronts = {batch: pareto_front(report.rows, batch) for batch in batches}
    reference = _reference(report.rows)
    rows = [
        {
            "name": row.name,
            "scheme": row.scheme,
            "runtime": row.runtime,
            "top1": row.top1.percent,
            "low": row.top1.percent - (row.drop.high - row.drop.points),
            "high": row.top1.percent + (row.drop.points - row.drop.low),
            "device": row.device,
            "drop": "the reference" if row.reference else f"drop {row.drop} points",
            "megabytes": row.megabytes,
            "p50": {each.batch: each.p50 for each in row.latency},
            "front": [batch for batch in batches if row.name in fronts[batch]],
            "cells": {
                batch: {name: [cell.text, cell.value] for name, cell in timed.items()}
                for batch in batches
                for timed in [timed_cells(row, batch, reference, fronts[batch])]
            },
        }
        for row in report.rows
    ]
    constraints, chosen = report.constraints, choose(report.rows, report.constraints).row
    floor = reference.top1.percent - constraints.drop if reference and constraints.drop is not None else None
    return {
        "rows": rows,
        "batches": batches,
        "batch": constraints.batch if constraints.batch in batches else next(iter(batches), constraints.batch),
        "chosen": chosen.name if chosen else None,
        "images": report.rows[0].images,
        "constraints": {
            "batch": constraints.batch,
            "latency": constraints.latency_ms,
            "top1": floor,
            "drop": constraints.drop,
        },
    }


def _span(rows: Sequence[Row]) -> tuple[float, float]:
    """The drops, with their intervals, that all rows lie within; zero always does."""
    low, high = min(0.0, *(row.drop.low for row in rows)), max(0.0, *(row.drop.high for row in rows))
    margin = 0.08 * (high - low) or 1.0
    return low - margin, high + margin


@dataclass(frozen=True)
class ClassLine:
    """A class in all rows: its change in points under each, with McNemar's p and whether that is significant."""

    name: str
    images: int
    reference: float
    changes: list[tuple[float, float, bool]]
    shown: bool


def class_changes(report: Report) -> list[ClassLine]:
    """Every class of the test images, by its largest change in any row, worst first."""
    changed = [row.change for row in report.rows if row.change]
    if not changed:
        return []
    lines = []
    for each in zip(*(change.classes for change in changed), strict=True):
        changes = [(one.other - one.reference, one.p, one.significant) for one in each]
        largest = max((change for change, _, _ in changes), key=abs)
        name = report.classes[each[0].label]
        lines.append((largest, ClassLine(name, each[0].images, each[0].reference, changes, True)))
    lines.sort(key=lambda line: line[0])
    half = SHOWN_CLASSES // 2
    hidden = range(half, len(lines) - half) if len(lines) > SHOWN_CLASSES else range(0)
    return [ClassLine(**{**vars(line), "shown": i not in hidden}) for i, (_, line) in enumerate(lines)]


def shown_flips(row: Row) -> list[tuple[str, FlippedImage]]:
    """The flipped images of a row that are shown, some of each kind, those that it loses first, with their kinds."""
    kinds: dict[str, list[FlippedImage]] = {"right to wrong": [], "wrong to right": [], "wrong to wrong": []}
    for flip in row.flipped:
        now_right = flip.after == flip.label
        kind = "right to wrong" if flip.before == flip.label else "wrong to right" if now_right else "wrong to wrong"
        kinds[kind].append(flip)
    first = {kind: flips[: SHOWN_FLIPS // len(kinds)] for kind, flips in kinds.items()}
    room = SHOWN_FLIPS - sum(map(len, first.values()))
    for kind, flips in kinds.items():  # what the others leave goes to those lost first
        more = flips[len(first[kind]) :][:room]
        first[kind], room = first[kind] + more, room - len(more)
    return [(kind, flip) for kind, flips in first.items() for flip in flips]


def list_files(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Every file once: its path, size in bytes, SHA-256, and what computed the accuracies of its rows."""
    files: dict[str, dict[str, Any]] = {}
    for row in rows:
        for path, size in ((row.onnx, row.onnx_bytes), (row.engine, row.engine_bytes)):
            if path is not None:
                known = files.setdefault(path, {"path": path, "size": size or 0, "evaluated_with": []})
                known["sha256"] = row.sha256.get(path, MISSING)
                known["evaluated_with"].append(row.evaluated_with)
    return list(files.values())
