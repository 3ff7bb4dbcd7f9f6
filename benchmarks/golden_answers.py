"""Prints the errors of right engines and of wrong ones, beside their tolerances: python benchmarks/golden_answers.py

Exports the shipped network by every scheme for ONNX, and runs its golden answers in each runtime for CPUs: calibration
images and noise. Then it doubles the scale of one weight after the other, the smallest fault that golden answers should
find. At the end it times the verification of an iLLaMA-Tiny at 224 pixels, with random weights. Writes
``golden-answers.json`` and ``golden-answers.md`` to ``results/golden-answers``.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
import torch.nn.functional as F

from illama.cli import run_command
from deploy.runtimes.engine import Engine
from deploy.runtimes.onnxruntime_engine import OnnxRuntimeEngine
from deploy.runtimes.openvino_engine import OpenVinoEngine
from deploy.runtimes.verification import verify
from eval.report.store import write_results
from illama import ILLaMA, ModelConfig
from illama.bundle import CPU_ONNX, FUSED_ONNX, GOLDEN
from illama.data.preprocessing import Preprocessing
from illama.errors import UserError
from illama.golden_answers import GoldenAnswers, relative_error
from illama.graph.reader import array, is_constant, load_graph
from illama.graph.writer import save_graph
from illama.manifest import Provenance
from illama.markdown_table import markdown
from illama.options import Count, SourceOptions
from quant.export.golden import golden_answers
from quant.export.write_bundle import Origin, plan_quantization, quantize, write_graphs, write_quantized
from quant.inputs import open_inputs
from quant.schemes.scheme import shipped_scheme
from quant.schemes.shipped import SHIPPED_SCHEMES

_COLUMNS = (
    "scheme",
    "images",
    "runtime",
    "float operators",
    "error, %",
    "tolerance, %",
    "smallest error with a doubled scale, %",
)


@dataclass(frozen=True)
class GoldenOptions:
    """Compare the errors of right and wrong engines with the tolerances of golden answers.

    Attributes:
        calibration_images: number of calibration images.
        out: folder for the results.
    """

    calibration_images: Count = 512
    out: Path = Path("results/golden-answers")


def main(options: GoldenOptions) -> None:
    inputs = open_inputs(SourceOptions(calibration_images=options.calibration_images))
    origin, rows = Origin.of(inputs), []
    for name in ("fp32", *SHIPPED_SCHEMES):
        with tempfile.TemporaryDirectory() as folder:
            bundle, network = Path(folder), inputs.model
            if name == "fp32":
                write_graphs(bundle, network, origin, (CPU_ONNX, FUSED_ONNX), inputs.calibration)
            elif shipped_scheme(name).backend == "onnx":
                plan = plan_quantization(network, shipped_scheme(name))
                network = quantize(network, plan, inputs.calibration)
                write_quantized(bundle, network, plan, origin, inputs.calibration)
            else:
                continue
            noise = golden_answers(network, inputs.preprocessing, [], name != "fp32")
            for golden in (GoldenAnswers.read(bundle / GOLDEN), noise):
                for row in _rows(bundle, golden, name):
                    rows.append(row)
                    print(row, flush=True)
    table = markdown(_COLUMNS, [["" if value is None else str(value) for value in row.values()] for row in rows])
    timed = _time_tiny()
    times = markdown(
        ("Tiny at 224 pixels", "seconds to verify"), [[name, f"{took:.2f}"] for name, took in timed.items()]
    )
    write_results(options.out, "golden-answers", {"rows": rows, "seconds": timed}, f"{table}\n\n{times}")


def _time_tiny() -> dict[str, float]:
    """Returns the seconds that it takes to verify a larger network, in FP32 and INT8, in each runtime for CPUs."""
    torch.manual_seed(0)
    model, images, found = ILLaMA(ModelConfig.preset("tiny")).eval(), [F.interpolate(torch.rand(8, 3, 4, 4), 224)], {}
    origin = Origin(Preprocessing.imagenet(224), tuple(map(str, range(1000))), Provenance())
    plan = plan_quantization(model, shipped_scheme("int8"))
    for name, network in {"fp32": model, "int8": quantize(model, plan, images)}.items():
        with tempfile.TemporaryDirectory() as folder:
            quantization = None if name == "fp32" else plan.quantization
            bundle = write_graphs(Path(folder), network, origin, (CPU_ONNX,), images, quantization)
            for engine in (OnnxRuntimeEngine(bundle / CPU_ONNX), OpenVinoEngine(bundle / CPU_ONNX)):
                start = time.perf_counter()
                verify(engine, bundle / CPU_ONNX, remember=False)
                found[f"{name}, {engine.runtime}"] = round(time.perf_counter() - start, 3)
    return found


def _rows(bundle: Path, golden: GoldenAnswers, scheme: str) -> Iterator[dict[str, Any]]:
    """Yields the error of each runtime, and for ONNX Runtime the smallest one after a weight's scale was doubled."""
    cpu, fused = bundle / CPU_ONNX, bundle / FUSED_ONNX
    engines = {"ONNX Runtime": (OnnxRuntimeEngine, cpu), "OpenVINO": (OpenVinoEngine, cpu)}
    if fused.exists():
        engines["TensorRT, emulated"] = (OnnxRuntimeEngine, fused)
    for name, (kind, path) in engines.items():
        try:
            engine = kind(path)
        except UserError:  # OpenVINO runs no 4-bit activations
            continue
        yield {
            "scheme": scheme,
            "images": golden.facts.source,
            "runtime": name,
            "arithmetic": engine.arithmetic,
            "error": _percent(_error(engine, golden)),
            "tolerance": _percent(golden.facts.tolerances[engine.arithmetic]),
            "smallest error with a doubled scale": _smallest_fault(cpu, golden) if name == "ONNX Runtime" else None,
        }


def _error(engine: Engine, golden: GoldenAnswers) -> float:
    logits = engine.infer(golden.inputs(len(golden.images))).reshape(len(golden.images), -1)
    return relative_error(logits[:, golden.positions], golden.logits)


def _smallest_fault(path: Path, golden: GoldenAnswers) -> float | None:
    """Returns the smallest error, in percent, after the scale of one weight was doubled; None without such scales."""
    scales = [
        str(node.inputs[1].name)  # type: ignore[union-attr]
        for node in load_graph(path).graph
        if node.op_type == "DequantizeLinear" and is_constant(node.inputs[0])
    ]
    errors = []
    with tempfile.TemporaryDirectory() as folder:
        for scale in scales:
            model = load_graph(path)
            value = model.graph.initializers[scale]
            value.const_value = ir.tensor((2 * array(value)).astype(np.float32), name=scale)
            save_graph(model, Path(folder) / CPU_ONNX)
            errors.append(_error(OnnxRuntimeEngine(Path(folder) / CPU_ONNX), golden))
    return _percent(min(errors)) if errors else None


def _percent(share: float) -> float:
    return round(100 * share, 2)


if __name__ == "__main__":
    run_command(GoldenOptions, main)
