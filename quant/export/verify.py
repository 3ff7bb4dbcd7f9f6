"""Comparison of an exported file with the PyTorch network that it was exported from, tensor by tensor.

Two runtimes never compute one quantized network to the same bits. They add in another order, so a few values near a tie
round to the next step, and these errors grow from block to block; even PyTorch in float32 and in float64 differ by some
tenths of a percent. So a difference at the end of a network, or inside, does not show whether there is a fault.

:func:`compare_with_trace` keeps errors from growing. PyTorch runs the same images, and every tensor that the file
computes too is compared and then *replaced* by the file's. So every section between two such tensors gets the same
inputs on both sides, and must give the same outputs, up to float rounding and ties. The fault is in the first
section that does not.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from illama.errors import UserError
from illama.graph.reader import array, is_constant, layer_of, load_graph, to_bytes
from illama.graph.session import cpu_session
from illama.models.attention import MaskedAttention, MaskedNetwork, QuantizerPoint
from illama.models.illama import Rotary
from quant.export.rotary import pair_halves
from quant.mixed_precision.layer_effects import decibels
from quant.quantizers.block_rounding import scales_of_blocks
from quant.quantizers.layers import BlockQuantizer, QuantizeDequantize

TIE_TOLERANCE = 0.01  # share of values that may differ by one step; measured: a few in 100,000, in 4 bits too
FLOAT_TOLERANCE = 1e-4  # largest difference of a float tensor over its largest magnitude; measured: below 1e-5


@dataclass(frozen=True)
class Difference:
    """Difference of one tensor between the file and PyTorch, computed from the same inputs.

    Attributes:
        steps: largest difference of a quantized tensor, in steps of its format; 0 for a float tensor.
        differing: share of the values of a quantized tensor that differ.
        relative: largest difference of a float tensor, over its largest magnitude.
    """

    steps: int = 0
    differing: float = 0.0
    relative: float = 0.0

    @property
    def mismatch(self) -> bool:
        """True if the difference exceeds the tolerances for ties and float rounding, or is NaN."""
        return not (self.steps <= 1 and self.differing <= TIE_TOLERANCE and self.relative <= FLOAT_TOLERANCE)

    def __str__(self) -> str:
        if self.steps:
            return f"{self.steps} step{'s' * (self.steps > 1)} in {self.differing:.2%}"
        return f"{self.relative:.1e}" if self.relative else "none"


@dataclass
class Trace:
    """Intermediate results of an ONNX file.

    Attributes:
        values: layer -> its output.
        quantized: quantized tensor -> its integers (or FP8 values) less the zero point, one array for each time that
            the network quantizes it.
        logits: (B, classes).
    """

    values: dict[str, Tensor] = field(default_factory=dict)
    quantized: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    logits: Tensor = field(default_factory=lambda: torch.empty(0))


def trace_onnx(path: Path, images: np.ndarray, network: nn.Module) -> Trace:
    """Runs a file in ONNX Runtime on the CPU as deployed; returns the outputs of layers and all quantized tensors.

    Quantized tensors are read after QuantizeLinear, not after DequantizeLinear, so that ONNX Runtime still uses its
    integer kernels.

    Args:
        network: the network that the file was exported from, which names the layers.

    Raises:
        UserError: the file cannot be read or run, or was not exported by this project.
    """
    model, layers = load_graph(path), observable_layers(network)
    taps = _tap(model, layers)
    try:
        session = cpu_session(to_bytes(model), torch.get_num_threads(), folder=path.parent)
        names = [output.name for output in session.get_outputs()]
        results = dict(zip(names, session.run(None, {session.get_inputs()[0].name: images}), strict=True))
    except Exception as error:  # the exceptions of ONNX Runtime share no base class but this one
        raise UserError(f"cannot run {path}: {' '.join(str(error).split())[:300]}") from error
    trace = Trace(logits=torch.from_numpy(results[names[0]]))
    for name, result in results.items():
        if name in layers:
            trace.values[name] = torch.from_numpy(result)
        elif name in taps:
            tensor, zero_point = taps[name]
            trace.quantized[tensor].append(torch.from_numpy(result) - zero_point)
    if not trace.values:
        raise UserError(f"{path} has no value with a layer's name: give a file that this project exported")
    return trace


def _tap(model: ir.Model, layers: Mapping[str, Any]) -> dict[str, tuple[str, float]]:
    """Makes the values outputs of the graph; returns output name -> (quantized tensor, its zero point)."""
    graph, taps = model.graph, {}
    logits = graph.outputs[0]
    for node in list(graph):
        if node.op_type == "QuantizeLinear" and len(node.inputs) == 3 and is_constant(node.inputs[2]):
            # ONNX Runtime cannot return FP8 or 4-bit tensors.
            cast = ir.node("Cast", [node.outputs[0]], {"to": ir.DataType.FLOAT})
            graph.insert_after(node, cast)
            added = cast.outputs[0]
            added.name = f"{node.outputs[0].name}.quantized"
            taps[added.name] = (layer_of(node), float(array(node.inputs[2]).astype(np.float32)))
            added.dtype = ir.DataType.FLOAT
            graph.outputs.append(added)
        graph.outputs.extend(value for value in node.outputs if value.name in layers and value is not logits)
    return taps


def observable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Returns the modules whose outputs are compared: all except quantizers, rotations, and attention.

    Quantizers are compared by their integers. A rotation is called twice, for q and for k. The output of attention
    may not exist in ONNX Runtime, which fuses its quantization into the second product.
    """
    hidden = (QuantizeDequantize, QuantizerPoint, MaskedAttention, Rotary)
    return {name: module for name, module in model.named_modules() if name and not isinstance(module, hidden)}


