"""What a reader must know before believing a report; shown above everything else."""

from __future__ import annotations

from collections.abc import Sequence

from eval.metrics.measured import NN_AGREEMENT
from eval.report.schema import Report, Row
from illama.inference import chance_note
from illama.nearest_neighbors import NEIGHBORS

_VOTE = (
    f"k-NN top-1 is the accuracy of a vote of the {NEIGHBORS} most similar of {{}} calibration images. It tells files "
    "apart; it is not the accuracy of a task."
)
_NEAREST = (
    f"{NN_AGREEMENT} is the share of images for which a file finds the same most similar one of {{}} calibration "
    "images as {}. Similar images are easily exchanged."
)
_STEADY = 2.0  # the largest p90 of an idle machine, relative to the p50


def cautions(report: Report) -> list[str]:
    """Returns warnings about a report's accuracies and latencies, the most serious first."""
    reference, timed = report.reference, [row for row in report.rows if row.latency]
    found = [f"{each.name} failed and is in no comparison: {each.reason}" for each in report.failed]
    if reference and reference.features:
        task = (_VOTE if reference.labeled else _NEAREST).format(report.calibration_images, reference.name)
        found.append(f"The network has no classifier: {task}")
    elif reference and not reference.labeled:
        found.append(
            f"The pictures have no classes: accuracy is unknown, and files are compared with {reference.name}. "
            "If that is wrong for a picture, a file that agrees is wrong too."
        )
    if reference and (note := chance_note(reference.name, reference.top1.percent, len(report.classes))):
        found.append(f"{note}.")
    ratios = {row.name: each.p90 / each.p50 for row in timed if (each := row.latency[0]).p90}
    if unsteady := [row for row in timed if ratios.get(row.name, 0) > _STEADY]:
        found.append(
            f"Latencies vary as under other load: p90 is up to {max(ratios.values()):.1f} times p50, for "
            f"{_names(unsteady)}. Time again on an idle machine."
        )
    if few := [row for row in timed if row.latency[0].p90 is None]:
        found.append(f"Too few calls for a p90 of {_names(few)}: give more --seconds.")
    limit = report.constraints.drop
    wide = [row for row in report.rows if _is_wide(row, limit)]
    if wide:
        kept = wide[0].metric if wide[0].labeled else "nearest images" if wide[0].features else "predictions"
        asked = f"whether they keep 99% of the reference's {kept}" if limit is None else f"a drop of {limit:g} points"
        found.append(f"{wide[0].images:,} test images are too few to tell {asked}, for {_names(wide)}.")
    return found


def _is_wide(row: Row, limit: float | None) -> bool:
    """Whether the interval of a row's drop is too wide for the limit, or without one for 99% of the reference."""
    if limit is None:
        return row.kept == "too few images"
    return not row.reference and row.drop.points <= limit < row.drop.high


def _names(rows: Sequence[Row]) -> str:
    names = [row.name for row in rows]
    return "; ".join(names[:3]) + (f"; and {len(names) - 3} more" if len(names) > 3 else "")
