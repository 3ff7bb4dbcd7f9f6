"""Number formats of 8 bits or fewer, and how one tensor is rounded to one of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from illama.errors import UserError

FormatName = Literal["int8", "uint8", "int6", "uint6", "int4", "uint4", "fp8"]
Granularity = Literal["tensor", "channel", "group", "token"]
Calibrator = Literal["max", "percentile", "entropy", "mse"]


@dataclass(frozen=True)
class QuantDtype:
    """A number format of 8 bits or fewer.

    Attributes:
        name: ``fp8`` is ONNX's float8e4m3fn; 6 bits have no type of their own and are kept in 8.
        storage: the torch type that stores it; torch has none of 4 bits that computes.
        low, high: smallest and largest value before scaling; values beyond are clamped to them.
    """

    name: FormatName
    bits: int
    storage: torch.dtype
    low: float
    high: float

    @property
    def signed(self) -> bool:
        return self.low < 0

    @property
    def rounds(self) -> bool:
        """Whether the values are integers."""
        return self.storage != torch.float8_e4m3fn

    def scale(self, amax: torch.Tensor) -> torch.Tensor:
        """The scale that maps ``amax``, the largest magnitude, to the largest value; 1 for an all-zero tensor."""
        return torch.where(amax > 0, amax / self.high, torch.ones_like(amax))

    def quantize(self, x: torch.Tensor, scale: torch.Tensor, zero_point: int = 0) -> torch.Tensor:
        """x / scale, rounded half to even, moved by the zero point and clamped, as ONNX QuantizeLinear (opset 23)."""
        scaled = x / scale
        if self.rounds:
            scaled = scaled.round() + zero_point
        return scaled.clamp(self.low, self.high).to(self.storage)


FORMATS: dict[str, QuantDtype] = {
    "int8": QuantDtype("int8", 8, torch.int8, -128.0, 127.0),
    "uint8": QuantDtype("uint8", 8, torch.uint8, 0.0, 255.0),
    "int6": QuantDtype("int6", 6, torch.int8, -32.0, 31.0),
    "uint6": QuantDtype("uint6", 6, torch.uint8, 0.0, 63.0),
    "int4": QuantDtype("int4", 4, torch.int8, -8.0, 7.0),
    "uint4": QuantDtype("uint4", 4, torch.uint8, 0.0, 15.0),
    "fp8": QuantDtype("fp8", 8, torch.float8_e4m3fn, -448.0, 448.0),
}


@dataclass(frozen=True)
class TensorSpec:
    """How one tensor is quantized.

    Attributes:
        format: a name in :data:`FORMATS`.
        granularity: one scale per ``tensor``; of a weight also per output ``channel`` or per ``group`` of consecutive
            inputs of an output channel (a convolution's has no groups); of an activation that torchao quantizes
            while the network runs, per ``token``.
        group_size: inputs in a group.
        symmetric: 0 is the integer 0. Otherwise the format must be unsigned, and range and zero point are those of the
            smallest and the largest value seen.
        calibrator: how the range is chosen from the values seen; see :mod:`quant.quantizers.observers`.
        percentile: of the magnitudes other than 0, in percent, for that calibrator.
        amax: the largest magnitude, given instead of calibrated.
    """

    format: FormatName
    granularity: Granularity = "tensor"
    group_size: int = 64
    symmetric: bool = True
    calibrator: Calibrator = "max"
    percentile: float = 99.99
    amax: float | None = None

    def __post_init__(self) -> None:
        choices = {"format": FORMATS, "granularity": get_args(Granularity), "calibrator": get_args(Calibrator)}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise UserError(f"unknown {name} {getattr(self, name)!r}: choose from {', '.join(known)}")
        if not self.symmetric and (self.dtype.signed or self.granularity not in ("tensor", "token")):
            raise UserError("an asymmetric tensor needs an unsigned format (uint8) and one scale per tensor")
        if not self.symmetric and (self.calibrator != "max" or self.amax is not None):
            raise UserError(
                "an asymmetric tensor's range is from the smallest to the largest value: no calibrator, no amax"
            )
        if self.calibrator == "entropy" and not self.dtype.rounds:
            raise UserError(f"entropy calibration is of integers: choose another calibrator for {self.format}")
        if (
            not isinstance(self.group_size, int)
            or self.group_size < 1
            or not 50 <= self.percentile <= 100
            or (self.amax is not None and not self.amax > 0)
        ):
            raise UserError("group_size must be a whole number from 1, percentile within 50 and 100, and amax positive")

    @property
    def dtype(self) -> QuantDtype:
        return FORMATS[self.format]

    def __str__(self) -> str:
        """In a few words, for a table: ``int4 per group of 64, mse``."""
        words: list[str] = [self.format]
        if self.granularity != "tensor":
            words.append(
                f"per group of {self.group_size}" if self.granularity == "group" else f"per {self.granularity}"
            )
        if not self.symmetric:
            words.append("asymmetric")
        method = f"amax {self.amax:g}" if self.amax is not None else self.calibrator
        return " ".join(words) + ("" if method == "max" else f", {method}")
