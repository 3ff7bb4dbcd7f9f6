"""Statistics of a tensor over the calibration images, and the range that is chosen from them.

Symmetric tensors use the calibrator's largest magnitude, asymmetric ones the minimum and maximum. calibrate.py turns
them into scale and zero point.

A :class:`RangeObserver` has the methods of nvidia-modelopt's calibrators, so that ModelOpt's quantizers feed it.
ModelOpt's own histogram keeps as many bins as the largest value needs and searches them one by one, which takes
minutes for a small network. This one has a fixed number of bins, doubles their width if a value does not fit, and
evaluates all ranges in one pass.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from illama.errors import UserError
from quant.schemes.formats import QuantDtype, TensorSpec

BINS = 4096
_SHARES = 100  # mse and entropy compare the ranges 1/100, 2/100 ... of the largest magnitude, or FP8's octave above it


class RangeObserver:
    """Smallest and largest value of a tensor, and a histogram of its magnitudes if the spec needs one.

    Attributes:
        low, high: smallest and largest value; scalars.
        counts: number of magnitudes in each of BINS equal bins of [0, ``limit``]. Zeros are not counted, because every
            format represents them exactly: percentiles are those of the other values.
    """

    def __init__(self, spec: TensorSpec) -> None:
        self.spec = spec
        self.reset()

    def reset(self) -> None:
        """Forgets all values."""
        self.low, self.high = torch.tensor(float("inf")), torch.tensor(float("-inf"))
        self.counts, self.limit = torch.zeros(BINS), 0.0

    def collect(self, x: Tensor) -> None:
        """Adds the values of one batch; UserError for NaN or infinity."""
        low, high = (value.cpu() for value in x.detach().float().aminmax())
        if not (low.isfinite() and high.isfinite()):
            raise UserError("NaN or infinite activations in calibration: check the images and the weights")
        self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
        if self.spec.calibrator != "max" and self.spec.symmetric:
            self._count(x.detach().float().abs(), float(torch.maximum(-low, high)))

    def _count(self, magnitudes: Tensor, largest: float) -> None:
        if not largest:
            return
        self.limit = self.limit or largest
        while largest > self.limit:
            self.counts = torch.cat([self.counts.unflatten(0, (-1, 2)).sum(1), torch.zeros(BINS // 2)])
            self.limit *= 2
        counts = torch.histc(magnitudes, BINS, 0.0, self.limit).cpu()
        counts[0] -= (magnitudes == 0).sum().cpu()
        self.counts += counts

    def compute_amax(self) -> Tensor:
        """Returns the largest magnitude to represent, by the spec's calibrator; UserError without any value."""
        if self.low > self.high:
            raise UserError("a tensor got no value in calibration: give images, or leave it in floating point")
        if self.spec.amax is not None:
            return torch.tensor(self.spec.amax)
        largest = torch.maximum(-self.low, self.high)
        if self.spec.calibrator == "max" or not self.spec.symmetric or not self.limit:
            return largest
        counts, limit = self.counts.double().numpy(), self.limit
        if self.spec.calibrator == "percentile":
            chosen = percentile_amax(counts, limit, self.spec.percentile)
        elif self.spec.calibrator == "mse":
            chosen = mse_amax(counts, limit, self.spec.dtype)
            if not self.spec.dtype.rounds:  # half a range of FP8 has the same values
                return torch.tensor(chosen / 2 if chosen > 2 * largest else chosen)
        else:
            chosen = entropy_amax(counts, limit, self.spec.dtype)
        return torch.minimum(torch.tensor(chosen), largest)


def percentile_amax(counts: np.ndarray, limit: float, percentile: float) -> float:
    """Returns the magnitude that ``percentile`` percent of the counted values do not exceed, to within a bin."""
    cumulative = counts.cumsum()
    return float((np.searchsorted(cumulative, percentile / 100 * cumulative[-1]) + 1) * limit / len(counts))


def mse_amax(counts: np.ndarray, limit: float, dtype: QuantDtype) -> float:
    """Returns the range with the smallest squared error of rounding and clamping together."""
    magnitudes = torch.from_numpy((np.arange(len(counts)) + 0.5) * limit / len(counts)).float()
    errors, ranges = [], _ranges(limit, dtype)
    for amax in ranges:
        scale = torch.tensor(amax / dtype.high)
        rounded = dtype.quantize(magnitudes, scale).float() * scale
        errors.append(float(((rounded - magnitudes).double().square().numpy() * counts).sum()))
    return ranges[int(np.argmin(errors))]


