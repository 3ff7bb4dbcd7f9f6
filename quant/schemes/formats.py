"""Number formats of 8 bits or fewer, and the quantization of one tensor.

The block formats have a scale for every few consecutive channels: NVFP4 a float8e4m3fn one for 16, times a float32 one
for the tensor; MXFP8 a power of two for 32 (OCP Microscaling Formats specification 1.0).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from illama.errors import UserError

FormatName = Literal["int8", "uint8", "int6", "uint6", "int4", "uint4", "fp8", "nvfp4", "mxfp8"]
Granularity = Literal["tensor", "channel", "group", "token", "block"]
Calibrator = Literal["max", "percentile", "entropy", "mse"]
SMALLEST_SCALE = 2.0**-24  # of float16
_E4M3_MAX = 448.0
_SMALLEST_BLOCK_SCALE = 2.0**-9  # of float8e4m3fn


@dataclass(frozen=True)
class QuantDtype:
    """A number format of 8 bits or fewer.

    Attributes:
        name: ``fp8`` is ONNX's float8e4m3fn, ``nvfp4`` has the values of float4e2m1. 6-bit formats have no ONNX type
            and are stored in 8 bits.
        storage: torch dtype that stores the values; 4 bits are stored in 8, because torch cannot compute with them.
        low, high: smallest and largest value before scaling; values outside are clamped.
        mantissa: bits of the mantissa of a floating-point format; None if the values are integers.
        least_exponent: exponent of the smallest normal number of a floating-point format.
        block: number of consecutive channels with a scale of their own; 0 if the format does not say it.
    """

    name: FormatName
    bits: int
    storage: torch.dtype
    low: float
    high: float
    mantissa: int | None = None
    least_exponent: int = 0
    block: int = 0

    @property
    def signed(self) -> bool:
        return self.low < 0

    @property
    def onnx_name(self) -> str:
        """ONNX's name of the type that holds the values."""
        if self.rounds:
            return self.name.replace("6", "8").upper()
        return "FLOAT4E2M1" if self.bits == 4 else "FLOAT8E4M3FN"

    @property
    def rounds(self) -> bool:
        """True if the values are integers."""
        return self.mantissa is None

    @property
    def power_of_two_scales(self) -> bool:
        """True if a scale can be doubled and halved only."""
        return self.name == "mxfp8"

    def scale(self, amax: torch.Tensor) -> torch.Tensor:
        """Returns the scale that maps the largest magnitude ``amax`` to the largest value; 1 for an all-zero tensor."""
        return to_half_range(torch.where(amax > 0, amax / self.high, torch.ones_like(amax)))

    def tensor_scale(self, amax: torch.Tensor) -> torch.Tensor:
        """Returns the scale of a whole tensor by which the block scales of NVFP4 are multiplied; 1 for MXFP8."""
        largest = amax.float().max()
        if self.power_of_two_scales:
            return torch.ones_like(largest)
        return torch.where(largest > 0, largest / (self.high * _E4M3_MAX), torch.ones_like(largest))

    def block_scales(self, amax: torch.Tensor, tensor_scale: torch.Tensor) -> torch.Tensor:
        """Returns the scales of blocks with the largest magnitudes ``amax``, as files store them, times the tensor's.

        The arithmetic is that of nvidia-modelopt's ``NVFP4QTensor`` and ``MXFP8QTensor``, except that a power of two
        is found exactly, without a logarithm.
        """
        if self.power_of_two_scales:
            fraction, exponent = torch.frexp(amax.float() / self.high)  # amax = fraction * 2^exponent, 1/2 or more
            exponent = torch.where(fraction == 0, -127, exponent - (fraction == 0.5).int())
            return torch.exp2(exponent.clamp(-127, 127).float())
        scale = amax.float() / (self.high * tensor_scale)
        scale = torch.where(scale == 0, torch.ones_like(scale), scale).clamp(_SMALLEST_BLOCK_SCALE, _E4M3_MAX)
        return scale.to(torch.float8_e4m3fn).float() * tensor_scale

    def step(self, values: torch.Tensor) -> torch.Tensor:
        """Returns the distance of the format's values around each of ``values``, which are scaled."""
        if self.mantissa is None:
            return torch.ones_like(values)
        exponent = torch.frexp(values.abs().clamp(min=2.0**self.least_exponent))[1] - 1
        return torch.exp2((exponent - self.mantissa).to(values.dtype))

    def round(self, values: torch.Tensor) -> torch.Tensor:
        """Rounds scaled values within the format's range to its nearest ones, half to even."""
        if self.rounds:
            return values.round()
        if self.bits == 8:
            return values.to(self.storage).to(values.dtype)
        step = self.step(values)
        return (values / step).round() * step

    def quantize(self, x: torch.Tensor, scale: torch.Tensor, zero_point: int = 0) -> torch.Tensor:
        """Returns x / scale, rounded half to even, plus the zero point, clamped, as ONNX QuantizeLinear (opset 23)."""
        scaled = x / scale
        if self.rounds:
            return (scaled.round() + zero_point).clamp(self.low, self.high).to(self.storage)
        return self.round(scaled.clamp(self.low, self.high)).to(self.storage)


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
    "fp8": QuantDtype("fp8", 8, torch.float8_e4m3fn, -_E4M3_MAX, _E4M3_MAX, 3, -6),
    "nvfp4": QuantDtype("nvfp4", 4, torch.float8_e4m3fn, -6.0, 6.0, 1, 0, block=16),
    "mxfp8": QuantDtype("mxfp8", 8, torch.float8_e4m3fn, -_E4M3_MAX, _E4M3_MAX, 3, -6, block=32),
}


@dataclass(frozen=True)
class TensorSpec:
    """How one tensor is quantized.

    Attributes:
        format: name of a format in :data:`FORMATS`.
        granularity: one scale per ``tensor``; for a weight also per output ``channel``, or per ``group`` of consecutive
            inputs of an output channel (Linears only); for an activation in torchao, which quantizes it at run time,
            per ``token``; one per ``block`` for the formats ``nvfp4`` and ``mxfp8``, of activations at run time.
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
        if bool(self.dtype.block) != (self.granularity == "block"):
            raise UserError("granularity block is that of nvfp4 and mxfp8, and of no other format")
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

    @property
    def scale_group(self) -> int:
        """Number of consecutive inputs of an output channel with one scale; 0 if a channel has one, or the tensor."""
        return self.dtype.block or (self.group_size if self.granularity == "group" else 0)

    def __str__(self) -> str:
        """A short description for tables: ``int4 per group of 64, mse``."""
        words: list[str] = [self.format]
        if self.granularity != "tensor":
            words.append(f"per {self.granularity}" + f" of {self.scale_group}" * bool(self.scale_group))
        if not self.symmetric:
            words.append("asymmetric")
        method = f"amax {self.amax:g}" if self.amax is not None else self.calibrator
        return " ".join(words) + ("" if method == "max" else f", {method}")
