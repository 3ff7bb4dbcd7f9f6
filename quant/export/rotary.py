"""RoPE as ONNX's RotaryEmbedding operator, for CPUs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from illama.models.illama import Attention, Rotary
from quant.quantizers.layers import QuantizedLinear


@torch.library.custom_op("illama::rotary_embedding", mutates_args=())
def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
    """Rotates the pairs (x[i], x[i + d / 2]) of (B, H, N, d) by angles with cosines and sines (N, d / 2).

    ``positions`` (B, N) are the rows of these tables that ONNX's operator uses, here always 0..N-1.
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


@rotary_embedding.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
    return torch.empty_like(x)


class HalvesRotary(Rotary):
    """RoPE for heads whose dimensions are reordered: even ones first, then odd ones."""

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        cos, sin = rotation.to(x.dtype)
        positions = torch.arange(x.shape[-2], device=x.device).expand(x.shape[0], -1)
        return rotary_embedding(x, cos, sin, positions)


def pair_halves(model: nn.Module) -> None:
    """Replaces the rotation by one operator, in the layout that runtimes have kernels for. In place, not undone.

        before   qkv, Split, Reshape, Transpose, [Split, 2 Squeeze, 4 Mul, Sub, Add, 2 Unsqueeze, Concat, 2 Reshape]
        after    qkv', Split, Reshape, Transpose, RotaryEmbedding

    The released weights rotate interleaved pairs. qkv' has the outputs of each head of q and k in the order 0, 2, 4,
    ..., 1, 3, 5, ..., so that a pair is an element of the first and one of the second half. Scores are sums over a
    head's dimensions, so they and the network's outputs do not change. A quantized layer keeps its integers, in the
    new order.
    """
    for module in model.modules():
        if isinstance(module, Attention):
            module.rotary = HalvesRotary()
            _reorder(module.qkv, _halves(module))


def _halves(attention: Attention) -> Tensor:
    """Returns indices into the outputs of ``qkv``: even, then odd, in each head of q and of k; v in order."""
    outputs = torch.arange(3 * attention.width)
    heads = outputs[: 2 * attention.width].reshape(2 * attention.heads, -1)
    return torch.cat([torch.cat([heads[:, ::2], heads[:, 1::2]], dim=1).flatten(), outputs[2 * attention.width :]])


@torch.no_grad()
def _reorder(linear: nn.Module, order: Tensor) -> None:
    """Replaces the tensors of a layer, which other networks may share."""
    parts = [(linear, "weight"), (linear, "bias")]
    if isinstance(linear, QuantizedLinear) and linear.weight_quantizer is not None:
        parts.append((linear.weight_quantizer, "scale"))
    for module, name in parts:
        tensor = getattr(module, name)
        if isinstance(tensor, Tensor) and len(tensor) == len(order):
            setattr(module, name, nn.Parameter(tensor[order]) if isinstance(tensor, nn.Parameter) else tensor[order])
