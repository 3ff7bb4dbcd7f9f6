"""Quantized layers: real 8-bit weights, fixed scales, and the arithmetic of ONNX's Q/DQ operators.

Their forward pass is two custom operators, which torch.onnx.export turns into the standard ones:

    illama::quantize_dequantize(x, scale)   ->   QuantizeLinear, DequantizeLinear
    illama::dequantize(weight, scale)       ->   DequantizeLinear of an 8-bit initializer

so the exported file has its Q/DQ where this model has its layers, by construction.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quant.schemes import FORMATS, NumberFormat


@torch.library.custom_op("illama::quantize_dequantize", mutates_args=())
def quantize_dequantize(x: Tensor, scale: Tensor, number: str) -> Tensor:
    """x rounded to a number format with one scale: what QuantizeLinear and DequantizeLinear do together."""
    return FORMATS[number].quantize(x, scale).to(scale.dtype) * scale


@torch.library.custom_op("illama::dequantize", mutates_args=())
def dequantize(weight: Tensor, scale: Tensor, axis: int) -> Tensor:
    """An 8-bit weight times its scales, one per index of ``axis``."""
    shape = [1] * weight.ndim
    shape[axis] = -1
    return weight.to(scale.dtype) * scale.reshape(shape)


@quantize_dequantize.register_fake
def _(x: Tensor, scale: Tensor, number: str) -> Tensor:
    return torch.empty_like(x)


@dequantize.register_fake
def _(weight: Tensor, scale: Tensor, axis: int) -> Tensor:
    return torch.empty_like(weight, dtype=scale.dtype)


class QuantizeDequantize(nn.Module):
    """Rounds its input to a number format with one calibrated scale."""

    scale: Tensor

    def __init__(self, number: NumberFormat, amax: Tensor) -> None:
        super().__init__()
        self.number = number.name
        self.register_buffer("scale", number.scale(amax.float().reshape(())))

    def forward(self, x: Tensor) -> Tensor:
        return quantize_dequantize(x, self.scale, self.number)


class QuantizedLinear(nn.Module):
    """A Linear over an 8-bit weight (in, out), transposed at once so that the exported graph needs no Transpose."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear, number: NumberFormat, amax: Tensor, input_quantizer: nn.Module) -> None:
        super().__init__()
        scale = number.scale(amax.float().reshape(-1, 1))
        quantized = number.quantize(linear.weight.detach(), scale)
        self.input = input_quantizer
        self.register_buffer("weight", quantized.t().contiguous())
        self.register_buffer("scale", scale.reshape(-1))
        self.register_buffer("bias", linear.bias.detach().clone() if linear.bias is not None else None)

    def forward(self, x: Tensor, outputs: slice | None = None) -> Tensor:
        """(..., in) -> (..., out), or the outputs named by the slice."""
        weight, scale, bias = self.weight, self.scale, self.bias
        if outputs is not None:
            weight, scale = weight[:, outputs], scale[outputs]
            bias = bias[outputs] if bias is not None else None
        y = self.input(x) @ dequantize(weight, scale, 1)
        return y if bias is None else y + bias


class QuantizedConv2d(nn.Module):
    """A convolution over an 8-bit weight (out, in, kh, kw)."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, conv: nn.Conv2d, number: NumberFormat, amax: Tensor, input_quantizer: nn.Module) -> None:
        super().__init__()
        scale = number.scale(amax.float().reshape(-1, 1, 1, 1))
        self.input, self.stride = input_quantizer, conv.stride
        self.register_buffer("weight", number.quantize(conv.weight.detach(), scale))
        self.register_buffer("scale", scale.reshape(-1))
        self.register_buffer("bias", conv.bias.detach().clone() if conv.bias is not None else None)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.input(x), dequantize(self.weight, self.scale, 0), self.bias, self.stride)
