"""The effect of quantizing each layer: SQNR of the output, KL divergence of the output distribution, accuracy drop.

The distribution of a network whose output is features is over the calibration images, by similarity, and its accuracy
is that of their nearest neighbors.

A layer is a Linear or the patch convolution with its weight and its input, or one product of attention with both
operands: ``blocks.0.attn.core.qk`` with q and k, ``blocks.0.attn.core.pv`` with p and v.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from illama.errors import UserError
from illama.graph.layer_times import PRODUCTS
from illama.models.attention import MaskedNetwork
from illama.models.hooks import input_hooks
from illama.nearest_neighbors import NearestNeighbors
from illama.progress import track
from quant.quantizers.blocks import blocks
from quant.quantizers.layers import quantizers


def layer_of(tensor: str) -> str:
    """Returns the layer of a tensor: ``blocks.0.attn.qkv.weight`` -> ``blocks.0.attn.qkv``."""
    layer, _, part = tensor.rpartition(".")
    return f"{layer}.{PRODUCTS[part]}" if part in PRODUCTS else layer


def layers_of(tensors: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Returns layer -> its tensors, in the given order."""
    layers: dict[str, tuple[str, ...]] = {}
    for tensor in tensors:
        layers[layer_of(tensor)] = (*layers.get(layer_of(tensor), ()), tensor)
    return layers


@dataclass(frozen=True)
class Effect:
    """The effect of quantized tensors on a network's output, logits or features.

    Attributes:
        sqnr_db: power of the float output over that of the change, in dB; infinite for no change.
        kl: mean Kullback-Leibler divergence of the output distribution from the float network's, in nats.
        lost, gained: number of images that only the float network classifies correctly, and only the other network.
        images: number of all images.
        right: number of images that the float network classifies correctly.
    """

    sqnr_db: float
    kl: float
    lost: int
    gained: int
    images: int
    right: int = 0

    @property
    def drop(self) -> float:
        """Accuracy drop in points of top-1; negative for a gain."""
        return (self.lost - self.gained) / self.images * 100

    @property
    def drop_at_most(self) -> float:
        """Upper end of the one-sided 95% confidence interval of :attr:`drop`, from a normal distribution."""
        return self.drop + 1.645 * self.drop_error

    @property
    def drop_error(self) -> float:
        """Standard error of :attr:`drop` in a paired comparison; at least that of one differing image."""
        return math.sqrt(max(self.lost + self.gained, 1)) / self.images * 100


class Tally:
    """Accumulates an :class:`Effect` over batches.

    Args:
        neighbors: classifies the outputs if they are features. The distribution is then that over its images.
    """

    def __init__(self, neighbors: NearestNeighbors | None = None) -> None:
        self._neighbors = neighbors
        self._sums = np.zeros(7)

    def add(self, reference: Tensor, other: Tensor, labels: Tensor) -> None:
        """Adds outputs (n, ...) of the float network and of the other network, and labels (n,)."""
        exact, noisy = reference.double(), other.double()
        scores = logits = [exact, noisy]
        if self._neighbors is not None:
            features = exact.numpy(), noisy.numpy()
            scores = [torch.from_numpy(self._neighbors.similarities(each)) for each in features]
            logits = [torch.from_numpy(self._neighbors.logits(each)) for each in features]
        log_p, log_q = (each.log_softmax(1) for each in scores)
        kl, noise = log_p.exp() * (log_p - log_q), (noisy - exact).square()
        right, right_too = (each.argmax(1) == labels for each in logits)
        parts = (exact.square(), noise, kl, right & ~right_too, right_too & ~right, torch.ones_like(labels), right)
        self._sums += [float(part.sum()) for part in parts]

    def effect(self) -> Effect:
        """Returns the effect over all batches; UserError if a network gave NaN or infinity."""
        signal, noise, kl, *counts = self._sums.tolist()
        if not math.isfinite(kl):
            raise UserError("NaN or infinite output of a quantized network: check the checkpoint and the scheme")
        lost, gained, images, right = map(int, counts)
        return Effect(decibels(signal, noise), max(0.0, kl / images), lost, gained, images, right)


def decibels(signal: float, noise: float) -> float:
    """Returns the ratio of two powers in dB; infinity without noise, minus infinity for noise without a signal."""
    if not noise:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


