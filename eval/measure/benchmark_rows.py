"""The rows of a report that describe benchmark targets, before they are timed."""

from __future__ import annotations

import os
from pathlib import Path

from eval.measure.evaluation_images import EvaluationImages
from eval.measure.targets import BenchmarkTarget
from eval.metrics.measured import Measured
from eval.metrics.paired import NO_DROP
from eval.metrics.predictions import Predictions
from eval.report.schema import FailedRow, FlippedImage, Row
from illama.bundle import sha256, size_of

SHOWN = 24  # flipped images of each kind that a report may show


def make_row(target: BenchmarkTarget, measured: Measured, out: Path) -> Row:
    """Returns the row of a target, without accuracy drop and latencies."""
    built, record = target.built or (None, None)
    files = [target.path, *([built] if built else [])]
    return Row(
        **vars(measured),
        scheme=target.scheme,
        runtime=target.runtime,
        runtime_id=target.runtime_id,
        file=target.key.file,
        precision=target.precision,
        evaluated_with=target.engine.runtime,
        drop=NO_DROP,
        onnx=os.path.relpath(target.path, out),
        onnx_bytes=size_of(target.path),
        engine=os.path.relpath(built, out) if built else None,
        engine_bytes=record.engine_bytes if record else None,
        quantized=not target.is_float,
        fused=record.fused if record else True,
        sha256={os.path.relpath(file, out): sha256(file) for file in files},
        note=target.not_timed.sentence if target.not_timed else None,
    )


def flipped_images(
    measured: Measured, reference: Predictions, own: Predictions, images: EvaluationImages
) -> list[FlippedImage]:
    """Returns some of the images whose predicted class is not the reference's, of each kind."""
    if measured.change is None:
        return []
    flips, facts = measured.change.flips, (own.labels, reference.predicted, own.predicted)
    return [
        FlippedImage(images.index_in_test_split(int(image)), *(int(of[image]) for of in facts))
        for kind in (flips.lost, flips.gained, flips.moved)
        for image in kind[:SHOWN]
    ]


def failed_row(target: BenchmarkTarget, reason: str) -> FailedRow:
    """Returns the row of a target that has no measurements."""
    return FailedRow(target.scheme, target.runtime, target.runtime_id, target.key.file, reason)
