"""Published dense peak rates of devices that engines run on. Imports nothing slow.

A rate is in 10^12 operations per second, two per multiply-accumulate; memory bandwidth is in 10^9 bytes per second.
``fp32`` is the rate of the CUDA cores, since TF32 is not FP32; 16-bit and 8-bit rates are those of the tensor cores
with their fastest accumulator, since a lower bound is predicted from them. MXFP8 is given the rate of FP8. A format
that the tensor cores lack is left out. Where a vendor publishes a figure with sparsity, it is halved.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from illama.errors import UserError

if TYPE_CHECKING:
    from illama.graph.reader import Precision

CPU = "cpu"  # name of this machine, whose peak rates are measured


class LacksPrecisionError(UserError):
    """The device does not compute in a precision."""


@dataclass(frozen=True)
class Device:
    """Peak rates of a device.

    Attributes:
        bandwidth: memory bandwidth, 10^9 bytes per second.
        peaks: 10^12 operations per second in each precision that the device computes in.
        source: where the figures are published.
    """

    name: str
    bandwidth: float
    peaks: Mapping[Precision, float]
    source: str

    def peak(self, precision: Precision) -> float:
        """Returns operations per second; raises LacksPrecisionError if the device does not compute in ``precision``."""
        if precision not in self.peaks:
            raise LacksPrecisionError(
                f"{self.name} does not compute in {precision}: choose another bundle or another --device"
            )
        return self.peaks[precision] * 1e12


def _device(name: str, bandwidth: float, source: str, **peaks: float) -> Device:
    return Device(name, bandwidth, peaks, source)  # type: ignore[arg-type]


# An Orin GPU has 2 x 2,048 dense INT8 operations per multiprocessor and clock, half as many in FP16, and 2 x 128 in
# FP32: the Technical Brief's 170 sparse TOPS are 16 multiprocessors at 1.3 GHz. The GPU's share alone, without DLA.
_ORIN = "NVIDIA Jetson AGX Orin Series Technical Brief v1.2"
_MODULES = "https://developer.nvidia.com/embedded/jetson-modules"
_GA102 = "NVIDIA Ampere GA102 GPU Architecture whitepaper v2.1, appendix A, table 9"
_ADA = "NVIDIA Ada GPU Architecture whitepaper v2.1, appendix A, table 2"
_BLACKWELL = "NVIDIA RTX Blackwell GPU Architecture whitepaper v1.1, appendix A"
_CARDS = "https://www.nvidia.com/en-us/geforce/graphics-cards/compare/"
_THOR = "https://developer.nvidia.com/blog/introducing-nvidia-jetson-thor-the-ultimate-platform-for-physical-ai/"

DEVICES = {
    device.name: device
    for device in (
        # 8 GB module at its first clock, 625 MHz: 40 TOPS with sparsity.
        _device("orin-nano", 68, _MODULES, fp32=1.28, fp16=10, int8=20),
        # The same with JetPack 6.2's Super mode, 1,020 MHz: 67 TOPS with sparsity.
        _device("orin-nano-super", 102, _MODULES, fp32=2.09, fp16=16.7, int8=33.5),
        # 16 GB: 8 multiprocessors at 918 MHz; the module's 100 TOPS count its DLAs and sparsity.
        _device("orin-nx", 102.4, _MODULES, fp32=1.88, fp16=15.0, int8=30.1),
        # 64 GB: "170 Sparse TOPs of INT8 Tensor compute, and up to 5.3 FP32 TFLOPs of CUDA compute".
        _device("agx-orin", 204.8, _ORIN, fp32=5.3, fp16=42.5, int8=85),
        # T5000: 517 TFLOPS "Dense FP8 | Sparse FP16", 1,035 "Sparse FP8 | Sparse INT8"; 2,560 cores at 1,575 MHz.
        # 2,070 "Sparse FP4".
        _device("thor", 273, _THOR, fp32=8.06, fp16=258.5, int8=517, fp8=517, mxfp8=517, nvfp4=1035),
        _device("rtx-3090", 936, _GA102, fp32=35.6, fp16=142, int8=284),
        # 242 "AI TOPS", which are 8-bit with sparsity.
        _device("rtx-4060", 272, _CARDS, fp32=15.1, fp16=60.5, int8=121, fp8=121),
        _device("rtx-4090", 1008, _ADA, fp32=82.6, fp16=330.3, int8=660.6, fp8=660.6),
        _device("rtx-5090", 1792, _BLACKWELL, fp32=104.8, fp16=419, int8=838, fp8=838, mxfp8=838, nvfp4=1676),
        # 242 and 485 with sparsity.
        _device("l4", 300, "https://www.nvidia.com/en-us/data-center/l4/", fp32=30.3, fp16=121, int8=242.5, fp8=242.5),
        _device("a100", 2039, "NVIDIA A100 80GB SXM datasheet", fp32=19.5, fp16=312, int8=624),
        # 1,979 and 3,958 with sparsity.
        _device("h100", 3350, "NVIDIA H100 SXM datasheet", fp32=67, fp16=989.5, int8=1979, fp8=1979),
    )
}


def find_device(name: str) -> Device:
    """Returns a device by its name; raises UserError, which lists the names, if there is no such device."""
    if name not in DEVICES:
        raise UserError(f"unknown device {name!r}: choose {CPU} (this machine, measured) or {', '.join(DEVICES)}")
    return DEVICES[name]