def entropy_amax(counts: np.ndarray, limit: float, dtype: QuantDtype) -> float:
    """Returns the range whose quantized distribution has the smallest KL divergence from the observed one.

    This is TensorRT's entropy calibration (Migacz, "8-bit inference with TensorRT", GTC 2017). Values beyond a range
    are clamped to it in both distributions. Ranges of fewer bins than the format has levels are left out: they would
    be represented without loss.
    """
    levels = int(dtype.high) + 1
    divergences = []
    ranges = [amax for amax in _ranges(limit, dtype) if amax / limit * len(counts) >= levels]
    for amax in ranges:
        kept = round(amax / limit * len(counts))
        seen = counts[:kept].copy()
        level = (np.arange(kept) * levels // kept).astype(np.intp)
        mass = np.bincount(level, weights=seen, minlength=levels)
        occupied = np.bincount(level, weights=seen > 0, minlength=levels)
        rounded = np.where(seen > 0, (mass / np.maximum(occupied, 1))[level], 0.0)
        seen[-1] += counts[kept:].sum()
        rounded[-1] = max(rounded[-1], 1e-3)  # the last bin has mass in p: KL must stay finite
        p, q = seen / seen.sum(), rounded / rounded.sum()
        divergences.append(float((p[p > 0] * np.log(p[p > 0] / q[p > 0])).sum()))
    return ranges[int(np.argmin(divergences))]


def _ranges(limit: float, dtype: QuantDtype) -> list[float]:
    """Returns the ranges to compare for a largest magnitude.

    FP8's relative error is the same for every magnitude, so clamping gains nothing. A range up to twice as large moves
    its values within the octaves, which makes the most frequent magnitudes more exact.
    """
    first = 1 if dtype.rounds else _SHARES
    return [limit * share / _SHARES for share in range(first, first + _SHARES)]


def weight_amax(weight: Tensor, spec: TensorSpec) -> Tensor:
    """Returns the range of every channel or group of a weight (out, ...), by the spec's calibrator.

    The shape is (out, 1, ...), (out, groups, 1) for a weight in groups, or (1, 1, ...) for one scale per tensor.
    """
    rows = weight.detach().flatten(1)
    rows = rows.unflatten(1, (-1, spec.scale_group)) if spec.scale_group else rows
    if spec.granularity == "tensor":
        rows = rows.reshape(1, -1)
    amax = rows.abs().amax(-1, keepdim=True)
    if spec.calibrator == "mse":
        amax = _weight_mse_amax(rows, amax, spec.dtype)
    return amax if spec.scale_group else amax.reshape(-1, *[1] * (weight.ndim - 1))


def _weight_mse_amax(rows: Tensor, largest: Tensor, dtype: QuantDtype) -> Tensor:
    best, least, top = largest, torch.full_like(largest, float("inf")), largest.max()
    tensor_scale = dtype.tensor_scale(top)
    for share in _weight_shares(dtype):
        amax = largest * share
        scale = dtype.block_scales(amax, tensor_scale) if dtype.block else dtype.scale(amax)
        error = (dtype.quantize(rows, scale).float() * scale - rows).square().sum(-1, keepdim=True)
        best, least = torch.where(error < least, amax, best), torch.minimum(error, least)
    # The largest of all blocks determines the tensor's scale, by which all candidates were measured.
    return torch.where(largest == top, top, best.clamp(max=top)) if dtype.block else best


def _weight_shares(dtype: QuantDtype) -> list[float]:
    """Returns the ranges to compare, as shares of the largest magnitude.

    An integer format can gain by clamping, NVFP4 also by a larger range: its values are close together at 3 and 4, and
    far apart at 6. Another power of two leaves MXFP8's relative error as it is.
    """
    if dtype.block:
        return [1.0] if dtype.power_of_two_scales else torch.arange(0.6, 1.601, 0.05).tolist()
    return (torch.arange(0.4, 1.001, 0.02) if dtype.rounds else torch.arange(1, 2, 0.04)).tolist()
