"""The fusion gate: an engine whose attention fell apart into pieces is slow, and nothing else would tell."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import ModelProto

from deploy.trt.library import Library
from illama.bundle import SOFTMAX_OUTPUT
from illama.errors import UserError

if TYPE_CHECKING:
    import tensorrt

_WORDS = ("mha", "attention")


@dataclass(frozen=True)
class SoftmaxOutput:
    """How a graph's scheme rounds the softmax output of one attention, which ONNX's Attention has no place for."""

    number: str
    scale: float


def softmax_outputs(model: ModelProto) -> dict[str, SoftmaxOutput]:
    """Attention -> how its softmax output is to be rounded, as the exporter noted it in the file."""
    notes = {entry.key: entry.value for entry in model.metadata_props}
    return {name: SoftmaxOutput(**values) for name, values in json.loads(notes.get(SOFTMAX_OUTPUT, "{}")).items()}


def find_attentions(library: Library, network: tensorrt.INetworkDefinition, source: str) -> dict[str, Any]:
    """Name -> the attentions of a parsed network.

    Raises:
        UserError: if there is none, or a bare softmax shows that one was exported in pieces.
    """
    trt = library.trt
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    inputs: list[Any] = [layer for layer in layers if layer.type == trt.LayerType.ATTENTION_INPUT]
    if any(layer.type == trt.LayerType.SOFTMAX for layer in layers) or not inputs:
        raise UserError(
            f"{source} has attention that is not one Attention operator, so it cannot be fused; "
            "--allow-unfused builds it all the same"
        )
    for layer in inputs:
        layer.__class__ = trt.IAttentionInputLayer  # the bindings hand out the base class; this is their cast
    return {layer.attention.name.partition("/")[0]: layer.attention for layer in inputs}


def demand_fusion(
    library: Library,
    network: tensorrt.INetworkDefinition,
    attentions: Mapping[str, Any],
    outputs: Mapping[str, SoftmaxOutput],
) -> list[np.ndarray]:
    """Make every attention one that must not be decomposed, in the precision that the scheme asks for.

    q, k and v carry their Q/DQ in the graph. The softmax output has its own here:

        before   Q/DQ -> Attention(q, k, v)
        after    Q/DQ -> Attention(q, k, v, normalization_quantize_to_type, normalization_quantize_scale)

    Returns:
        The scales, which must outlive the build.
    """
    kept = []
    for name, attention in attentions.items():
        attention.decomposable = False
        if output := outputs.get(name):
            kept.append(np.array([output.scale], dtype=np.float16))
            constant = network.add_constant((), library.trt.Weights(kept[-1]))
            attention.normalization_quantize_to_type = getattr(library.trt, output.number)
            attention.normalization_quantize_scale = constant.get_output(0)
    return kept


def allow_decomposition(attentions: Mapping[str, Any]) -> None:
    """Let the builder take attention to pieces where it has no fused kernel."""
    for attention in attentions.values():
        attention.decomposable = True


def fused_kernels(information: str) -> list[str]:
    """The kernels of an engine, by its inspector's JSON in detail, that are fused attention.

    By their own names alone: a layer is named after the graph's node, whatever became of it.
    """
    layers = json.loads(information).get("Layers", [])
    tactics = [str(layer.get("TacticName", "")) for layer in layers if isinstance(layer, dict)]
    return [tactic for tactic in tactics if any(word in tactic.lower() for word in _WORDS)]
