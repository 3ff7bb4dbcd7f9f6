"""Number formats of 8 bits or fewer, and the quantization of one tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from illama.errors import UserError

FormatName = Literal["int8", "uint8", "int6", "uint6", "int4", "uint4", "fp8"]
Granularity = Literal["tensor", "channel", "group", "token"]
Calibrator = Literal["max", "percentile", "entropy", "mse"]
SMALLEST_SCALE = 2.0**-24  # of float16


@dataclass(frozen=True)
class QuantDtype:
    """A number format of 8 bits or fewer.

    Attributes:
        name: ``fp8`` is ONNX's float8e4m3fn. 6-bit formats have no ONNX type and are stored in 8 bits.
        storage: torch dtype that stores the values; 4 bits are stored in 8, because torch cannot compute with int4.
        low, high: smallest and largest value before scaling; values outside are clamped.
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
    def onnx_name(self) -> str:
        """ONNX's name of the type that holds the values."""
        return "FLOAT8E4M3FN" if self.name == "fp8" else self.name.replace("6", "8").upper()

    @property
    def rounds(self) -> bool:
        """True if the values are integers."""
        return self.storage != torch.float8_e4m3fn

    def scale(self, amax: torch.Tensor) -> torch.Tensor:
        """Returns the scale that maps the largest magnitude ``amax`` to the largest value; 1 for an all-zero tensor."""
        return to_half_range(torch.where(amax > 0, amax / self.high, torch.ones_like(amax)))

    def quantize(self, x: torch.Tensor, scale: torch.Tensor, zero_point: int = 0) -> torch.Tensor:
        """Returns x / scale, rounded half to even, plus the zero point, clamped, as ONNX QuantizeLinear (opset 23)."""
        scaled = x / scale
        if self.rounds:
            scaled = scaled.round() + zero_point
        return scaled.clamp(self.low, self.high).to(self.storage)


def to_half_range(scale: torch.Tensor) -> torch.Tensor:
    """Rounds scales below float16's normal numbers up to its subnormal ones, so that none becomes zero there.

    Graphs for TensorRT have their scales in float16. Rounding by another scale than the stored one would change the
    weights of a channel by up to a half.
    """
    normal = torch.finfo(torch.float16).smallest_normal
    return torch.where(scale < normal, (scale / SMALLEST_SCALE).ceil() * SMALLEST_SCALE, scale)


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
        format: name of a format in :data:`FORMATS`.
        granularity: one scale per ``tensor``; for a weight also per output ``channel``, or per ``group`` of consecutive
            inputs of an output channel (Linears only); for an activation in torchao, which quantizes it at run time,
            per ``token``.
        group_size: number of inputs in a group.
        symmetric: if True, the zero point is 0. Otherwise the format must be unsigned, and range and zero point are
            those of the smallest and the largest value in calibration.
        calibrator: how the range is chosen; see :mod:`quant.quantizers.observers`.
        percentile: percentage of the nonzero magnitudes within the range, for that calibrator.
        amax: the largest magnitude, used instead of calibration.

    Raises:
        UserError: a value is invalid, or does not fit another.
    """

    format: FormatName
    granularity: Granularity = "tensor"
    group_size: int = 64
    symmetric: bool = True
    calibrator: Calibrator = "max"
    percentile: float = 99.99
    amax: float | None = None

    def __post_init__(self) -> None:
        allowed = {"format": FORMATS, "granularity": get_args(Granularity), "calibrator": get_args(Calibrator)}
        for name, known in allowed.items():
            if getattr(self, name) not in known:
                raise UserError(f"unknown {name} {getattr(self, name)!r}: choose from {', '.join(known)}")
        if not self.symmetric and (self.dtype.signed or self.granularity not in ("tensor", "token")):
            raise UserError("an asymmetric tensor needs an unsigned format (uint8) and one scale per tensor")
        if not self.symmetric and (self.calibrator != "max" or self.amax is not None):
            raise UserError(
                "an asymmetric tensor's range is from the smallest to the largest value: leave out calibrator and amax"
            )
        if self.calibrator == "entropy" and not self.dtype.rounds:
            raise UserError(f"entropy calibration is for integers: choose another calibrator for {self.format}")
        valid = isinstance(self.group_size, int) and self.group_size >= 1 and 50 <= self.percentile <= 100
        if not valid or (self.amax is not None and not self.amax > 0):
            raise UserError("group_size must be an integer of 1 or more, percentile 50 to 100, and amax above 0")

    @property
    def dtype(self) -> QuantDtype:
        return FORMATS[self.format]

    def __str__(self) -> str:
        """A short description for tables: ``int4 per group of 64, mse``."""
        words: list[str] = [self.format]
        if self.granularity != "tensor":
            words.append(f"per {self.granularity}" + f" of {self.group_size}" * (self.granularity == "group"))
        if not self.symmetric:
            words.append("asymmetric")
        method = f"amax {self.amax:g}" if self.amax is not None else self.calibrator
        return " ".join(words) + ("" if method == "max" else f", {method}")
