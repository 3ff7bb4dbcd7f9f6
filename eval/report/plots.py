"""The plot of a report as PNG, for slides and for pages without JavaScript."""

from __future__ import annotations

import io
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from eval.report.schema import Report, Row

INK, QUIET, FAINT, WARN, DOMINATED = "#16202c", "#566273", "#d9dde3", "#b42318", "#8b95a3"
COLORS = ("#0b57d0", "#b54708", "#0f766e", "#7a3fc4", "#b4236a", "#4d5b12")  # of runtimes, as on the HTML page
MARKS = ("o", "s", "^", "D", "v", "P")
_DPI = 160


def draw_tradeoff(report: Report) -> bytes:
    """Plots top-1 against latency as PNG: Pareto fronts joined, dominated rows gray, untimed rows as dashed lines.

    Raises:
        ValueError: the report has no rows.
    """
    if not report.rows:
        raise ValueError("a report without rows cannot be drawn")
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    axes = figure.add_subplot()
    batch = report.constraints.batch
    best, chosen = report.pareto(batch), report.chosen
    styles = {each: i % len(COLORS) for i, each in enumerate(dict.fromkeys(row.runtime for row in report.rows))}
    for row in report.rows:
        style = styles[row.runtime]
        if latency := row.at(batch):
            _mark(axes, row, latency.p50, COLORS[style] if row.key in best else DOMINATED, MARKS[style])
            if row is chosen:
                axes.plot(latency.p50, row.top1.percent, "o", ms=15, mfc="none", mec=INK, mew=1.2, label="recommended")
        else:
            axes.axhline(row.top1.percent, ls=(0, (4, 4)), lw=1, color=COLORS[style], alpha=0.6)
    _name_untimed(axes, [row for row in report.rows if not row.at(batch)])
    for device in {row.device for row in report.rows if row.key in best}:
        _join_front(axes, [row for row in report.rows if row.key in best and row.device == device], batch)
    axes.set_xlim(0, 1.18 * max((each.p50 for row in report.rows if (each := row.at(batch))), default=1.0))
    _shade_limits(axes, report)
    axes.set_xlabel(f"p50 of one call at batch {batch}, ms")
    axes.set_ylabel(f"{report.metric}, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(QUIET)
    axes.tick_params(colors=QUIET, labelsize=9)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set_color(INK)
    axes.grid(color=FAINT, lw=0.6)
    _legend(figure, axes, report.rows, styles, batch)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    return buffer.getvalue()


def _mark(axes: Axes, row: Row, p50: float, color: str, mark: str) -> None:
    low, high = row.drop.points - row.drop.low, row.drop.high - row.drop.points
    low, high = min(low, 100 - row.top1.percent), min(high, row.top1.percent)
    axes.errorbar(
        p50, row.top1.percent, [[max(high, 0)], [max(low, 0)]], fmt=mark, ms=8, capsize=3, lw=1.2, color=color, zorder=3
    )
    below = color == DOMINATED  # away from the Pareto front
    axes.annotate(
        row.scheme,
        (p50, row.top1.percent),
        (8, -13 if below else 6),
        textcoords="offset points",
        color=QUIET if below else INK,
        fontsize=9,
        zorder=4,
        path_effects=[withStroke(linewidth=2.5, foreground="white")],
    )


def _join_front(axes: Axes, rows: Sequence[Row], batch: int) -> None:
    points = sorted((latency.p50, row.top1.percent) for row in rows if (latency := row.at(batch)))
    if points:
        axes.step([x for x, _ in points], [y for _, y in points], where="post", color=INK, lw=1.2, alpha=0.6, zorder=2)


def _name_untimed(axes: Axes, rows: Sequence[Row]) -> None:
    """Labels the lines of untimed rows with their schemes; lines that are close together share a label."""
    bottom, top = axes.get_ylim()
    groups: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: row.top1.percent):
        if groups and row.top1.percent - groups[-1][0].top1.percent < 0.045 * (top - bottom):
            groups[-1].append(row)
        else:
            groups.append([row])
    for group in groups:
        text, place = ", ".join(row.scheme for row in group), sum(row.top1.percent for row in group) / len(group)
        axes.annotate(
            text,
            (1, place),
            (5, 0),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            va="center",
            color=QUIET,
            fontsize=8.5,
            annotation_clip=False,
        )


def _shade_limits(axes: Axes, report: Report) -> None:
    """Shades the area that violates the constraints, within the limits of the axes."""
    reference = report.reference
    (_, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    if report.constraints.latency_ms is not None and report.constraints.latency_ms < right:
        axes.axvspan(report.constraints.latency_ms, right, color=WARN, alpha=0.08, lw=0)
    if report.constraints.drop is not None and reference and reference.top1.percent - report.constraints.drop > bottom:
        axes.axhspan(bottom, reference.top1.percent - report.constraints.drop, color=WARN, alpha=0.08, lw=0)
    axes.set_ylim(bottom, top)


def _legend(figure: Figure, axes: Axes, rows: Sequence[Row], styles: dict[str, int], batch: int) -> None:
    for runtime, style in styles.items():
        axes.plot([], [], MARKS[style], color=COLORS[style], label=runtime)
    axes.plot([], [], "o", color=DOMINATED, label="dominated")
    if not all(row.at(batch) for row in rows):
        axes.plot([], [], ls=(0, (4, 4)), color=QUIET, label="not timed")
    figure.legend(loc="outside lower center", ncols=3, fontsize=8.5, frameon=False, labelcolor=INK)
