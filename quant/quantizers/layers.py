"""Quantized layers: float weights and scales behind the arithmetic of ONNX's Q/DQ operators.

Their forward pass rounds as the exported file will. Two custom operators carry it, which torch.onnx.export turns
into the standard ones:

    illama::quantize_dequantize(x, scale)   ->   QuantizeLinear, DequantizeLinear
    illama::dequantize(weight, scale)       ->   DequantizeLinear of an initializer of 8 bits or fewer

so the exported file has its Q/DQ where this model has its layers, by construction. In training the same rounding is
made of differentiable operations, and scales are learned as LSQ does (Esser et al., arXiv 1902.08153).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quant.schemes.formats import FORMATS, QuantDtype, TensorSpec


@torch.library.custom_op("illama::quantize_dequantize", mutates_args=())
def quantize_dequantize(x: Tensor, scale: Tensor, dtype: str, zero_point: int = 0) -> Tensor:
    """x rounded to a number format with one scale: what QuantizeLinear and DequantizeLinear do together."""
    integers = FORMATS[dtype].quantize(x, scale, zero_point).to(scale.dtype)
    return (integers - zero_point if zero_point else integers) * scale


@torch.library.custom_op("illama::dequantize", mutates_args=())
def dequantize(weight: Tensor, scale: Tensor, dtype: str, axis: int, group_size: int = 0) -> Tensor:
    """A weight of few bits times its scales.

    ``scale`` has one value per index of ``axis`` or, for groups, the weight's shape but for groups along ``axis``.
    """
    if group_size:
        scale = scale.repeat_interleave(group_size, axis)
    else:
        scale = scale.reshape([-1 if index == axis else 1 for index in range(weight.ndim)])
    return weight.to(scale.dtype) * scale


@quantize_dequantize.register_fake
def _(x: Tensor, scale: Tensor, dtype: str, zero_point: int = 0) -> Tensor:
    return torch.empty_like(x)


@dequantize.register_fake
def _(weight: Tensor, scale: Tensor, dtype: str, axis: int, group_size: int = 0) -> Tensor:
    return torch.empty_like(weight, dtype=scale.dtype)


def fake_quantize(x: Tensor, scale: Tensor, dtype: QuantDtype, zero_point: int = 0) -> Tensor:
    """:func:`quantize_dequantize` that can be differentiated, with a scale of any shape that broadcasts.

    The gradient passes straight through the rounding, which gives x the straight-through estimator and the scale
    LSQ's gradient (arXiv 1902.08153, equations 3 and 5). It computes in float32 whatever x is: bfloat16 has no room
    for 8 bits and a fraction.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    clamped = (wide / scale).clamp(dtype.low - zero_point, dtype.high - zero_point)
    inert = clamped.detach()
    rounded = inert.round() if dtype.rounds else inert.to(dtype.storage).to(inert.dtype)
    return ((clamped + (rounded - inert)) * scale).to(x.dtype)


def lsq_gradient(scale: Tensor, shared_by: int, dtype: QuantDtype) -> Tensor:
    """``scale`` itself, its gradient multiplied by LSQ's 1 / sqrt(n * Q_p) (arXiv 1902.08153, section 2.2).

    Args:
        shared_by: n, how many values one scale serves: weights, or features of one image.
    """
    return scale.detach() + (scale - scale.detach()) * (shared_by * dtype.high) ** -0.5


class _Scaled(nn.Module):
    """Whatever has a scale: how it is trained, and when it acts.

    Attributes:
        enabled: False lets everything pass unrounded, to see what this one tensor costs.
        differentiable: round by :func:`fake_quantize`. Training sets it; the exporter needs it off.
    """

    scale: Tensor

    def __init__(self, spec: TensorSpec, scale: Tensor) -> None:
        super().__init__()
        self.spec, self.dtype = spec, spec.dtype
        self.enabled, self.differentiable = True, False
        self.register_buffer("scale", scale)

    def learn_scale(self) -> None:
        """Make the scale a parameter, and the rounding differentiable."""
        scale = self.scale.detach()
        del self.scale
        self.scale = nn.Parameter(scale)
        self.differentiable = True

    def settle_scale(self) -> None:
        """Undo :meth:`learn_scale`; what was learned stays."""
        scale = self.positive_scale().detach().clone()
        del self.scale
        self.register_buffer("scale", scale)
        self.differentiable = False

    def positive_scale(self) -> Tensor:
        """The scale, kept from vanishing or changing sign while it is learned."""
        return self.scale.clamp(min=torch.finfo(torch.float16).tiny) if self.differentiable else self.scale

    def extra_repr(self) -> str:
        return str(self.spec)


