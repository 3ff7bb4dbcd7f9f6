"""Quantization schemes as data: which tensors are quantized, and to which number format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from illama.errors import UserError

NumberName = Literal["int8", "uint8", "fp8"]


@dataclass(frozen=True)
class NumberFormat:
    """An 8-bit number format.

    Attributes:
        name: as the ONNX operators know it (``fp8`` is float8e4m3fn).
        dtype: the torch type that stores it.
        low, high: smallest and largest value before scaling; values beyond are clamped to them.
    """

    name: NumberName
    dtype: torch.dtype
    low: float
    high: float

    def scale(self, amax: torch.Tensor) -> torch.Tensor:
        """The scale that maps ``amax``, the largest magnitude, to the largest value; 1 for an all-zero tensor."""
        return torch.where(amax > 0, amax / self.high, torch.ones_like(amax))

    def quantize(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """x / scale, rounded half to even and clamped, as ONNX QuantizeLinear does (opset 23)."""
        scaled = x / scale
        if self.dtype != torch.float8_e4m3fn:
            scaled = scaled.round()
        return scaled.clamp(self.low, self.high).to(self.dtype)


FORMATS: dict[str, NumberFormat] = {
    "int8": NumberFormat("int8", torch.int8, -128.0, 127.0),
    "uint8": NumberFormat("uint8", torch.uint8, 0.0, 255.0),
    "fp8": NumberFormat("fp8", torch.float8_e4m3fn, -448.0, 448.0),
}


@dataclass(frozen=True)
class Scheme:
    """What is quantized to what. Residual additions and normalisations never are.

    Attributes:
        weights: format of the weights of every Linear and of the patch convolution, a scale per output channel.
        activations: format of their inputs and of q, k and v of attention, one scale per tensor.
        probabilities: format of the softmax output, which is never negative.
    """

    name: str
    weights: NumberFormat
    activations: NumberFormat
    probabilities: NumberFormat


SCHEMES: dict[str, Scheme] = {
    "int8": Scheme("int8", FORMATS["int8"], FORMATS["int8"], FORMATS["uint8"]),
    "fp8": Scheme("fp8", FORMATS["fp8"], FORMATS["fp8"], FORMATS["fp8"]),
}


def find_scheme(name: str) -> Scheme:
    """The scheme of that name; UserError if there is none."""
    if name not in SCHEMES:
        raise UserError(f"unknown scheme {name!r}: choose from {', '.join(SCHEMES)}")
    return SCHEMES[name]