@torch.inference_mode()
def measure(
    model: MaskedNetwork,
    subsets: Mapping[str, Collection[str]],
    batches: Iterable[tuple[Tensor, Tensor]],
    neighbors: NearestNeighbors | None = None,
) -> dict[str, Effect]:
    """Returns the effect of each subset of quantized tensors, with all others in floating point.

    For each batch, the network is run once without quantizers, and once for each subset from the first block with one
    of its tensors. Every quantizer is enabled again at the end.

    Args:
        model: calibrated by a scheme without block reconstruction, which changes the weights.
        subsets: name -> tensors to quantize, with the names of :func:`quant.quantizers.layers.quantizers`.
        batches: images (B, C, H, W) and labels (B,); iterated once.
        neighbors: see :class:`Tally`.
    """
    acting = dict(quantizers(model))
    starts = {name: _first_block(model, tensors) for name, tensors in subsets.items()}
    tallies = {name: Tally(neighbors) for name in subsets}
    try:
        for images, labels in batches:
            _enable(acting, ())
            reference, outputs = _run_noting_blocks(model, images)
            for name, tensors in subsets.items():
                _enable(acting, tensors)
                with _resumed(model, outputs[: starts[name]]):
                    tallies[name].add(reference, model(images), labels)
    finally:
        _enable(acting, acting)
    return {name: tally.effect() for name, tally in tallies.items()}


@torch.inference_mode()
def compare_outputs(
    reference: nn.Module,
    other: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    neighbors: NearestNeighbors | None = None,
) -> Effect:
    """Returns the effect of ``other`` against ``reference`` over images (B, C, H, W) and labels (B,)."""
    tally = Tally(neighbors)
    for images, labels in track(batches, "compare the outputs", "batch"):
        tally.add(reference(images), other(images), labels)
    return tally.effect()


def _enable(acting: Mapping[str, Any], tensors: Collection[str]) -> None:
    for name, quantizer in acting.items():
        quantizer.enabled = name in tensors


def _first_block(model: nn.Module, tensors: Collection[str]) -> int:
    """Returns the number of blocks before the first of ``tensors``."""
    order = [name for name, _ in model.named_modules()]
    names = [name for name, _ in blocks(model)]
    first = len(names)
    for tensor in tensors:
        layer = tensor.removesuffix(".weight").removesuffix(".input")
        within = [index for index, name in enumerate(names) if layer.startswith(f"{name}.")]
        before = order.index(layer) < order.index(names[0])
        first = min([first, *within, *([0] if before else [])])
    return first


def _run_noting_blocks(model: nn.Module, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    outputs: list[Tensor] = []
    with ExitStack() as hooks:
        for _, block in blocks(model):
            hooks.callback(block.register_forward_hook(lambda _, __, y: outputs.append(y)).remove)
        return model(images), outputs


class _StoredOutput(nn.Module):
    """Replaces a block, and returns the block's stored output, or its input if there is none."""

    def __init__(self, output: Tensor | None) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        return x if self.output is None else self.output


@contextmanager
def _resumed(model: nn.Module, outputs: list[Tensor]) -> Iterator[None]:
    """Replaces the first ``len(outputs)`` blocks inside the block: the last of them returns its stored output."""
    replaced = blocks(model)[: len(outputs)]
    try:
        for index, (name, _) in enumerate(replaced):
            model.set_submodule(name, _StoredOutput(outputs[-1] if index == len(outputs) - 1 else None))
        yield
    finally:
        for name, block in replaced:
            model.set_submodule(name, block)


@torch.inference_mode()
def tensor_sqnr(reference: MaskedNetwork, quantized: MaskedNetwork, images: Tensor) -> dict[str, float]:
    """Returns the SQNR of each tensor, its power over that of its own rounding noise, in dB.

    Errors do not propagate from one layer to the next: every quantizer gets the float network's values.

    Args:
        reference: the float network, rescaled where the scheme smooths (:meth:`quant.inputs.Inputs.float_model`).
        images: (B, C, H, W).
    """
    acting = dict(quantizers(quantized))
    reference = copy.deepcopy(reference)
    reference.set_attention_form("plain")  # the fused form has no softmax output
    powers: dict[str, tuple[float, float]] = {}

    def note(name: str, x: Tensor) -> None:
        noise = float((acting[name](x) - x).double().square().sum())
        before = powers.get(name, (0.0, 0.0))
        powers[name] = before[0] + float(x.double().square().sum()), before[1] + noise

    points = {name.removesuffix(".input"): name for name in acting if not name.endswith(".weight")}
    for name in acting.keys() - set(points.values()):
        note(name, reference.get_parameter(name))
    with input_hooks(reference, points, lambda point, inputs: note(points[point], inputs[0])):
        reference(images)
    return {name: decibels(*powers[name]) for name in acting}


def block_number(layer: str) -> int | None:
    """Returns the number of a layer's block; None if it is outside all blocks."""
    found = re.search(r"(?:^|\.)blocks\.(\d+)\.", layer)
    return int(found[1]) if found else None


def kind_of(layer: str) -> str:
    """Returns the kind of a layer: ``qkv``, ``qk``, ``pv``, ``proj``, ``fc1`` ..., ``patches`` or ``head``."""
    if "patch_embed" in layer:
        return "patches"
    return layer.rpartition(".")[2]
