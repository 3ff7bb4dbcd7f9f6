"""The table of accuracy against latency: on the terminal, as summary.json and as one HTML file. It only draws."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import jinja2

from eval.accuracy_drop import Drop
from eval.latency import Latency

SUMMARY, REPORT, PLOT = "summary.json", "report.html", "tradeoff.png"
HEADINGS = ("scheme", "runs in", "top-1 %", "drop (95% interval)", "file MB", "engine MB", "p50 ms", "p99 ms")


@dataclass
class Row:
    """One deployable file and what was measured of it.

    Attributes:
        scheme: number format: fp32, fp16 or a quantization scheme.
        runtime: what the file is for.
        evaluated_with: what computed the logits that ``top1`` and ``drop`` come from.
        images: how many test images they cover.
        top1: percent.
        drop: points of top-1 lost against fp32 on the same images.
        onnx, engine: paths relative to the output folder; None where there is no such file.
        reference: the row that drops are against.
        fused: False for an engine whose attention may be in pieces.
        latency: None where the runtime could not run here, or only emulates the format.
        note: why something is missing.
    """

    scheme: str
    runtime: str
    evaluated_with: str
    images: int
    top1: float
    drop: Drop
    onnx: str
    onnx_bytes: int
    engine: str | None = None
    engine_bytes: int | None = None
    fused: bool = True
    reference: bool = False
    latency: Latency | None = None
    device: str | None = None
    note: str | None = None

    def to_json(self) -> dict[str, Any]:
        values = asdict(self)
        drop, latency = values.pop("drop"), values.pop("latency")
        return {
            **values,
            "drop": drop["points"],
            "drop_ci95": [drop["low"], drop["high"]],
            "latency_ms": latency,
        }

    def cells(self) -> tuple[str, ...]:
        """The row as text, in the order of ``HEADINGS``; a dash stands for what was not measured."""
        drop, latency = self.drop, self.latency
        return (
            self.scheme,
            self.runtime if self.fused else f"{self.runtime}, unfused",
            f"{self.top1:.2f}",
            "reference" if self.reference else str(drop),
            f"{self.onnx_bytes / 1e6:.2f}",
            f"{self.engine_bytes / 1e6:.2f}" if self.engine_bytes else "-",
            f"{latency.p50:.2f}" if latency else "-",
            f"{latency.p99:.2f}" if latency else "-",
        )


@dataclass
class Summary:
    """Everything a report shows; ``summary.json`` holds it.

    Attributes:
        layers: what each scheme did, in rows of layer, weight, input.
        seconds: of the steps, without Python's imports.
    """

    rows: list[Row]
    command: str
    data: str
    checkpoint: str
    calibration_images: int
    machine: dict[str, Any]
    versions: dict[str, str]
    seconds: dict[str, float] = field(default_factory=dict)
    not_run: list[str] = field(default_factory=list)
    peak_memory_gib: float = 0.0
    layers: dict[str, list[list[str]]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "rows": [row.to_json() for row in self.rows]}


def is_result(folder: Path) -> bool:
    """Whether a folder holds what :func:`write_report` and the bundles of its rows put there, and nothing else."""
    try:
        rows = json.loads((folder / SUMMARY).read_text())["rows"]
        ours = {SUMMARY, REPORT, PLOT, *(Path(row["onnx"]).parts[0] for row in rows)}
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return {path.name for path in folder.iterdir()} <= ours


def write_report(summary: Summary, folder: Path) -> None:
    """summary.json, a self-contained report.html, and its plot for slides."""
    (folder / SUMMARY).write_text(json.dumps(summary.to_json(), indent=2) + "\n")
    (folder / REPORT).write_text(render_html(summary))
    draw_tradeoff(summary.rows, folder / PLOT, dpi=130)


def markdown_table(rows: Sequence[Row]) -> str:
    """The table in Markdown, its columns aligned so that it reads well on a terminal too."""
    cells = [HEADINGS, *(row.cells() for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(HEADINGS))]
    lines = ["| " + " | ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def headline(rows: Sequence[Row]) -> str:
    """What was found, in a sentence: the fastest timed file, what it gains and what it costs."""
    timed = [row for row in rows if row.latency]
    reference = next((row for row in timed if row.scheme == "fp32"), None)
    best = min(timed, key=lambda row: row.latency.p50 if row.latency else 0.0, default=None)
    if reference is None or best is None or reference.latency is None or best.latency is None:
        return "Nothing was timed."
    if best is reference:
        return "Nothing timed here is faster than FP32."
    speed, size = reference.latency.p50 / best.latency.p50, reference.onnx_bytes / best.onnx_bytes
    change = f"loses {best.drop.points:.2f}" if best.drop.points >= 0 else f"gains {-best.drop.points:.2f}"
    return (
        f"{best.scheme.upper()} in {best.runtime} runs {speed:.1f} times as fast as FP32 at batch "
        f"{best.latency.batch}, in a file {size:.1f} times smaller, and {change} points of top-1 "
        f"(95% interval of the loss {best.drop.low:+.2f} to {best.drop.high:+.2f}) on {best.images:,} test images."
    )


def draw_tradeoff(rows: Sequence[Row], picture: Path | IO[str], **options: Any) -> None:
    """Accuracy against latency as a picture; a file that was not timed is a dashed line at its accuracy."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "report", "font.size": 10}):
        figure = Figure(figsize=(8.5, 3.8), layout="constrained")
        axes = figure.add_subplot()
        for index, row in enumerate(rows):
            label, color = f"{row.scheme}, {row.runtime}", f"C{index}"
            if row.latency:
                low, high = row.drop.points - row.drop.low, row.drop.high - row.drop.points
                axes.errorbar(row.latency.p50, row.top1, [[high], [low]], fmt="o", ms=8, capsize=4, color=color,
                              label=label)  # fmt: skip
            else:
                axes.axhline(row.top1, ls="--", lw=1.2, color=color, label=f"{label} (not timed)")
        axes.set(xlabel="latency, p50 in ms", ylabel="top-1 on the test split (%)")
        axes.set_xlim(0, 1.15 * max((row.latency.p50 for row in rows if row.latency), default=1.0))
        axes.grid(alpha=0.3)
        figure.legend(loc="outside right upper", fontsize=8, frameon=False)
        figure.savefig(picture, **options)


def plot_svg(rows: Sequence[Row]) -> str:
    """:func:`draw_tradeoff` as SVG, to stand in a page."""
    buffer = io.StringIO()
    draw_tradeoff(rows, buffer, format="svg", transparent=True, metadata={"Date": None})
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]


def render_html(summary: Summary) -> str:
    """The report as one HTML page without a single outside reference."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    template = jinja2.Environment(loader=loader, autoescape=True).get_template("report.html")
    batch = next((row.latency.batch for row in summary.rows if row.latency), None)
    return template.render(
        summary=summary, headings=HEADINGS, headline=headline(summary.rows), plot=plot_svg(summary.rows), batch=batch
    )
