"""TensorRT's own operators for formats with block scales, in the domain ``trt`` of its ONNX parser.

values, scales = TRT_FP4DynamicQuantize(x, tensor_scale)    float4e2m1, and a float8e4m3fn for every 16 channels
values, scales = TRT_MXFP8DynamicQuantize(x)                float8e4m3fn, and a power of two for every 32 channels
y = TRT_MXFP8DequantizeLinear(values, scales)               the powers of two are exponents plus 127, in uint8
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import onnx
import onnx_ir as ir
from onnx.defs import OpSchema

DOMAIN = "trt"
FP4_QUANTIZE, MXFP8_QUANTIZE = "TRT_FP4DynamicQuantize", "TRT_MXFP8DynamicQuantize"
MXFP8_DEQUANTIZE = "TRT_MXFP8DequantizeLinear"
_FP4 = (ir.DataType.FLOAT4E2M1, ir.DataType.FLOAT8E4M3FN)  # of values and scales
_MXFP8 = (ir.DataType.FLOAT8E4M3FN, ir.DataType.UINT8)


@cache
def register_operators() -> None:
    """Tells onnx what the operators of TensorRT take and return, without which it rejects graphs that have them."""
    floats = [f"tensor({name})" for name in ("float", "float16", "bfloat16")]
    x, scale, values = ("x", "T"), ("scale", "T2"), ("y", "tensor(float8e4m3fn)")
    exponents = ("y_scale", "tensor(uint8)")
    fp4 = [("y", "tensor(float4e2m1)"), ("y_scale", "tensor(float8e4m3fn)")]
    _register(FP4_QUANTIZE, ([x, scale], fp4), ("axis", "block_size", "scale_type"), floats)
    _register(MXFP8_QUANTIZE, ([x], [values, exponents]), ("axis", "block_size", "output_dtype"), floats)
    _register(MXFP8_DEQUANTIZE, ([values, exponents], [x]), ("axis", "block_size", "output_dtype"), floats)


def _register(
    name: str,
    parameters: tuple[Sequence[tuple[str, str]], Sequence[tuple[str, str]]],
    attributes: Sequence[str],
    floats: list[str],
) -> None:
    inputs, outputs = ([OpSchema.FormalParameter(*each) for each in part] for part in parameters)
    schema = OpSchema(
        name,
        DOMAIN,
        1,
        inputs=inputs,
        outputs=outputs,
        type_constraints=[(name, floats, "a float tensor") for name in ("T", "T2")],
        attributes=[OpSchema.Attribute(each, OpSchema.AttrType.INT, required=False) for each in attributes],
    )
    infer = _infer_dequantize if name == MXFP8_DEQUANTIZE else partial(_infer_quantize, name=name)
    schema.set_type_and_shape_inference_function(infer)
    onnx.defs.register_schema(schema)


def _infer_quantize(context: Any, name: str) -> None:
    """The values have the shape of x; the scales have one for each block of its last dimension."""
    fp4 = name == FP4_QUANTIZE
    block = _attribute(context, "block_size", 16 if fp4 else 32)
    for index, dtype in enumerate(_FP4 if fp4 else _MXFP8):
        result = onnx.TypeProto()
        result.CopyFrom(context.get_input_type(0))
        result.tensor_type.elem_type = int(dtype)
        if index and result.tensor_type.shape.dim:
            last = result.tensor_type.shape.dim[-1]
            last.dim_value = max(1, last.dim_value // max(1, block))
        context.set_output_type(index, result)


def _infer_dequantize(context: Any) -> None:
    result = onnx.TypeProto()
    result.CopyFrom(context.get_input_type(0))
    result.tensor_type.elem_type = _attribute(context, "output_dtype", int(ir.DataType.FLOAT))
    context.set_output_type(0, result)


def _attribute(context: Any, name: str, default: int) -> int:
    found = context.get_attribute(name)
    return default if found is None else int(found.i)
