"""An exported file against the PyTorch network it was exported from, tensor by tensor.

Two runs of one quantized network in floating point never agree to the bit: sums in another order move a few values
across a rounding boundary, each by one step, and the steps grow from block to block. Even PyTorch in float32 and in
float64 end some tenths of a percent apart, without any fault. So the difference at the end of a network, or at any
layer inside, tells nothing of where a fault is, or whether there is one.

:func:`local_differences` keeps it from growing: PyTorch runs the same images, and every tensor that the file computes
too is compared and then *replaced* by the file's. So each stretch between two such tensors gets the same numbers on
both sides, and must give the same numbers, but for float rounding and the ties it decides. The first stretch that
does not is the fault.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import ModelProto, TensorProto, numpy_helper
from torch import Tensor, nn

from illama.errors import UserError
from illama.graph.session import cpu_session
from illama.models.attention import MaskedAttention, QuantizerPoint, SoftMasked
from illama.models.illama import Rotary
from quant.export.rotary import pair_halves
from quant.mixed_precision.layer_effects import decibels
from quant.quantizers.layers import QuantizeDequantize

TIES = 0.01  # share of values that ties may move by one step; measured: a few in 100,000, in 4 bits too
FLOAT = 1e-4  # of a tensor's largest magnitude: what sums in another order may change; measured: below 1e-5
_CODES = ".codes"


@dataclass(frozen=True)
class Difference:
    """How one tensor of the file differs from PyTorch's, both made from the same numbers.

    Attributes:
        steps: the most that a value of a quantized tensor is off, in steps of its format; 0 for others.
        moved: share of the values of a quantized tensor that are off at all.
        relative: the largest difference of any other tensor, over its largest magnitude.
    """

    steps: int = 0
    moved: float = 0.0
    relative: float = 0.0

    @property
    def mismatch(self) -> bool:
        """Whether it is more than ties and float rounding make; NaN departs too."""
        return not (self.steps <= 1 and self.moved <= TIES and self.relative <= FLOAT)

    def __str__(self) -> str:
        if self.steps:
            return f"{self.steps} step{'s' * (self.steps > 1)} in {self.moved:.2%}"
        return f"{self.relative:.1e}" if self.relative else "none"


@dataclass
class Trace:
    """What an ONNX file computes on its way.

    Attributes:
        values: layer -> its output.
        codes: quantized tensor -> its integers (or FP8 values) less the zero point, one array for each time that
            the network quantizes it.
        logits: (B, classes).
    """

    values: dict[str, Tensor] = field(default_factory=dict)
    codes: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    logits: Tensor = field(default_factory=lambda: torch.empty(0))


def trace_onnx(path: Path, images: np.ndarray, layers: Mapping[str, Any]) -> Trace:
    """Run a file in ONNX Runtime on the CPU as deployed, with the outputs of ``layers`` and all quantized integers.

    The integers are tapped behind QuantizeLinear and not behind DequantizeLinear, because ONNX Runtime then still
    makes its integer kernels of the products.

    Raises:
        UserError: if the file cannot be read or run, or is not an export of this project's.
    """
    try:
        model = onnx.load(path)
        taps = _tap(model, layers)
        session = cpu_session(model.SerializeToString(), torch.get_num_threads())
        names = [output.name for output in session.get_outputs()]
        results = dict(zip(names, session.run(None, {session.get_inputs()[0].name: images}), strict=True))
    except Exception as error:  # the exceptions of onnx and ONNX Runtime share no base class but this one
        raise UserError(f"cannot run {path}: {' '.join(str(error).split())[:300]}") from error
    trace = Trace(logits=torch.from_numpy(results[names[0]]))
    for name, array in results.items():
        if name in layers:
            trace.values[name] = torch.from_numpy(array)
        elif name in taps:
            tensor, zero_point = taps[name]
            trace.codes[tensor].append(torch.from_numpy(array) - zero_point)
    if not trace.values:
        raise UserError(f"{path} has no value that bears a layer's name: it was not exported by this project")
    return trace


def _tap(model: ModelProto, layers: Mapping[str, Any]) -> dict[str, tuple[str, float]]:
    """Make the wanted values outputs of the graph; output's name -> (quantized tensor, its zero point)."""
    graph, taps = model.graph, {}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in list(graph.node):
        if node.op_type == "QuantizeLinear":
            tensor, code = node.name.partition("/")[0], node.output[0] + _CODES
            zero = numpy_helper.to_array(constants[node.input[2]]).astype(np.float32)
            taps[code] = (tensor, float(zero))
            # ONNX Runtime hands out neither FP8 nor 4 bits.
            graph.node.append(onnx.helper.make_node("Cast", [node.output[0]], [code], to=TensorProto.FLOAT))
            graph.output.append(onnx.helper.make_tensor_value_info(code, TensorProto.FLOAT, None))
        for value in node.output:
            if value in layers and value != graph.output[0].name:
                graph.output.append(onnx.helper.make_tensor_value_info(value, TensorProto.FLOAT, None))
    return taps