class QuantizeDequantize(_Scaled):
    """Rounds an activation to a number format with one scale.

    Args:
        low, high: the range to be represented, scalars; low is used by asymmetric specs alone.
    """

    def __init__(self, spec: TensorSpec, low: Tensor, high: Tensor) -> None:
        dtype = spec.dtype
        if spec.symmetric:
            scale, self_zero = dtype.scale(high.float().reshape(())), 0
        else:
            low, high = low.float().clamp(max=0).reshape(()), high.float().clamp(min=0).reshape(())
            scale = torch.where(high > low, (high - low) / dtype.high, torch.ones_like(high))
            self_zero = int((-low / scale).round().clamp(dtype.low, dtype.high))
        super().__init__(spec, scale)
        self.zero_point = self_zero

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return x
        if self.differentiable:
            scale = self.positive_scale()
            if isinstance(self.scale, nn.Parameter):
                scale = lsq_gradient(scale, x[0].numel(), self.dtype)
            return fake_quantize(x, scale, self.dtype, self.zero_point)
        return quantize_dequantize(x, self.scale, self.dtype.name, self.zero_point)

    def fold_zero_point(self) -> Tensor:
        """Make the format signed and the zero point 0; what is to be added to x for the same steps, a scalar."""
        half = int(self.dtype.high + 1) // 2
        shift = (self.zero_point - half) * self.scale
        self.dtype, self.zero_point = FORMATS[self.dtype.name.removeprefix("u")], 0
        return shift


