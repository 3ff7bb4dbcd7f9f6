"""Fused attention: an engine whose attention is split into several kernels is slow, so the build must fail instead.

TensorRT's parser imports ONNX's Attention as ``IAttention``, which by default may not be split ("decomposed"). The
operators and attributes whose names begin with TRT are the parser's own:
https://github.com/onnx/onnx-tensorrt/blob/main/docs/TRT_custom_ops.md
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from deploy.trt.library import Library
from illama.errors import UserError
from illama.graph.reader import add_constant, layer_of, read_softmax_scales

if TYPE_CHECKING:
    import tensorrt

_KERNELS = ("mha", "attention")  # in the names of fused kernels


def quantize_softmax_outputs(model: ir.Model) -> None:
    """Quantizes the softmax output inside each attention for which the scheme specifies it.

    q, k and v have their Q/DQ in the graph. The softmax output is inside the operator, where ONNX cannot have Q/DQ:

        before   Q/DQ -> Attention(q, k, v, mask)
        after    Q/DQ -> TRT_QuantizedAttention(q, k, v, mask, scale), normalization_quantize_to_type = dtype

    Raises:
        UserError: the graph has no attention of a name in its metadata; an earlier version exported it.
    """
    outputs = read_softmax_scales(model)
    attentions = {layer_of(node): node for node in model.graph if node.op_type == "Attention"}
    if missing := outputs.keys() - attentions.keys():
        raise UserError(f"the graph has no attention {min(missing)}: export it again with python quant/ptq.py")
    for layer, node in attentions.items():
        if output := outputs.get(layer):
            name = f"{layer}.softmax_output_scale"
            node.op_type = "TRT_QuantizedAttention"
            node.resize_inputs(5)  # no mask leaves the fourth empty
            node.replace_input_with(4, add_constant(model.graph, name, np.array(output.scale, dtype=np.float16)))
            node.attributes.add(ir.AttrInt64("normalization_quantize_to_type", output.dtype))


def allow_decomposition(model: ir.Model) -> None:
    """Lets the builder split attention into several kernels if it has no fused one.

    before   Attention(q, k, v, mask)
    after    Attention(q, k, v, mask), TRT_decomposable = 1
    """
    for node in model.graph:
        if node.op_type == "Attention":
            node.attributes.add(ir.AttrInt64("TRT_decomposable", 1))


def count_attentions(library: Library, network: tensorrt.INetworkDefinition) -> int:
    """Returns the number of ``IAttention`` in a parsed network; 0 if a softmax shows that an attention is not one."""
    kinds = [network.get_layer(index).type for index in range(network.num_layers)]
    layers = library.trt.LayerType
    return 0 if layers.SOFTMAX in kinds else kinds.count(layers.ATTENTION_INPUT)


def fused_kernels(information: str) -> list[str]:
    """Returns the fused attention kernels of an engine.

    They are found by their own names (tactics): a layer has the name of its ONNX node, whether it is fused or not.

    Args:
        information: JSON of the engine inspector, of an engine with detailed profiling verbosity.
    """
    layers = json.loads(information).get("Layers", [])
    tactics = [str(layer.get("TacticName", "")) for layer in layers if isinstance(layer, dict)]
    return [tactic for tactic in tactics if any(word in tactic.lower() for word in _KERNELS)]
