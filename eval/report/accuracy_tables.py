"""Tables of accuracy, of changed predictions and of calibration, and their results on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from eval.measure.open_bundles import OpenBundles
from eval.metrics.calibration import Reliability
from eval.metrics.measured import Measured
from eval.metrics.paired import Change
from eval.report.schema import plain
from eval.report.store import write_results
from illama.inference import chance_note
from illama.markdown_table import markdown

_SHOWN = 8  # number of lost images that are named


def write_accuracy(
    folder: Path,
    settings: Mapping[str, Any],
    bundles: OpenBundles,
    measured: Mapping[str, Measured],
    failed: Mapping[str, str],
) -> None:
    """Prints the tables, and writes them and accuracy.json into a folder.

    Args:
        settings: ``data`` and ``calibration_images``, as the user gave them.
        failed: model -> why it has no temperature.
    """
    reference = next(iter(measured))
    images = measured[reference].images
    print(f"{images} images of {settings['data']}; reference: {reference}\n")
    models = {
        name: {"runtime": bundles.runtimes[name], "sha256": bundles.files[name], **plain(asdict(each))}
        for name, each in measured.items()
    }
    content = {
        "data": settings["data"],
        "images": images,
        "reference": reference,
        "calibration_images": settings["calibration_images"],
        "models": models,
    }
    write_results(folder, "accuracy", content, accuracy_tables(measured, failed, bundles))


def accuracy_tables(measured: Mapping[str, Measured], failed: Mapping[str, str], bundles: OpenBundles) -> str:
    """Returns the tables of accuracy, changes and calibration, in Markdown."""
    accuracy = [(name, bundles.runtimes[name], str(each.top1), str(each.top5)) for name, each in measured.items()]
    parts = [markdown(("model", "run by", "top-1 % (95% interval)", "top-5 % (95% interval)"), accuracy)]
    changes = {name: each.change for name, each in measured.items() if each.change}
    if changes:
        parts += [_changes(changes), _details(changes, bundles.classes)]
    name, reference = next(iter(measured.items()))
    note = chance_note(name, reference.top1.percent, len(bundles.classes))
    return "\n\n".join([*parts, _calibration(measured, failed), *([note] if note else [])])


def _changes(changes: Mapping[str, Change]) -> str:
    heads = ("model", "same class %", "right to wrong", "wrong to right", "wrong to wrong", "McNemar's p", "confidence")
    return markdown(
        heads,
        [
            (
                name,
                f"{change.agreement:.2f}",
                str(change.test.lost),
                str(change.test.gained),
                str(len(change.flips.moved)),
                f"{change.test.p:.3f}",
                f"{change.confidence_shift:+.4f}",
            )
            for name, change in changes.items()
        ],
    )


def _details(changes: Mapping[str, Change], classes: tuple[str, ...]) -> str:
    lines = []
    for name, change in changes.items():
        significant = [
            f"{classes[each.label]} {each.reference:.1f} to {each.other:.1f}%"
            for each in change.classes
            if each.significant
        ]
        first = " ".join(map(str, change.flips.lost[:_SHOWN]))
        lines.append(
            f"- {name}: classes that changed significantly: {', '.join(significant) or 'none'}; "
            f"first images lost: {first or 'none'}"
        )
    return "\n".join(lines)


def _calibration(measured: Mapping[str, Measured], failed: Mapping[str, str]) -> str:
    heads = ("model", "temperature", "ECE %", "adaptive ECE %", "NLL", "Brier")
    rows = []
    for name, each in measured.items():
        if each.reliability:
            rows.append((name, "none", *_reliability(each.reliability)))
        if each.scaled:
            rows.append((name, f"{each.temperature:.3f}", *_reliability(each.scaled)))
    missing = [f"- {name}: no temperature: {failed[name]}" for name, each in measured.items() if not each.scaled]
    return "\n\n".join([markdown(heads, rows), *(["\n".join(missing)] if missing else [])])


def _reliability(each: Reliability) -> tuple[str, ...]:
    return f"{each.ece * 100:.2f}", f"{each.adaptive_ece * 100:.2f}", f"{each.nll:.4f}", f"{each.brier:.4f}"