class WeightQuantizer(_Scaled):
    """Rounds a weight (out, ...) with a scale per output channel, or per group of inputs of one.

    Args:
        amax: the largest magnitude, (out, 1, ...) or, for groups, (out, groups, 1).

    Attributes:
        offset: what is added to the weight before it is rounded, in steps; None but while rounding is learned.
    """

    def __init__(self, spec: TensorSpec, amax: Tensor) -> None:
        super().__init__(spec, spec.dtype.scale(amax.float()))
        self.offset: Tensor | None = None

    def forward(self, weight: Tensor, outputs: slice | None = None) -> Tensor:
        """The rounded weight; ``outputs`` says which output channels ``weight`` consists of."""
        if not self.enabled:
            return weight
        rows, scale = split_groups(weight, self.spec), self.positive_scale()
        scale = scale if outputs is None or len(scale) == 1 else scale[outputs]
        if isinstance(self.scale, nn.Parameter):
            scale = lsq_gradient(scale, rows.numel() // scale.numel(), self.dtype)
        if self.offset is not None:
            offset = self.offset if outputs is None else self.offset[outputs]
            rows = rows + split_groups(offset, self.spec) * scale.detach()
        return fake_quantize(rows, scale, self.dtype).reshape(weight.shape)

    def integers(self, weight: Tensor) -> Tensor:
        """The weight as it will be stored, in its own shape."""
        return self.dtype.quantize(split_groups(weight, self.spec), self.scale).reshape(weight.shape)


def split_groups(weight: Tensor, spec: TensorSpec) -> Tensor:
    """(out, in) -> (out, groups, group_size) where the spec has groups; any other weight as it is."""
    return weight.unflatten(-1, (-1, spec.group_size)) if spec.granularity == "group" else weight


class QuantizedLinear(nn.Module):
    """A Linear whose weight and input are rounded; either may be left in floating point.

    :meth:`freeze` replaces the float weight by its integers, (in, out), so that the exported graph needs no Transpose.
    """

    weight: Tensor
    shift: Tensor | None
    frozen: Tensor | None
    frozen_scale: Tensor | None

    def __init__(
        self, linear: nn.Linear, weight: WeightQuantizer | None, activation: QuantizeDequantize | None
    ) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.weight_quantizer, self.input = weight, activation
        self.register_buffer("shift", None)
        self.register_buffer("frozen", None)
        self.register_buffer("frozen_scale", None)

    def forward(self, x: Tensor, outputs: slice | None = None) -> Tensor:
        """(..., in) -> (..., out), or the outputs named by the slice."""
        x = _rounded_input(self, x)
        bias = self.bias if self.bias is None or outputs is None else self.bias[outputs]
        if self.frozen is not None and self.frozen_scale is not None and self.weight_quantizer is not None:
            weight, scale = self.frozen, self.frozen_scale
            if outputs is not None:
                weight, scale = weight[:, outputs], scale[..., outputs]
            spec = self.weight_quantizer.spec
            axis, group_size = (0, spec.group_size) if scale.ndim == 2 else (1, 0)
            y = x @ dequantize(weight, scale, spec.format, axis, group_size)
            return y if bias is None else y + bias
        weight = self.weight if outputs is None else self.weight[outputs]
        if self.weight_quantizer is not None:
            weight = self.weight_quantizer(weight, outputs)
        return F.linear(x, weight, bias)

    def freeze(self) -> None:
        """Keep the integers of the weight alone."""
        if self.weight_quantizer is not None:
            scale = self.weight_quantizer.scale.detach()
            grouped = self.weight_quantizer.spec.granularity == "group"
            self.frozen = self.weight_quantizer.integers(self.weight.detach()).t().contiguous()
            self.frozen_scale = (
                scale.squeeze(-1).t().contiguous() if grouped else scale.expand(len(self.weight), 1)[:, 0]
            )
            del self.weight


class QuantizedConv2d(nn.Module):
    """A convolution, padded by zeros if at all, whose weight and input are rounded; either may be left in float."""

    weight: Tensor
    shift: Tensor | None
    frozen: Tensor | None

    def __init__(self, conv: nn.Conv2d, weight: WeightQuantizer | None, activation: QuantizeDequantize | None) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self.stride, self.padding, self.dilation, self.groups = conv.stride, conv.padding, conv.dilation, conv.groups
        self.weight_quantizer, self.input = weight, activation
        self.register_buffer("shift", None)
        self.register_buffer("frozen", None)

    def forward(self, x: Tensor) -> Tensor:
        padding = self.padding
        if self.shift is not None and any(padding):  # the zeros around the input have to be shifted with it
            x, padding = F.pad(x, [size for size in reversed(padding) for _ in range(2)]), (0, 0)  # type: ignore[misc]
        x = _rounded_input(self, x)
        if self.frozen is not None and self.weight_quantizer is not None:
            scale = self.weight_quantizer.scale.expand(len(self.frozen), 1, 1, 1).flatten()
            weight = dequantize(self.frozen, scale, self.weight_quantizer.dtype.name, 0)
        else:
            weight = self.weight if self.weight_quantizer is None else self.weight_quantizer(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, padding, self.dilation, self.groups)

    def freeze(self) -> None:
        """Keep the integers of the weight alone."""
        if self.weight_quantizer is not None:
            self.frozen = self.weight_quantizer.integers(self.weight.detach())
            del self.weight


QuantizedLayer = QuantizedLinear | QuantizedConv2d


def _rounded_input(layer: QuantizedLayer, x: Tensor) -> Tensor:
    if layer.input is None:
        return x
    return layer.input(x if layer.shift is None else x + layer.shift)


@torch.no_grad()
def fold_zero_point(layer: QuantizedLayer) -> None:
    """Shift an asymmetric input to where its zero point is 0, which TensorRT demands; the layer gives what it gave.

    With w the rounded weight and x the rounded input, w (x + shift) = w x + shift * sum(w): the rounded values are the
    same integers, less a constant, and the bias takes back what they are moved by. For export and not undone.
    """
    if layer.input is None or layer.input.spec.symmetric:
        return
    weight = layer.weight if layer.weight_quantizer is None else layer.weight_quantizer(layer.weight)
    layer.shift = layer.input.fold_zero_point()
    moved = layer.shift * weight.flatten(1).sum(1)
    layer.bias = nn.Parameter(-moved if layer.bias is None else layer.bias - moved)


def quantizers(model: nn.Module) -> Iterator[tuple[str, _Scaled]]:
    """Every quantizer of a network with the name of its tensor, as :mod:`quant.schemes.scheme` spells it."""
    for name, module in model.named_modules():
        if isinstance(module, _Scaled):
            yield name.replace(".weight_quantizer", ".weight"), module


def freeze(model: nn.Module, fold_zero_points: bool = False) -> None:
    """Replace every quantized layer's float weight by its integers; for export and not undone.

    Args:
        fold_zero_points: first make every asymmetric input symmetric (:func:`fold_zero_point`).
    """
    for module in model.modules():
        if isinstance(module, QuantizedLayer):
            if fold_zero_points:
                fold_zero_point(module)
            module.freeze()
