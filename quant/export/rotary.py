"""RoPE as ONNX's RotaryEmbedding operator, for CPUs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from illama.models.attention import attentions
from illama.models.illama import Rotary
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
        shape = x.shape
        if cos.ndim == 3:  # a table for each head; the operator takes one, so all heads become one
            x, cos, sin = x.flatten(1, 2).unsqueeze(1), cos.flatten(0, 1), sin.flatten(0, 1)
        positions = torch.arange(x.shape[-2], device=x.device).expand(x.shape[0], -1)
        return rotary_embedding(x, cos, sin, positions).reshape(shape)


def pair_halves(model: nn.Module) -> None:
    """Replaces the rotation by one operator, in the layout that runtimes have kernels for. In place, not undone.

        before   qkv, Split, Reshape, Transpose, [Split, 2 Squeeze, 4 Mul, Sub, Add, 2 Unsqueeze, Concat, 2 Reshape]
        after    qkv', Split, Reshape, Transpose, RotaryEmbedding

    The released weights rotate interleaved pairs. qkv' has the outputs of each head of q and k in the order 0, 2, 4,
    ..., 1, 3, 5, ..., so that a pair is an element of the first and one of the second half. Scores are sums over a
    head's dimensions, so they and the network's outputs do not change. A quantized layer keeps its integers, in the
    new order, and norms of q and k follow.
    """
    for attention in attentions(model).values():
        if getattr(attention, "rotation", ...) is None:  # an iLLaMA's table is of the network
            continue
        attention.rotary = HalvesRotary()
        outputs = torch.arange(len(attention.qkv.weight)).reshape(3, attention.num_heads, -1)
        order = torch.cat([outputs[0, 0, ::2], outputs[0, 0, 1::2]])  # even, then odd, in each head of q and of k
        _reorder(attention.qkv, torch.cat([outputs[:2, :, order].flatten(), outputs[2].flatten()]))
        for norm in ("q_norm", "k_norm"):
            _reorder(getattr(attention, norm, None), order)


@torch.no_grad()
def _reorder(layer: nn.Module | None, order: Tensor) -> None:
    """Replaces the tensors of a layer, which other networks may share."""
    parts: list[tuple[nn.Module | None, str]] = [(layer, "weight"), (layer, "bias")]
    if isinstance(layer, QuantizedLinear) and layer.weight_quantizer is not None:
        parts.append((layer.weight_quantizer, "scale"))
    for module, name in parts:
        tensor = getattr(module, name, None)
        if isinstance(tensor, Tensor) and len(tensor) == len(order):
            setattr(module, name, nn.Parameter(tensor[order]) if isinstance(tensor, nn.Parameter) else tensor[order])
