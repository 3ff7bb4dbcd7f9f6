"""Rounding of tensors in formats with block scales, and its two operators.

torch.onnx.export translates them to TensorRT's, and the graph for CPUs has the same values in standard ones
(:mod:`illama.graph.block_scales`):

    illama::quantize_blocks(x, scale)       ->   TRT_FP4DynamicQuantize or TRT_MXFP8DynamicQuantize, DequantizeLinear
    illama::dequantize_blocks(weight, ...)  ->   DequantizeLinear of an initializer of 4 or 8 bits
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant.schemes.formats import FORMATS, QuantDtype


@torch.library.custom_op("illama::quantize_blocks", mutates_args=())
def quantize_blocks(x: Tensor, tensor_scale: Tensor, dtype: str) -> Tensor:
    """Quantizes blocks of the last dimension by their own largest magnitudes, and dequantizes them."""
    return round_blocks(x, tensor_scale, FORMATS[dtype])


@torch.library.custom_op("illama::dequantize_blocks", mutates_args=())
def dequantize_blocks(weight: Tensor, scale: Tensor, tensor_scale: Tensor, dtype: str, result: torch.dtype) -> Tensor:
    """Returns a weight (in, out), stored in float8, times its scales (in / block, out) and that of the tensor.

    The scales are float8 values, or for MXFP8 the exponents of powers of two plus 127, as uint8.
    """
    scale = torch.exp2(scale.float() - 127) if scale.dtype == torch.uint8 else scale.float() * tensor_scale
    return (weight.float() * scale.repeat_interleave(FORMATS[dtype].block, 0)).to(result)


@quantize_blocks.register_fake
def _(x: Tensor, tensor_scale: Tensor, dtype: str) -> Tensor:
    return torch.empty_like(x)


@dequantize_blocks.register_fake
def _(weight: Tensor, scale: Tensor, tensor_scale: Tensor, dtype: str, result: torch.dtype) -> Tensor:
    return torch.empty_like(weight, dtype=result)


def round_blocks(x: Tensor, tensor_scale: Tensor, dtype: QuantDtype) -> Tensor:
    """Returns x with the blocks of its last dimension rounded by scales from their largest magnitudes."""
    scale, wide = scales_of_blocks(x, tensor_scale, dtype), x.to(torch.promote_types(x.dtype, torch.float32))
    return (dtype.round((wide / scale).clamp(dtype.low, dtype.high)) * scale).to(x.dtype)


def scales_of_blocks(x: Tensor, tensor_scale: Tensor, dtype: QuantDtype) -> Tensor:
    """Returns the scale of every value of x, by which its block is rounded."""
    amax = x.unflatten(-1, (-1, dtype.block)).abs().amax(-1)
    return dtype.block_scales(amax, tensor_scale).repeat_interleave(dtype.block, -1)


def stored_block_scale(scale: Tensor, tensor_scale: Tensor, dtype: QuantDtype) -> Tensor:
    """Returns block scales as files store them: float8, without the tensor's, or exponents plus 127 for MXFP8."""
    if dtype.power_of_two_scales:
        return (torch.frexp(scale)[1] + 126).to(torch.uint8)
    return (scale / tensor_scale).to(torch.float8_e4m3fn)
