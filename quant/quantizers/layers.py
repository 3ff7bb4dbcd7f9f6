"""Quantized layers: float weights and scales with the arithmetic of ONNX's Q/DQ operators.

The forward pass rounds as the exported file does. It uses two custom operators, which torch.onnx.export translates to
standard ones:

    illama::quantize_dequantize(x, scale)   ->   QuantizeLinear, DequantizeLinear
    illama::dequantize(weight, scale)       ->   DequantizeLinear of an initializer of 8 bits or fewer

and those of :mod:`quant.quantizers.block_rounding` for formats with block scales, so the exported file has a Q/DQ pair
wherever the network has a quantizer. In training the same rounding is made of differentiable operations, and scales are
trained as in LSQ (Esser et al., arXiv 1902.08153).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quant.quantizers.block_rounding import dequantize_blocks, quantize_blocks, round_blocks, stored_block_scale
from quant.schemes.formats import FORMATS, SMALLEST_SCALE, QuantDtype, TensorSpec, to_half_range

Network = TypeVar("Network", bound=nn.Module)


@torch.library.custom_op("illama::quantize_dequantize", mutates_args=())
def quantize_dequantize(x: Tensor, scale: Tensor, dtype: str, zero_point: int = 0) -> Tensor:
    """Quantizes x with one scale and dequantizes it, as QuantizeLinear and DequantizeLinear do."""
    integers = FORMATS[dtype].quantize(x, scale, zero_point).to(scale.dtype)
    return (integers - zero_point if zero_point else integers) * scale


@torch.library.custom_op("illama::dequantize", mutates_args=())
def dequantize(weight: Tensor, scale: Tensor, dtype: str, axis: int, group_size: int = 0) -> Tensor:
    """Returns a quantized weight times its scales.

    ``scale`` has one value for each index of ``axis``; for groups, the weight's shape with groups along ``axis``.
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
    """A differentiable :func:`quantize_dequantize`, with a scale of any shape that broadcasts.

    The gradient passes straight through the rounding, which gives x the straight-through estimator and the scale
    LSQ's gradient (arXiv 1902.08153, equations 3 and 5). The computation is in float32 or wider, because bfloat16
    cannot represent 8 bits and a fraction.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    clamped = (wide / scale).clamp(dtype.low - zero_point, dtype.high - zero_point)
    values = clamped.detach()
    rounded = dtype.round(values)
    return ((clamped + (rounded - values)) * scale).to(x.dtype)


def lsq_gradient(scale: Tensor, shared_by: int, dtype: QuantDtype) -> Tensor:
    """Returns ``scale`` with its gradient multiplied by LSQ's 1 / sqrt(n * Q_p) (arXiv 1902.08153, section 2.2).

    Args:
        shared_by: n, the number of values with one scale: weights, or features of one image.
    """
    return scale.detach() + (scale - scale.detach()) * (shared_by * dtype.high) ** -0.5


class Quantizer(nn.Module):
    """Base class of quantizers, with a scale that can be trained.

    Attributes:
        enabled: if False, the tensor passes in floating point.
        differentiable: if True, rounds by :func:`fake_quantize`, for training. Export needs False.
    """

    scale: Tensor

    def __init__(self, spec: TensorSpec, scale: Tensor) -> None:
        super().__init__()
        self.spec, self.dtype = spec, spec.dtype
        self.enabled, self.differentiable = True, False
        self.register_buffer("scale", scale)

    @property
    def trains_scale(self) -> bool:
        """Whether training changes the scale."""
        return True

    def make_scale_parameter(self) -> None:
        """Makes the rounding differentiable, and the scale a parameter if it is trained."""
        self.differentiable = True
        if self.trains_scale:
            scale = self.scale.detach()
            del self.scale
            self.scale = nn.Parameter(scale)

    def make_scale_buffer(self) -> None:
        """Undoes :meth:`make_scale_parameter`, with the trained value."""
        scale = self.positive_scale().detach().clone()
        self.differentiable = False
        if self.trains_scale:
            del self.scale
            self.register_buffer("scale", scale)
            self.set_scale(scale)

    def set_scale(self, scale: Tensor) -> None:
        """Sets the scale to the nearest one that a file can store."""
        self.scale = to_half_range(scale)

    def positive_scale(self) -> Tensor:
        """Returns the scale, clamped to a positive minimum in training."""
        return self.scale.clamp(min=SMALLEST_SCALE) if self.differentiable else self.scale


class QuantizeDequantize(Quantizer):
    """Quantizes and dequantizes an activation with one scale.

    Args:
        low, high: the range to represent, scalars; low is used for asymmetric specs only.
    """

    def __init__(self, spec: TensorSpec, low: Tensor, high: Tensor) -> None:
        dtype = spec.dtype
        if spec.symmetric:
            scale, zero_point = dtype.scale(high.float().reshape(())), 0
        else:
            low, high = low.float().clamp(max=0).reshape(()), high.float().clamp(min=0).reshape(())
            scale = to_half_range(torch.where(high > low, (high - low) / dtype.high, torch.ones_like(high)))
            zero_point = int((-low / scale).round().clamp(dtype.low, dtype.high))
        super().__init__(spec, scale)
        self.zero_point = zero_point

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
        """Makes the format signed and the zero point 0; returns the scalar to add to x for the same integers."""
        half = int(self.dtype.high + 1) // 2
        shift = (self.zero_point - half) * self.scale
        self.dtype, self.zero_point = FORMATS[self.dtype.name.removeprefix("u")], 0
        return shift


class BlockQuantizer(Quantizer):
    """Quantizes and dequantizes an activation in blocks of channels, with scales computed at run time.

    The scale is the tensor's (:meth:`quant.schemes.formats.QuantDtype.tensor_scale`), which is not trained.

    Args:
        amax: the largest magnitude, a scalar.
    """

    def __init__(self, spec: TensorSpec, amax: Tensor) -> None:
        super().__init__(spec, spec.dtype.tensor_scale(amax))

    @property
    def trains_scale(self) -> bool:
        return False

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return x
        if self.differentiable:
            return x + (round_blocks(x.detach(), self.scale, self.dtype) - x.detach())
        return quantize_blocks(x, self.scale, self.dtype.name)


class WeightQuantizer(Quantizer):
    """Quantizes and dequantizes a weight (out, ...) with one scale per output channel or per group of its inputs.

    Args:
        amax: the largest magnitude, (out, 1, ...), or (out, groups, 1) for groups and blocks.

    Attributes:
        offset: added to the weight before rounding, in steps, during block reconstruction; otherwise None.
        tensor_scale: in formats with block scales, what those of the file are multiplied by; None in others.
    """

    tensor_scale: Tensor | None

    def __init__(self, spec: TensorSpec, amax: Tensor) -> None:
        super().__init__(spec, spec.dtype.scale(amax.float()))
        self.offset: Tensor | None = None
        self.register_buffer("tensor_scale", None)
        if spec.dtype.block:
            self._set_block_scales(amax.float())

    @property
    def trains_scale(self) -> bool:
        return not self.dtype.power_of_two_scales

    def set_scale(self, scale: Tensor) -> None:
        if self.dtype.block:
            self._set_block_scales(scale * self.dtype.high)
        else:
            super().set_scale(scale)

    def _set_block_scales(self, amax: Tensor) -> None:
        self.tensor_scale = self.dtype.tensor_scale(amax)
        self.scale = self.dtype.block_scales(amax, self.tensor_scale)

    def positive_scale(self) -> Tensor:
        """Returns the scale, clamped to a positive minimum in training, and rounded as a file stores it."""
        scale = super().positive_scale()
        if not (self.differentiable and self.dtype.block):
            return scale
        amax = scale.detach() * self.dtype.high
        return scale + (self.dtype.block_scales(amax, self.dtype.tensor_scale(amax)) - scale.detach())

    def forward(self, weight: Tensor, outputs: slice | None = None) -> Tensor:
        """Returns the rounded weight; ``outputs`` are the output channels that ``weight`` consists of, if not all."""
        if not self.enabled:
            return weight
        rows, scale = split_groups(weight, self.spec), self.positive_scale()
        scale = scale if outputs is None or len(scale) == 1 else scale[outputs]
        if isinstance(self.scale, nn.Parameter):
            scale = lsq_gradient(scale, rows.numel() // scale.numel(), self.dtype)
        if self.offset is not None:
            offset = self.offset if outputs is None else self.offset[outputs]
            fixed = scale.detach()
            rows = rows + split_groups(offset, self.spec) * fixed * self.dtype.step(rows / fixed)
        return fake_quantize(rows, scale, self.dtype).reshape(weight.shape)

    def integers(self, weight: Tensor) -> Tensor:
        """Returns the quantized weight as it is stored, in the weight's shape."""
        return self.dtype.quantize(split_groups(weight, self.spec), self.scale).reshape(weight.shape)


