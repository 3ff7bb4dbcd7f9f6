"""Size of a layer in each number format."""

from __future__ import annotations

from typing import Any

from torch import nn

from quant.schemes.formats import TensorSpec


def weight_bytes(layer: nn.Module, spec: TensorSpec | None) -> int:
    """Returns the bytes of a layer's weight and scales in the exported file; the bias is the same in every format."""
    weight: Any = layer.weight
    if spec is None:
        return 4 * weight.numel()
    stored = (weight.numel() + 1) // 2 if spec.dtype.bits == 4 else weight.numel()
    groups = weight.numel() // spec.group_size if spec.granularity == "group" else len(weight)
    return stored + 4 * groups
