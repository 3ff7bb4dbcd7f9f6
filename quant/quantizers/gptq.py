"""GPTQ: rounds the weights of a layer so that their errors cancel in its output (arXiv 2210.17323).

Rounding to nearest has the smallest error of each weight; the output has the error of a whole row at once. With
correlated inputs, one weight can make up for the error of another. GPTQ rounds one input channel after another, and
each time adds to the channels left what reduces the expected squared error of the output most, which the covariance of
the inputs tells. It needs no iterations, and fits any grid of values: integers, groups with scales of their own, and
FP8, whose steps grow with the value.

A small network needs one pass over the calibration images. The covariances of all layers of a large one would take as
much memory as its weights, so its transformer blocks are run and rounded one after another.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from illama.models.hooks import input_hooks
from illama.progress import track
from quant.quantizers.blocks import block_inputs, blocks
from quant.quantizers.layers import QuantizedConv2d, QuantizedLayer, QuantizedLinear, WeightQuantizer, split_groups

_DAMPING = 0.01  # of the covariance's mean diagonal, added to it: the authors' value
_COLUMNS = 32  # input channels that are rounded before the others are updated, which is faster than one by one
_ENTRIES = 1 << 26  # of the covariances of a portion of layers, 0.5 GB; one of 8,192 inputs
_VECTORS = 1 << 15  # inputs of a layer; more hardly change its covariance


class _InputMoments:
    """Sums over input vectors of a layer, less ``origin``, in float64.

    Without a near origin, the covariance of inputs that hardly vary would be lost in the rounding of their squares.

    Attributes:
        exact, rounded: sums of the vectors, and of the vectors as the layer rounds them, (width,).
        products: sums of the products of rounded channels, (width, width).
    """

    def __init__(self, origin: Tensor) -> None:
        self.origin, self.count = origin.double(), 0
        self.exact, self.rounded = torch.zeros_like(self.origin), torch.zeros_like(self.origin)
        self.products = torch.zeros(len(origin), len(origin), dtype=torch.float64, device=origin.device)

    def add(self, x: Tensor, z: Tensor) -> None:
        """Adds vectors, (count, width): x, and z as the layer rounds them."""
        origin = self.origin.to(x.dtype)
        x, z = x - origin, z - origin
        self.count += len(x)
        self.exact += x.sum(0)
        self.rounded += z.sum(0)
        self.products += z.T @ z

    def means(self) -> tuple[Tensor, Tensor]:
        """Returns the mean of the exact and of the rounded vectors."""
        return self.origin + self.exact / self.count, self.origin + self.rounded / self.count

    def covariance(self) -> Tensor:
        """Returns the covariance of the rounded vectors."""
        mean = self.rounded / self.count
        return self.products / self.count - torch.outer(mean, mean)


@torch.no_grad()
def round_weights(
    reference: nn.Module, quantized: nn.Module, batches: Sequence[Tensor], in_place: bool = False
) -> None:
    """Rounds the quantized weights of ``quantized`` by GPTQ, and corrects the bias for the errors that are left.

    A layer without a bias gets none. Grouped convolutions and layers of more than 8,192 inputs, such as wide
    convolutions of 3 x 3, are rounded to nearest.

    Args:
        reference: the floating-point network, whose inputs of the layers are used.
        quantized: a copy of it from :func:`quant.quantizers.calibrate.quantize_layers`. Its layers get weights that
            rounding to nearest leaves as they are.
        batches: images (B, C, H, W).
        in_place: round the blocks of a large network in the weights that both networks share, which saves a copy of
            them. ``reference`` is then of no use.
    """
    layers = _layers(quantized)
    by_block = {} if _fit_together(layers) else _by_block(reference, layers)
    outside = {name: layer for name, layer in layers.items() if not any(name in each for each in by_block.values())}
    for number, portion in enumerate(_portions(outside)):
        with _observed(reference, portion, sum(map(len, batches))) as moments:
            for batch in track(batches, "GPTQ" + (f", part {number + 1}" if number else ""), "batch"):
                reference(batch)
        _round_layers(portion, moments)
    if by_block:
        _round_blocks(reference, by_block, batches, in_place)


def _layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLayer) and module.weight_quantizer is not None
        if module.weight[0].numel() ** 2 <= _ENTRIES
        if isinstance(module, QuantizedLinear) or (module.groups == 1 and not isinstance(module.padding, str))
    }


def _fit_together(layers: Mapping[str, QuantizedLayer]) -> bool:
    return sum(layer.weight[0].numel() ** 2 for layer in layers.values()) <= _ENTRIES


def _by_block(model: nn.Module, layers: Mapping[str, QuantizedLayer]) -> dict[str, dict[str, QuantizedLayer]]:
    """Returns the layers in each transformer block, by its name."""
    return {
        block: {name: layer for name, layer in layers.items() if name.startswith(f"{block}.")}
        for block, _ in blocks(model)
    }


def _round_blocks(
    reference: nn.Module, layers: Mapping[str, Mapping[str, QuantizedLayer]], batches: Sequence[Tensor], in_place: bool
) -> None:
    """Runs and rounds one transformer block after another, with images of about _VECTORS tokens in all."""
    tokens = block_inputs(reference, [batches[0][:1]])[0][0].shape[1]
    step = max(1, sum(map(len, batches)) * tokens // _VECTORS)
    inputs, calls = block_inputs(reference, _every(batches, step))
    for (name, block), call in track(list(zip(blocks(reference), calls, strict=True)), "GPTQ by blocks", "block"):
        with _observed(reference, layers[name], sum(map(len, inputs))) as moments:
            inputs = [call(block, each) for each in inputs]
        _round_layers(layers[name], moments, in_place)


def _every(batches: Sequence[Tensor], step: int) -> list[Tensor]:
    """Returns every ``step``-th image, counted over all batches; batches without one are left out."""
    found, place = [], 0
    for batch in batches:
        found.append(batch[-place % step :: step])
        place += len(batch)
    return [some for some in found if len(some)]


def _portions(layers: Mapping[str, QuantizedLayer]) -> Iterator[dict[str, QuantizedLayer]]:
    """Yields the layers in portions whose covariances fit in memory together."""
    portion: dict[str, QuantizedLayer] = {}
    entries = 0
    for name, layer in layers.items():
        size = layer.weight[0].numel() ** 2
        if entries + size > _ENTRIES:
            yield portion
            portion, entries = {}, 0
        portion[name] = layer
        entries += size
    if portion:
        yield portion


@contextmanager
def _observed(
    reference: nn.Module, layers: Mapping[str, QuantizedLayer], images: int
) -> Iterator[dict[str, _InputMoments]]:
    """Inside the block, collects the inputs of ``layers`` whenever ``reference`` runs, for ``images`` in all."""
    moments: dict[str, _InputMoments] = {}

    def add(name: str, inputs: Any) -> None:
        layer = layers[name]
        step = max(1, images * _positions(layer, inputs[0]) // _VECTORS)
        some = inputs[0][::step]  # of the images, and of an image's vectors if one is still too many
        pair = (_vectors(layer, each) for each in (some, layer.rounded_input(some)))
        x, z = (vectors[:: max(1, step // len(inputs[0]))] for vectors in pair)
        moments.setdefault(name, _InputMoments(z.mean(0))).add(x, z)

    with input_hooks(reference, layers, add):
        yield moments


def _round_layers(
    layers: Mapping[str, QuantizedLayer], moments: dict[str, _InputMoments], in_place: bool = False
) -> None:
    for name, layer in layers.items():
        if name in moments:  # a layer that no image reaches keeps its weights
            _round_layer(layer, moments.pop(name), in_place)


def _positions(layer: QuantizedLayer, x: Tensor) -> int:
    """Returns the number of input vectors of an image, for convolutions without their border."""
    if isinstance(layer, QuantizedConv2d):
        return x[0, 0].numel() // math.prod(layer.stride)
    return x[0].numel() // x.shape[-1]


def _vectors(layer: QuantizedLayer, x: Tensor) -> Tensor:
    """Returns what each row of the flattened weight is multiplied by, (vectors, width)."""
    if isinstance(layer, QuantizedConv2d):
        size: Any = layer.weight.shape[2:]
        return F.unfold(x, size, layer.dilation, layer.padding, layer.stride).mT.flatten(0, 1)  # type: ignore[arg-type]
    return x.flatten(0, -2)


def _round_layer(layer: QuantizedLayer, inputs: _InputMoments, in_place: bool) -> None:
    quantizer: Any = layer.weight_quantizer
    (exact, rounded), moments = inputs.means(), inputs.covariance()
    if layer.bias is None:  # else it takes the mean of the error, and the weights have the rest to reduce
        moments += torch.outer(rounded, rounded)
    weight = gptq(layer.weight, quantizer, moments)
    if layer.bias is not None:
        error = layer.weight.double().flatten(1) @ exact - weight.double().flatten(1) @ rounded
        layer.bias = nn.Parameter((layer.bias + error).to(layer.bias.dtype))
    if in_place:
        layer.weight.copy_(weight)
    else:
        layer.weight = nn.Parameter(weight)


def gptq(weight: Tensor, quantizer: WeightQuantizer, moments: Tensor) -> Tensor:
    """Returns a weight (out, ...) whose values are on the grid of ``quantizer``.

    Args:
        moments: mean products of input channels, or their covariances, (width, width) in float64, where width is the
            number of weights of an output channel.
    """
    order = moments.diagonal().argsort(descending=True, stable=True)  # the largest first, while many can make up for it
    width, damping = len(order), _DAMPING * moments.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    damped = moments[order][:, order] + damping * torch.eye(width, dtype=moments.dtype, device=moments.device)
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    left = weight.flatten(1).double().T[order]  # (width, out): a channel is contiguous
    scales = quantizer.scale.expand_as(split_groups(weight, quantizer.spec)).reshape(len(weight), -1).T[order]
    result = torch.empty_like(left)
    for start in range(0, width, _COLUMNS):
        end = min(start + _COLUMNS, width)
        errors = torch.empty_like(left[start:end])
        for channel, error in zip(range(start, end), errors, strict=True):
            scale = scales[channel]
            result[channel] = quantizer.dtype.quantize(left[channel].to(scale.dtype), scale).double() * scale
            error.copy_(left[channel] - result[channel]).div_(factor[channel, channel])
            left[channel:end].addr_(factor[channel, channel:end], error, alpha=-1)
        left[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    return result[order.argsort()].T.to(weight.dtype).reshape(weight.shape).contiguous()