def split_groups(weight: Tensor, spec: TensorSpec) -> Tensor:
    """(out, in) -> (out, groups, group_size) if the spec has groups; returns any other weight unchanged."""
    return weight.unflatten(-1, (-1, spec.scale_group)) if spec.scale_group else weight


class _Quantized(nn.Module):
    """A layer with a quantized weight and input; either may stay in floating point."""

    weight: Tensor
    shift: Tensor | None
    frozen: Tensor | None
    frozen_scale: Tensor | None

    def __init__(
        self, layer: Any, weight: WeightQuantizer | None, activation: QuantizeDequantize | BlockQuantizer | None
    ) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.weight_quantizer, self.input = weight, activation
        for name in ("shift", "frozen", "frozen_scale"):
            self.register_buffer(name, None)

    def rounded_input(self, x: Tensor) -> Tensor:
        """Returns the input as the layer multiplies it: rounded, unless it stays in floating point."""
        if self.input is None:
            return x
        return self.input(x if self.shift is None else x + self.shift)


class QuantizedLinear(_Quantized):
    """A quantized Linear.

    :meth:`freeze` replaces the float weight by its integers, (in, out), so that the exported graph needs no Transpose.
    """

    def forward(self, x: Tensor, outputs: slice | None = None) -> Tensor:
        """(..., in) -> (..., out), or only the outputs in the slice."""
        x = self.rounded_input(x)
        bias = self.bias if self.bias is None or outputs is None else self.bias[outputs]
        if self.frozen is not None and self.frozen_scale is not None and self.weight_quantizer is not None:
            weight, scale = self.frozen, self.frozen_scale
            if outputs is not None:
                weight, scale = weight[:, outputs], scale[..., outputs]
            y = x @ self._dequantized(weight, scale, x.dtype)
            return y if bias is None else y + bias
        weight = self.weight if outputs is None else self.weight[outputs]
        if self.weight_quantizer is not None:
            weight = self.weight_quantizer(weight, outputs)
        return F.linear(x, weight, bias)

    def _dequantized(self, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        quantizer: Any = self.weight_quantizer
        spec: TensorSpec = quantizer.spec
        if spec.dtype.block:
            return dequantize_blocks(weight, scale, quantizer.tensor_scale, spec.format, dtype)
        return dequantize(weight, scale, spec.format, int(scale.ndim == 1), spec.scale_group)

    def freeze(self) -> None:
        """Replaces the float weight by its integers."""
        if self.weight_quantizer is not None:
            scale = self.weight_quantizer.scale.detach()
            self.frozen = self.weight_quantizer.integers(self.weight.detach()).t().contiguous()
            self.frozen_scale = scale.expand(len(self.weight), *scale.shape[1:]).squeeze(-1).t().contiguous()
            if self.weight_quantizer.tensor_scale is not None:
                self.frozen_scale = stored_block_scale(
                    self.frozen_scale, self.weight_quantizer.tensor_scale, self.weight_quantizer.dtype
                )
            del self.weight


class QuantizedConv2d(_Quantized):
    """A quantized, zero-padded convolution."""

    def __init__(self, conv: nn.Conv2d, weight: WeightQuantizer | None, activation: QuantizeDequantize | None) -> None:
        super().__init__(conv, weight, activation)
        self.stride, self.padding, self.dilation, self.groups = conv.stride, conv.padding, conv.dilation, conv.groups

    def forward(self, x: Tensor) -> Tensor:
        padding = self.padding
        if self.shift is not None and any(padding):  # the zeros are shifted with the input
            x, padding = F.pad(x, [size for size in reversed(padding) for _ in range(2)]), (0, 0)  # type: ignore[misc]
        x = self.rounded_input(x)
        if self.frozen is not None and self.weight_quantizer is not None:
            scale = self.weight_quantizer.scale.expand(len(self.frozen), 1, 1, 1).flatten()
            weight = dequantize(self.frozen, scale, self.weight_quantizer.dtype.name, 0)
        else:
            weight = self.weight if self.weight_quantizer is None else self.weight_quantizer(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, padding, self.dilation, self.groups)

    def freeze(self) -> None:
        """Replaces the float weight by its integers."""
        if self.weight_quantizer is not None:
            self.frozen = self.weight_quantizer.integers(self.weight.detach())
            del self.weight


QuantizedLayer = QuantizedLinear | QuantizedConv2d


@torch.no_grad()
def fold_zero_point(layer: QuantizedLayer) -> None:
    """Shifts an asymmetric input so that its zero point is 0, as TensorRT requires, without changing the output.

    With the rounded weight w and the rounded input x, w (x + shift) = w x + shift * sum(w). The input has the same
    integers less a constant, and the second term is subtracted from the bias. For export; it cannot be undone.
    """
    if not isinstance(layer.input, QuantizeDequantize) or layer.input.spec.symmetric:
        return
    weight = layer.weight if layer.weight_quantizer is None else layer.weight_quantizer(layer.weight)
    layer.shift = layer.input.fold_zero_point()
    excess = layer.shift * weight.flatten(1).sum(1)
    layer.bias = nn.Parameter(-excess if layer.bias is None else layer.bias - excess)


def copy_sharing_weights(model: Network) -> Network:
    """Returns a copy whose parameters and buffers are the same tensors: replace them, never change them in place."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def quantizers(model: nn.Module) -> Iterator[tuple[str, Quantizer]]:
    """Yields every quantizer of a network with its tensor's name, as in :mod:`quant.schemes.scheme`."""
    for name, module in model.named_modules():
        if isinstance(module, Quantizer):
            yield name.replace(".weight_quantizer", ".weight"), module


def freeze(model: nn.Module, fold_zero_points: bool = False) -> None:
    """Replaces every quantized layer's float weight by its integers. For export; it cannot be undone.

    Args:
        fold_zero_points: if True, first applies :func:`fold_zero_point` to every layer.
    """
    for module in model.modules():
        if isinstance(module, QuantizedLayer):
            if fold_zero_points:
                fold_zero_point(module)
            module.freeze()
