"""Export to ONNX with standard operators only: opset 23, native 8-bit weights, dynamic batch."""

from __future__ import annotations

import copy
import logging
import warnings
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes
import torch
from onnxscript import opset23 as op
from onnxscript.optimizer import optimize
from torch import Tensor, nn

from illama.masks import Form
from illama.model import ILLaMA
from quant.layers import dequantize, quantize_dequantize

OPSET = 23
INPUT, OUTPUT = "images", "logits"
# ONNX's type of a number format, and the zero point that stands for 0.
_ZERO_POINTS = {
    "int8": (onnx.TensorProto.INT8, 0),
    "uint8": (onnx.TensorProto.UINT8, 0),
    "fp8": (onnx.TensorProto.FLOAT8E4M3FN, 0),
}
# The same numbers as int8's, in the type that the products of x86 CPUs take on the left; left to itself,
# ONNX Runtime converts some of them and runs the others several times slower.
_CPU_ZERO_POINTS = {**_ZERO_POINTS, "int8": (onnx.TensorProto.UINT8, 128)}


def export_onnx(model: ILLaMA, path: Path, form: Form, dtype: torch.dtype = torch.float32) -> None:
    """Write ``model`` to ``path``: images (batch, C, H, W) float32 -> logits (batch, num_classes) float32.

    Args:
        form: ``plain`` for CPUs, ``fused`` (one Attention operator per block) for TensorRT.
        dtype: float16 computes everything but the normalisations in half precision, as TensorRT's fused
            attention demands; inputs and outputs stay float32.
    """
    network = _Casting(copy.deepcopy(model).eval(), dtype)
    network.model.set_attention_form(form)
    config = model.config
    images = torch.zeros(2, config.in_channels, config.image_size, config.image_size)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            network, (images,), dynamo=True, opset_version=OPSET, optimize=False, verbose=False,
            input_names=[INPUT], output_names=[OUTPUT], dynamic_shapes=({0: torch.export.Dim("batch")},),
            custom_translation_table=translations(form),
        )  # fmt: skip
    assert program is not None
    graph = simplify(program.model)
    ir.save(graph, path)
    onnx.checker.check_model(path, full_check=True)


class _Casting(nn.Module):
    """A network in another precision behind float32 inputs and outputs."""

    def __init__(self, model: ILLaMA, dtype: torch.dtype) -> None:
        super().__init__()
        # Not model.to(dtype): that would turn the 8-bit floating-point weights into wide ones too.
        self.model = model._apply(lambda tensor: tensor.to(dtype) if tensor.dtype == torch.float32 else tensor)  # type: ignore[no-untyped-call]
        self.dtype = dtype

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images.to(self.dtype)).to(torch.float32)


def simplify(model: ir.Model) -> ir.Model:
    """Fold every constant, whatever its size, except Q/DQ, and drop what the exporter noted about its source."""
    limit = 2**40
    optimize(model, input_size_limit=limit, output_size_limit=limit)
    ir.passes.Sequential(
        passes.CommonSubexpressionEliminationPass(),
        passes.DeduplicateInitializersPass(size_limit=limit),
        passes.RemoveUnusedNodesPass(),
    )(model)
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
    return model


def translations(form: Form) -> dict[Any, Any]:
    """What our two operators are in ONNX; activations only, since weights are dequantized and nothing else."""
    zero_points = _CPU_ZERO_POINTS if form == "plain" else _ZERO_POINTS

    def to_onnx_quantize_dequantize(x: Any, scale: Any, number: str) -> Any:
        kind, value = zero_points[number]
        zero: Any = op.Constant(value=onnx.helper.make_tensor(f"zero_{number}", kind, [], [value]))
        quantized: Any = op.QuantizeLinear(x, scale, zero)
        return op.DequantizeLinear(quantized, scale, zero)

    def to_onnx_dequantize(weight: Any, scale: Any, axis: int) -> Any:
        return op.DequantizeLinear(weight, scale, axis=axis)

    return {
        quantize_dequantize._opoverload: to_onnx_quantize_dequantize,
        dequantize._opoverload: to_onnx_dequantize,
    }