def observable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The modules whose outputs are compared: all but quantizers, whose integers are, rotations, and attention.

    A rotation is called twice, for q and for k. ONNX Runtime rounds the second product on its way out where it can, so
    the product itself is never there.
    """
    hidden = (QuantizeDequantize, QuantizerPoint, MaskedAttention, Rotary)
    return {name: module for name, module in model.named_modules() if name and not isinstance(module, hidden)}


@torch.inference_mode()
def local_differences(model: SoftMasked, path: Path, images: np.ndarray) -> dict[str, Difference]:
    """Every tensor that both compute -> how it differs, given the same tensors before it; in the order computed.

    Args:
        model: the quantized network that ``path`` was exported from; in plain attention form.
        images: (B, C, H, W) float32, real ones.

    Raises:
        UserError: if the file cannot be run or has none of the network's layers.
    """
    return compare_with_trace(model, trace_onnx(path, images, observable_layers(model)), images)


@torch.inference_mode()
def compare_with_trace(model: SoftMasked, trace: Trace, images: np.ndarray) -> dict[str, Difference]:
    """:func:`local_differences` of a file that has been run already."""
    model = as_exported(model)
    found: dict[str, Difference] = {}
    codes = {name: list(arrays) for name, arrays in trace.codes.items()}
    with ExitStack() as hooks:
        for name, module in model.named_modules():
            hook = None
            if isinstance(module, QuantizeDequantize) and name in codes:
                hook = _replacing_codes(found, name, codes[name])
            elif name in trace.values:
                hook = _replacing_value(found, name, trace.values[name])
            if hook:
                hooks.callback(module.register_forward_hook(hook).remove)
        logits = model(torch.from_numpy(images))
    found["logits"] = _float_difference(logits, trace.logits)
    return found


def largest_step_difference(model: SoftMasked, path: Path, images: np.ndarray) -> float:
    """One number for a test: the most that any tensor is off, given the same tensors before it; 1 is still ties.

    Quantized tensors count in steps of their format (and as 2 if more than a share of :data:`TIES` moved), the
    others in units of :data:`FLOAT` times their largest magnitude.
    """
    differences = local_differences(model, path, images).values()
    return max(max(float(each.steps), 2.0 * (each.moved > TIES), each.relative / FLOAT) for each in differences)


def first_mismatch(differences: Mapping[str, Difference]) -> str | None:
    """The first tensor that is more than rounding off: what computes it, from the tensor before it on, is at fault."""
    return next((name for name, difference in differences.items() if difference.mismatch), None)


def _replacing_codes(found: dict[str, Difference], name: str, arrays: list[Tensor]) -> Callable[..., Tensor | None]:
    def hook(quantizer: QuantizeDequantize, _: Any, ours: Tensor) -> Tensor | None:
        theirs = _take(arrays, ours.shape)
        if theirs is None:
            return None
        steps = (_ordinal(quantizer, ours / quantizer.scale) - _ordinal(quantizer, theirs)).abs()
        difference = Difference(steps=int(steps.max()), moved=float((steps > 0).float().mean()))
        found[name] = _worse(found.get(name), difference)
        return theirs * quantizer.scale

    return hook


def _replacing_value(found: dict[str, Difference], name: str, theirs: Tensor) -> Callable[..., Tensor | None]:
    def hook(_: nn.Module, __: Any, ours: Tensor) -> Tensor | None:
        if ours.shape != theirs.shape:  # the last block calls some layers twice, and only one call is in the file
            return None
        found[name] = _float_difference(ours, theirs)
        return theirs

    return hook


def _take(arrays: list[Tensor], shape: torch.Size) -> Tensor | None:
    """The first array of that shape, taken out of the list; None where the file shares another tensor's rounding."""
    for index, array in enumerate(arrays):
        if array.shape == shape:
            return arrays.pop(index)
    return None


def _ordinal(quantizer: QuantizeDequantize, codes: Tensor) -> Tensor:
    """Codes as consecutive integers, so that one step is 1 in FP8 too."""
    if quantizer.dtype.rounds:
        return codes.round()
    bits = codes.to(torch.float8_e4m3fn).view(torch.int8).int()
    return torch.where(bits < 0, -(bits & 127), bits)


def _float_difference(ours: Tensor, theirs: Tensor) -> Difference:
    largest = float(ours.abs().max())
    return Difference(relative=float((ours - theirs).abs().max()) / (largest or 1.0))


def _worse(first: Difference | None, second: Difference) -> Difference:
    return second if first is None or (second.steps, second.moved) > (first.steps, first.moved) else first


@torch.inference_mode()
def accumulated_sqnr(
    reference: SoftMasked, quantized: SoftMasked, trace: Trace, images: np.ndarray
) -> dict[str, tuple[float, float]]:
    """Layer -> SQNR in dB of quantization, against the float network, and of export, against the quantized one.

    Nothing is replaced here: both are of what has gathered since the images, and fall from layer to layer without a
    fault.

    Args:
        reference: the network in floating point, in plain attention form, rescaled where the scheme smooths.
    """
    exact, rounded = (_layer_outputs(as_exported(model), images) for model in (reference, quantized))
    theirs = {**trace.values, "logits": trace.logits}
    return {
        name: (_sqnr(exact[name], values), _sqnr(values, theirs[name]))
        for name, values in rounded.items()
        if name in theirs and theirs[name].shape == values.shape
    }


def as_exported(model: SoftMasked) -> SoftMasked:
    """A copy in the layout of the exported file, so that tensors of one name are one tensor."""
    model = copy.deepcopy(model)
    pair_halves(model)
    return model


def _layer_outputs(model: SoftMasked, images: np.ndarray) -> dict[str, Tensor]:
    outputs: dict[str, Tensor] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, y: Any) -> None:
            if isinstance(y, Tensor):
                outputs[name] = y

        return hook

    with ExitStack() as hooks:
        for name, module in observable_layers(model).items():
            hooks.callback(module.register_forward_hook(note(name)).remove)
        outputs["logits"] = model(torch.from_numpy(images))
    return outputs


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