@torch.inference_mode()
def compare_with_trace(model: MaskedNetwork, trace: Trace, images: np.ndarray) -> dict[str, Difference]:
    """Returns the difference of every tensor that both compute, from the same inputs, in the order of computation.

    Args:
        model: the quantized network that the file was exported from, in plain attention form.
        trace: what the file computes, from :func:`trace_onnx`.
        images: the images of the trace (B, C, H, W), float32.
    """
    model = as_exported(model)
    found: dict[str, Difference] = {}
    quantized = {name: list(arrays) for name, arrays in trace.quantized.items()}

    def compare(name: str, module: nn.Module, inputs: Any, ours: Any) -> Tensor | None:
        """Notes the difference of a tensor from the file's, which takes its place."""
        if isinstance(module, QuantizeDequantize):
            theirs = _take(quantized[name], ours.shape)
            if theirs is None:
                return None
            steps = (_ordinal(module, ours / module.scale) - _ordinal(module, theirs)).abs()
            difference = Difference(steps=int(steps.max()), differing=float((steps > 0).float().mean()))
            found[name] = _worse(found.get(name), difference)
            return theirs * module.scale
        theirs = trace.values[name]
        if ours.shape != theirs.shape:  # the last block calls some layers twice, but the file only once
            return None
        if isinstance(module, BlockQuantizer):
            found[name] = _block_difference(module, inputs[0], ours, theirs)
        else:
            found[name] = _float_difference(ours, theirs)
        return theirs

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if name in (quantized if isinstance(module, QuantizeDequantize) else trace.values):
                hooks.enter_context(module.register_forward_hook(partial(compare, name)))
        logits = model(torch.from_numpy(images))
    found["logits"] = _float_difference(logits, trace.logits)
    return found


def first_mismatch(differences: Mapping[str, Difference]) -> str | None:
    """Returns the first tensor with a mismatch, or None: the fault is between the tensor before it and this one."""
    return next((name for name, difference in differences.items() if difference.mismatch), None)


def _take(arrays: list[Tensor], shape: torch.Size) -> Tensor | None:
    """Removes and returns the first array of that shape; None if the file reuses another tensor's quantization."""
    for index, each in enumerate(arrays):
        if each.shape == shape:
            return arrays.pop(index)
    return None


