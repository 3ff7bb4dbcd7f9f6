"""Fused attention: an engine whose attention is split into several kernels is slow, so the build must fail instead.

TensorRT's parser imports ONNX's Attention as ``IAttention``, which by default may not be split ("decomposed"). The
operators and attributes whose names begin with TRT are the parser's own:
https://github.com/onnx/onnx-tensorrt/blob/main/docs/TRT_custom_ops.md
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from annotated_types import Interval
from onnx import ModelProto, TensorProto, helper

from deploy.trt.library import Library
from illama.bundle import SOFTMAX_OUTPUT
from illama.graph.reader import Index
from illama.structured_files import parse_json

if TYPE_CHECKING:
    import tensorrt

_KERNELS = ("mha", "attention")  # in the names of fused kernels
_ONNX_TYPES = {"fp8": TensorProto.FLOAT8E4M3FN, "int8": TensorProto.INT8}


@dataclass(frozen=True)
class SoftmaxOutput:
    """How the scheme quantizes the softmax output of one attention.

    Attributes:
        dtype: fp8 or int8.
        scale: quantization scale.
    """

    dtype: str
    scale: float


@dataclass(frozen=True)
class _Stored:
    number: Literal["fp8", "int8"]
    scale: Annotated[float, Interval(gt=0, lt=math.inf)]


def read_softmax_scales(model: ModelProto) -> dict[str, SoftmaxOutput]:
    """Returns attention -> how its softmax output is quantized, from the metadata that the exporter wrote."""
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    text = metadata.get(SOFTMAX_OUTPUT, "{}")
    outputs = parse_json(text, dict[str, _Stored], f"the graph's metadata {SOFTMAX_OUTPUT}")
    return {name: SoftmaxOutput(stored.number, stored.scale) for name, stored in outputs.items()}


def quantize_softmax_outputs(model: ModelProto) -> None:
    """Quantizes the softmax output inside each attention for which the scheme specifies it.

    q, k and v have their Q/DQ in the graph. The softmax output is inside the operator, where ONNX cannot have Q/DQ:

        before   Q/DQ -> Attention(q, k, v, mask)
        after    Q/DQ -> TRT_QuantizedAttention(q, k, v, mask, scale), normalization_quantize_to_type = dtype
    """
    index, outputs = Index(model), read_softmax_scales(model)
    for node in model.graph.node:
        output = outputs.get(node.name.partition("/")[0])
        if node.op_type == "Attention" and output is not None:
            scale = index.add_constant(f"{node.name}.softmax_output_scale", np.array(output.scale, dtype=np.float16))
            node.op_type = "TRT_QuantizedAttention"
            node.input.extend([*[""] * (4 - len(node.input)), scale])  # "" if there is no mask
            node.attribute.append(helper.make_attribute("normalization_quantize_to_type", _ONNX_TYPES[output.dtype]))


def allow_decomposition(model: ModelProto) -> None:
    """Lets the builder split attention into several kernels if it has no fused one.

    before   Attention(q, k, v, mask)
    after    Attention(q, k, v, mask), TRT_decomposable = 1
    """
    for node in model.graph.node:
        if node.op_type == "Attention":
            node.attribute.append(helper.make_attribute("TRT_decomposable", 1))


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
