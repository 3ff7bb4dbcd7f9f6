"""Lints what other tools write: python benchmarks/lint_peers.py

Checks the files that ``benchmarks/quant_peers.py`` and ``benchmarks/same_task.py`` wrote, those of this toolkit among
them, and faults from public reports, each rebuilt in the INT8 graph of the shipped network or in a small graph. Writes
``lint.json`` and ``lint.md`` to ``results/lint``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from peers.findings import count_findings

from illama.cli import run_command
from deploy.findings.lint_graph import lint_graph
from deploy.rewrites.lower_opset import lower_opset
from deploy.versions import newest_runtimes
from eval.report.store import write_results
from illama.bundle import CPU_ONNX, FUSED_ONNX
from illama.errors import UserError
from illama.graph.reader import add_constant, is_constant, load_graph
from illama.graph.replacement import Replacement
from illama.graph.writer import save_graph
from illama.markdown_table import markdown

# Folder of runs/quant-peers/fashion-mnist, or file of runs/same-task -> tool.
_PEERS = {
    "modelopt-onnx": "ModelOpt, ONNX, default",
    "modelopt-torch-int8": "ModelOpt, PyTorch, INT8",
    "modelopt-torch-smoothquant": "ModelOpt, PyTorch, SmoothQuant",
    "ort-u8s8": "ONNX Runtime, quantize_static, default",
    "ort-u8s8-products": "ONNX Runtime, quantize_static, products only",
    "ort-dynamic": "ONNX Runtime, quantize_dynamic",
}
_SAME_TASK = {
    "modelopt-int8.onnx": "ModelOpt, ONNX, default, ViT-Tiny of timm",
    "nncf-int8.onnx": "NNCF, TRANSFORMER, ViT-Tiny of timm",
    "olive/model.onnx": "Olive, static, ViT-Tiny of timm",
}
_OURS = ("int8", "int8-accurate", "int8-attention", "fp8", "fp8-attention", "w4a8", "w6a6")


@dataclass(frozen=True)
class LintPeersOptions:
    """Lint the files of other tools and faults from public reports.

    Attributes:
        peers: folder that benchmarks/quant_peers.py filled.
        same_task: folder that benchmarks/same_task.py filled.
        bundles: folder of python quant/ptq.py with int8 and fp16.
        out: folder for the results.
    """

    peers: Path = Path("runs/quant-peers/fashion-mnist")
    same_task: Path = Path("runs/same-task")
    bundles: Path = Path("runs/ptq")
    out: Path = Path("results/lint")


def main(options: LintPeersOptions) -> None:
    rows = [_row(tool, options.peers / name / CPU_ONNX) for name, tool in _PEERS.items()]
    rows += [_row(tool, options.same_task / name) for name, tool in _SAME_TASK.items()]
    rows += [_row(f"this toolkit, {name}", options.peers / f"ours-{name}" / CPU_ONNX, ours=True) for name in _OURS]
    bundles = [path for path in sorted(options.bundles.iterdir()) if (path / FUSED_ONNX).exists()]
    rows += [_row(f"this toolkit, {path.name}, for TensorRT", path / FUSED_ONNX, ours=True) for path in bundles]
    faults = [_fault_row(options, *fault) for fault in FAULTS]
    columns = ("file", "warnings and errors", "notes")
    table = markdown(columns, [[row["file"], row["found"] or "nothing", row["notes"] or "nothing"] for row in rows])
    second = markdown(
        ("reported fault", "source", "found"),
        [[row["fault"], row["source"], row["found"] or "NOT FOUND"] for row in faults],
    )
    write_results(options.out, "lint", {"files": rows, "faults": faults}, f"{table}\n\n{second}")


def _row(name: str, path: Path, ours: bool = False) -> dict[str, Any]:
    """Returns what the linter finds in a file, as counts by rule; ours are checked for their own runtime."""
    if not path.exists():
        raise UserError(f"{path} does not exist: run benchmarks/quant_peers.py, same_task.py and quant/ptq.py first")
    found, notes = count_findings(path, newest_runtimes().get(path.name) if ours else None)
    return {"file": name, "found": found, "notes": notes}


def _fault_row(
    options: LintPeersOptions, name: str, source: str, graph: str, damage: Callable[[ir.Model], None]
) -> dict[str, str]:
    model = load_graph(options.bundles / graph)
    damage(model)
    path = Path("runs/lint") / FUSED_ONNX
    path.parent.mkdir(parents=True, exist_ok=True)
    save_graph(model, path)
    rules = dict.fromkeys(each.rule for each in lint_graph(path) if each.severity != "note")
    return {"fault": name, "source": source, "found": ", ".join(rules)}


def _quantize(graph: ir.Graph, node: ir.Node, index: int, scale: float = 0.05) -> None:
    """Inserts Q/DQ before an input of an operator."""
    value = node.inputs[index]
    assert value is not None and value.dtype is not None
    number = add_constant(graph, f"fault.scale.{value.dtype.name}", np.array(scale, value.dtype.numpy()))
    zero = add_constant(graph, "fault.zero", np.array(0, np.int8))
    quantize = ir.node("QuantizeLinear", [value, number, zero], name=f"{node.name}/fault_q{index}")
    dequantize = ir.node("DequantizeLinear", [quantize.outputs[0], number, zero], name=f"{node.name}/fault_dq{index}")
    for each, dtype in ((quantize, ir.DataType.INT8), (dequantize, value.dtype)):
        each.outputs[0].name, each.outputs[0].type = each.name, ir.TensorType(dtype)
        each.outputs[0].shape = value.shape
    graph.insert_before(node, [quantize, dequantize])
    node.replace_input_with(index, dequantize.outputs[0])


def quantize_residuals(model: ir.Model) -> None:
    """Inserts Q/DQ at both inputs of every residual addition."""
    for node in list(model.graph):
        if node.op_type == "Add" and not any(map(is_constant, node.inputs)) and "rotary" not in str(node.name):
            for index in range(2):
                _quantize(model.graph, node, index)


def quantize_norms(model: ir.Model) -> None:
    """Inserts Q/DQ before every normalization."""
    for node in list(model.graph):
        if node.op_type == "RMSNormalization":
            _quantize(model.graph, node, 0)


def square_in_half(model: ir.Model) -> None:
    """Computes every normalization in float16, with a Pow."""
    lower_opset(model, 21)
    for node in list(model.graph):
        if node.op_type == "ReduceMean":
            square = node.inputs[0].producer()  # type: ignore[union-attr]
            assert square is not None
            parts = Replacement(model.graph, square)
            narrow = parts.add("Cast", [square.inputs[0]], ir.DataType.FLOAT16, to=ir.DataType.FLOAT16)
            power = parts.add("Pow", [narrow, parts.constant("two", 2, ir.DataType.FLOAT16)])
            mean = parts.add("ReduceMean", [power, node.inputs[1]], keepdims=1)
            parts.finish(parts.add("Cast", [mean], ir.DataType.FLOAT, to=ir.DataType.FLOAT))
            node.op_type, node.name = "Identity", f"{node.name}_identity"
            node.resize_inputs(1)
            node.attributes.clear()


def quantize_keys(model: ir.Model) -> None:
    """Inserts Q/DQ at q and k of every attention, but not at v."""
    for node in list(model.graph):
        if node.op_type == "Attention":
            for index in range(2):
                _quantize(model.graph, node, index)


def quantize_scores(model: ir.Model) -> None:
    """Inserts Q/DQ before every softmax."""
    lower_opset(model, 21)
    for node in list(model.graph):
        if node.op_type == "Softmax":
            _quantize(model.graph, node, 0)


def zero_scales(model: ir.Model) -> None:
    """Sets the scale of one layer to zero, as float16 does below 6e-8."""
    scale = next(node.inputs[1] for node in model.graph if node.op_type == "QuantizeLinear")
    assert scale is not None and scale.const_value is not None
    scale.const_value = ir.tensor(np.zeros_like(scale.const_value.numpy()), name=scale.name)


def overflow_weight(model: ir.Model) -> None:
    """Sets a weight to infinity, as a cast to float16 does above 65504."""
    bias = next(value for name, value in model.graph.initializers.items() if name.endswith("qkv.bias"))
    assert bias.const_value is not None
    numbers = bias.const_value.numpy().copy()
    numbers[0] = np.inf
    bias.const_value = ir.tensor(numbers, name=bias.name)


_INT8, _FP16 = f"int8/{FUSED_ONNX}", f"fp16/{FUSED_ONNX}"
FAULTS: tuple[tuple[str, str, str, Callable[[ir.Model], None]], ...] = (
    ("Q/DQ on residual additions: 0% top-1 of a ViT", "alibaba/TinyNeuralNetwork 204", _INT8, quantize_residuals),
    ("Q/DQ before normalizations: cosine 0.61", "wyoming-whisper-trt 1052", _INT8, quantize_norms),
    ("a normalization's Pow in float16", "onnxruntime 13639", _FP16, square_in_half),
    ("attention not fused because of Q/DQ", "NVIDIA/TensorRT 4167", _INT8, quantize_keys),
    ("Q/DQ between product and softmax", "NVIDIA/TensorRT 3243", _INT8, quantize_scores),
    ("a scale of zero", "NVIDIA/TensorRT 2498", _INT8, zero_scales),
    ("a weight beyond float16", "NVIDIA/TensorRT 4748", _FP16, overflow_weight),
)


if __name__ == "__main__":
    run_command(LintPeersOptions, main)