def _ordinal(quantizer: QuantizeDequantize, quantized: Tensor) -> Tensor:
    """Returns quantized values as consecutive integers, so that one step is 1 in FP8 too."""
    if quantizer.dtype.rounds:
        return quantized.round()
    bits = quantized.to(torch.float8_e4m3fn).view(torch.int8).int()
    return torch.where(bits < 0, -(bits & 127), bits)


def _float_difference(ours: Tensor, theirs: Tensor) -> Difference:
    largest = float(ours.abs().max())
    return Difference(relative=float((ours - theirs).abs().max()) / (largest or 1.0))


def _block_difference(quantizer: BlockQuantizer, x: Tensor, ours: Tensor, theirs: Tensor) -> Difference:
    """Compares dequantized values, because the file has no tensor of the quantized ones."""
    scale = scales_of_blocks(x, quantizer.scale, quantizer.dtype)
    smaller = torch.minimum(ours.abs(), theirs.abs()) / scale
    steps = ((ours - theirs).abs() / (scale * quantizer.dtype.step(smaller))).round()
    return Difference(steps=int(steps.max()), differing=float((steps > 0).float().mean()))


def _worse(first: Difference | None, second: Difference) -> Difference:
    return second if first is None or (second.steps, second.differing) > (first.steps, first.differing) else first


@torch.inference_mode()
def accumulated_sqnr(
    reference: MaskedNetwork, quantized: MaskedNetwork, trace: Trace, images: np.ndarray
) -> dict[str, tuple[float, float]]:
    """Returns layer -> SQNR in dB of quantization, against the float network, and of export, against the quantized one.

    No tensor is replaced here. Both fall from layer to layer even without a fault, because errors accumulate.

    Args:
        reference: the float network in plain attention form, rescaled where the scheme smooths.
    """
    exact, rounded = (_layer_outputs(as_exported(model), images) for model in (reference, quantized))
    theirs = {**trace.values, "logits": trace.logits}
    return {
        name: (_sqnr(exact[name], values), _sqnr(values, theirs[name]))
        for name, values in rounded.items()
        if name in exact and name in theirs and theirs[name].shape == values.shape
    }


def as_exported(model: MaskedNetwork) -> MaskedNetwork:
    """Returns a copy in the layout of the exported file, so that tensors of the same name correspond."""
    model = copy.deepcopy(model)
    pair_halves(model)
    return model


def _layer_outputs(model: MaskedNetwork, images: np.ndarray) -> dict[str, Tensor]:
    outputs: dict[str, Any] = {}
    with ExitStack() as hooks:
        for name, module in observable_layers(model).items():
            hooks.enter_context(module.register_forward_hook(lambda _, __, y, name=name: outputs.update({name: y})))
        outputs["logits"] = model(torch.from_numpy(images))
    return {name: y for name, y in outputs.items() if isinstance(y, Tensor)}


def _sqnr(reference: Tensor, other: Tensor) -> float:
    signal, noise = reference.double(), (other - reference).double()
    return decibels(float(signal.square().sum()), float(noise.square().sum()))


def print_differences(differences: Mapping[str, Difference], sqnr: Mapping[str, tuple[float, float]]) -> None:
    """Prints one line for each tensor, in the order in which they are computed; ``sqnr``: :func:`accumulated_sqnr`."""
    print(f"{'':30} {'accumulated error, SQNR in dB':>32}")
    print(f"{'tensor':30} {'by quantization':>16} {'by export':>15} {'local':>22}")
    for name, difference in differences.items():
        columns = [f"{value:.1f}" if np.isfinite(value) else "-" for value in sqnr.get(name, (np.inf, np.inf))]
        mark = "  <- mismatch" if difference.mismatch else ""
        print(f"{name:30} {columns[0]:>16} {columns[1]:>15} {difference!s:>22}{mark}")
