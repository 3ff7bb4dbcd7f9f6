"""A report with all fields set, and strings that would break a page that did not escape them."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

from eval.measure.latency import Latency
from eval.metrics.calibration import Bin, Reliability
from eval.metrics.paired import Change, ClassChange, Flips, McNemar, Share
from eval.report.pareto import decide
from eval.report.schema import FlippedImage, OtherResult, Report, Row
from illama.manifest import Drop
from illama.options import Constraints

HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"
CLASSES = (HOSTILE, *(f"class {i}" for i in range(1, 60)))


def make_reliability(ece: float) -> Reliability:
    diagram = (Bin(0.4, 0.4667, 5, 0.44, 0.4), Bin(0.9333, 1.0, 995, 0.98, 0.98 - ece))
    return Reliability(ece, ece + 0.001, 0.3, 0.12, diagram)


def make_change(seed: int) -> Change:
    points = np.random.default_rng(seed).choice([-5.0, 0.0, 5.0], len(CLASSES))
    points[59] = -15.0
    classes = tuple(ClassChange(i, 20, 90.0, 90.0 + p, 0.4 if i < 59 else 0.001, i == 59) for i, p in enumerate(points))
    return Change(McNemar(3, 2, 0.99), Flips(np.arange(3), np.arange(3, 5), np.array([7])), 99.4, -0.01, classes)


def make_row(name: str, top1: float, p50: float | None, **fields) -> Row:
    scheme, _, runtime = name.partition(", ")
    batches = (1, 8) if p50 else ()
    latency = [Latency(b, p50 * b * 1.1, p50 * b, p50 * b * 1.3, p50 * b * 2, 400, 0.01) for b in batches]
    loss = 93 - top1
    return Row(
        **{
            "scheme": scheme,
            "runtime": runtime,
            "runtime_id": "onnxruntime",
            "file": "model.onnx",
            "evaluated_with": "onnxruntime",
            "images": 1200,
            "top1": Share(top1, top1 - 1.5, top1 + 1.4),
            "top5": Share(99.5, 99, 99.8),
            "drop": Drop(loss, loss - 0.25, loss + 0.25),
            "reliability": make_reliability(0.08),
            "onnx": f"{scheme}/model.onnx",
            "onnx_bytes": 2_000_000,
            "sha256": {f"{scheme}/model.onnx": "0f" * 32},
            "change": make_change(len(name)),
            "temperature": 0.7,
            "scaled": make_reliability(0.01),
            "latency": latency,
            "device": "a <CPU>" if p50 else None,
            **fields,
        }
    )


def make_report() -> Report:
    flips = [FlippedImage(0, 0, 0, 2), FlippedImage(1, 5, 5, 6), FlippedImage(3, 4, 9, 4), FlippedImage(7, 1, 2, 3)]
    rows = [
        make_row(
            "fp32, ONNX Runtime, CPU", 93.0, 4.0, reference=True, change=None, onnx_bytes=6_000_000, drop=Drop(0, 0, 0)
        ),
        make_row("int8, ONNX Runtime, CPU", 92.9, 1.0, flipped=flips),
        make_row("fp8|odd, OpenVINO, CPU", 92.7, 2.0),
        make_row("w4, PyTorch, CPU", 92.0, 10.0, temperature=None, scaled=None),
        make_row(
            "fp8, TensorRT-RTX",
            93.1,
            None,
            engine="fp8/engines/tensorrt_rtx.engine",
            file="engines/tensorrt_rtx.engine",
            engine_bytes=9_000_000,
            note=f"not run {HOSTILE}",
        ),
    ]
    markdown = (
        f"## Corrupted\n\n| corruption | top-1 % |\n|---|---:|\n| fog {HOSTILE} | 25.93 |\n\n![x](http://far.example/a)"
    )
    constraints = Constraints(1, 8.0, 0.8, 7.0)
    return Report(
        rows=rows,
        decision=decide(rows, constraints),
        command=f"python eval/tradeoff.py --out {HOSTILE}",
        data=f"data & {HOSTILE}",
        checkpoint="weights",
        classes=CLASSES,
        machine={"cpu": "a <CPU>", "cores": 2, "gpu": None},
        versions={"torch": "2"},
        constraints=constraints,
        conditions={"threads": 2, "clocks": {"before": [1, 2]}},
        calibration_images=512,
        seconds={"time": 1.5},
        not_run=["No GPU."],
        peak_memory_gib=1.0,
        layers={"int8": [["head", "int8", ""]]},
        findings={"int8/model.onnx": [f"warning, quantized-residual: {HOSTILE}"], "fp32/model.onnx": []},
        others=[OtherResult("Robustness", "results/x.md", "python eval/robustness.py", {"cpu": "c"}, markdown)],
    )


def make_thumbnails() -> dict[int, str]:
    buffer = io.BytesIO()
    Image.new("L", (28, 28), 90).save(buffer, "PNG")
    uri = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return {0: uri, 1: uri, 3: uri}
