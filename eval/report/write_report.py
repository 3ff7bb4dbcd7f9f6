"""Writes a report: an HTML page, a summary in Markdown, a plot, and the figures in JSON."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.functional import to_pil_image

from eval.report.cautions import cautions
from eval.report.page import render_html
from eval.report.plots import draw_tradeoff
from eval.report.schema import Report, Row
from eval.report.table import escape, markdown_table, not_measured, range_notes, softmax_notes
from illama.atomic_write import list_folder, write_file
from illama.data.datasets import Sample
from illama.errors import UserError
from illama.manifest import is_bundle
from illama.structured_files import read_json

SUMMARY, FIGURES, PAGE, MARKDOWN = "summary.json", "report.json", "report.html", "report.md"
TRADEOFF = "tradeoff.png"
SIDE = 96  # pixels of a thumbnail
FILES = (SUMMARY, FIGURES, PAGE, MARKDOWN, TRADEOFF)


def write_report(
    report: Report, folder: Path, thumbnails: Mapping[int, str] | None = None, shown_as: Path | None = None
) -> None:
    """Writes each of ``FILES`` into an existing folder.

    Args:
        shown_as: path of the folder in the page's commands, if it will be renamed.
        thumbnails: data URIs (PNG or JPEG) of flipped images, by their index in the test split.

    Raises:
        ValueError: the report has no rows, or a thumbnail is not such a URI.
    """
    picture = draw_tradeoff(report)
    contents = {
        PAGE: render_html(report, picture, thumbnails or {}, shown_as or folder).encode(),
        MARKDOWN: markdown_summary(report).encode(),
        FIGURES: _json({**report.to_json(), "warnings": cautions(report)}),
        SUMMARY: _json(summary(report)),
        TRADEOFF: picture,
    }
    for name, content in contents.items():
        with write_file(folder / name) as draft:
            draft.write_bytes(content)


def write_and_print(report: Report, split: Dataset[Sample], folder: Path, shown_as: Path) -> None:
    """Writes a report with thumbnails of flipped images, and prints its table and its choice.

    Args:
        split: the whole test split.
        folder: folder of the report; may be a temporary one that is later renamed to ``shown_as``, which is printed.
    """
    flipped = [flip.image for row in report.rows for flip in row.flipped]
    write_report(report, folder, draw_thumbnails(split, flipped), shown_as)
    batch = report.constraints.batch
    print(f"\n{markdown_table(report.rows, batch, report.pareto(batch))}\n")
    print(report.decision.choice.sentence)
    warned = [f"warning: {each}" for each in cautions(report)]
    for line in (*warned, *range_notes(report), *softmax_notes(report), *report.not_run):
        print(line)
    print(f"{report.seconds['all']:.0f} s, {report.peak_memory_gib} GiB; report: {shown_as / PAGE}")


def draw_thumbnails(split: Dataset[Sample], indices: Iterable[int]) -> dict[int, str]:
    """Returns, by index, the image as a data URI: JPEG, or PNG if it is no larger than a thumbnail."""
    return {index: _data_uri(split[index][0]) for index in sorted(set(indices))}


def _data_uri(image: Image.Image | Tensor) -> str:
    picture = to_pil_image(image) if isinstance(image, Tensor) else image.convert("RGB")
    small = max(picture.size) <= SIDE
    picture.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG" if small else "JPEG", quality=85)
    return f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def summary(report: Report) -> dict[str, Any]:
    """Returns the contents of ``summary.json``: the table alone, in a stable form for scripts."""
    rows = [_summarize(row, report.constraints.batch) for row in report.rows]
    return {"rows": rows, "machine": report.machine, "versions": report.versions}


def _summarize(row: Row, batch: int) -> dict[str, Any]:
    latency = row.at(batch)
    return {
        "scheme": row.scheme,
        "runtime": row.runtime,
        "images": row.images,
        "top1": row.top1.percent if row.labeled else None,
        "agreement": row.change.agreement if row.change else None,
        "sqnr_db": row.sqnr,
        "cosine": row.cosine,
        "drop": row.drop.points,
        "drop_ci95": [row.drop.low, row.drop.high],
        "kept": row.kept,
        "onnx": row.onnx,
        "onnx_bytes": row.onnx_bytes,
        "engine": row.engine,
        "engine_bytes": row.engine_bytes,
        "latency_ms": {"p50": latency.p50, "p90": latency.p90, "p99": latency.p99, "batch": batch} if latency else None,
        "device": row.device,
    }


@dataclass(frozen=True)
class _Summary:
    rows: tuple[Mapping[str, Any], ...]


def is_result(folder: Path) -> bool:
    """Returns whether a folder holds only the files of :func:`write_report` and the bundles of its rows, or bundles."""
    if not (folder / SUMMARY).exists():
        found = list_folder(folder) if folder.is_dir() else []
        return bool(found) and all(map(is_bundle, found))
    try:
        rows = read_json(folder / SUMMARY, _Summary, unknown="ignore").rows
        ours = {*FILES, "reliability.png", *(Path(str(row["onnx"])).parts[0] for row in rows)}
    except (UserError, LookupError):
        return False
    return {path.name for path in list_folder(folder)} <= ours


def markdown_summary(report: Report) -> str:
    """Returns a summary, short enough for a comment on a pull request."""
    batch, images = report.constraints.batch, report.rows[0].images
    pareto = report.pareto(batch)
    devices = ", ".join(dict.fromkeys(row.device for row in report.rows if row.at(batch) and row.device))
    lines = [
        f"**{escape(report.decision.choice.sentence)}**",
        "",
        markdown_table(report.rows, batch, pareto),
        "",
        f"{escape(report.checkpoint)} on {escape(report.data)}: {images:,} test images"
        + (f"; latency of one call at batch {batch}, on {escape(devices)}." if devices else ".")
        + (" Bold: on the Pareto front." if pareto else ""),
    ]
    half = [*range_notes(report), *softmax_notes(report)]
    for title, texts in (("Warnings", cautions(report)), ("Half precision", half)):
        if texts:
            lines += ["", f"{title}:", "", *(f"- {escape(text)}" for text in texts)]
    if reasons := not_measured(report):
        lines += ["", "Not measured:", "", *(f"- {escape(reason)}" for reason in reasons)]
    return "\n".join(lines) + "\n"
