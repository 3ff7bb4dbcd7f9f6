"""Attention operators in parts: for runtimes without the operator, and to see what it computes inside."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from illama.errors import UserError
from illama.graph.reader import SoftmaxOutput, layer_of
from illama.graph.replacement import Replacement


def decompose_attention(
    graph: ir.Graph, attention: ir.Node, output: SoftmaxOutput | None = None, scores: ir.DataType | None = None
) -> None:
    """Replaces an Attention by its parts, in place.

        before   Attention(q, k, v, mask)
        after    MatMul(q, Transpose(k)) -> Mul(scale) -> mask -> Softmax [-> Q/DQ] -> MatMul(v)

    Args:
        output: how the softmax output is quantized, if it is.
        scores: dtype of the scores, in which they are rounded; the output's if not given.

    Raises:
        UserError: the attention has an option that is not supported here.
    """
    options = {name: attribute.value for name, attribute in attention.attributes.items()}
    q, k, v, mask = [*attention.inputs, None][:4]
    half = attention.outputs[0].dtype
    assert q is not None and k is not None and q.shape is not None and k.shape is not None and half is not None
    more = any(value is not None for value in attention.inputs[4:]) or len(attention.outputs) > 1  # keys of before
    if more or options.get("is_causal") or options.get("softcap") or len(q.shape) != 4 or k.shape[1] != q.shape[1]:
        raise UserError(f"{layer_of(attention)} is an attention that cannot be split into its parts")
    scores = scores or half
    parts = Replacement(graph, attention)
    x = parts.add("MatMul", [q, parts.add("Transpose", [k], half, perm=(0, 1, 3, 2))], scores)
    scale = options.get("scale", float(str(q.shape[3])) ** -0.5)
    if scale != 1:
        x = parts.add("Mul", [x, parts.constant("scale", scale, scores)])
    if mask is not None and mask.dtype == ir.DataType.BOOL:
        x = parts.add("Where", [mask, x, parts.constant("masked", -np.inf, scores)], scores)
    elif mask is not None:
        x = parts.add("Add", [x, mask])
    x = parts.add("Softmax", [x], half, axis=-1)
    if output is not None:
        zero = parts.constant(f"zero_{output.number}", 0, output.dtype)
        steps = [parts.constant("output_scale", output.scale, half), zero]
        x = parts.add("QuantizeLinear", [x, *steps], output.dtype)
        x = parts.add("DequantizeLinear", [x, *steps], half)
    parts.finish(parts.add("MatMul", [x, v], half))
