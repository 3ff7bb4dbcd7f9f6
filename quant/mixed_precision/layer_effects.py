"""What each layer's quantization costs: the logits' noise, the change of the output distribution, images lost.

A layer is a Linear or the patch convolution with its weight and its input, or one product of an attention with both
of its operands: ``blocks.0.attn.core.qk`` of q and k, ``blocks.0.attn.core.pv`` of p and v.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from illama.errors import UserError
from illama.graph.layer_times import PRODUCTS
from illama.models.attention import SoftMasked
from quant.quantizers.layers import WeightQuantizer, quantizers
from quant.quantizers.reconstruction import blocks


def layer_of(tensor: str) -> str:
    """The layer that a tensor belongs to: ``blocks.0.attn.qkv.weight`` -> ``blocks.0.attn.qkv``."""
    layer, _, part = tensor.rpartition(".")
    return f"{layer}.{PRODUCTS[part]}" if part in PRODUCTS else layer


def layers_of(tensors: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Layer -> its tensors, in the order of the names given."""
    layers: dict[str, tuple[str, ...]] = {}
    for tensor in tensors:
        layers[layer_of(tensor)] = (*layers.get(layer_of(tensor), ()), tensor)
    return layers


@dataclass(frozen=True)
class Effect:
    """What some quantized tensors do to a network's logits.

    Attributes:
        sqnr_db: power of the float logits over that of the change, in dB; infinite for no change.
        kl: Kullback-Leibler divergence of the output distribution from the float network's, mean, in nats.
        lost, gained: how many images only the float network has right, and only the other.
        images: how many there were.
        right: how many of them the float network has right.
    """

    sqnr_db: float
    kl: float
    lost: int
    gained: int
    images: int
    right: int = 0

    @property
    def drop(self) -> float:
        """Points of top-1 lost; negative: gained."""
        return (self.lost - self.gained) / self.images * 100

    @property
    def drop_at_most(self) -> float:
        """What the drop does not exceed with 95% confidence: one-sided, of a normal distribution."""
        return self.drop + 1.645 * self.drop_error

    @property
    def drop_error(self) -> float:
        """Standard error of :attr:`drop`, of a paired comparison; one image is the least that can be told."""
        return math.sqrt(max(self.lost + self.gained, 1)) / self.images * 100


class Tally:
    """Adds up an :class:`Effect` batch by batch."""

    def __init__(self) -> None:
        self._signal = self._noise = self._kl = 0.0
        self._lost = self._gained = self._images = self._right = 0

    def add(self, reference: Tensor, other: Tensor, labels: Tensor) -> None:
        """Take in logits (n, classes) of the float network and of the other, and labels (n,)."""
        exact, noisy = reference.double(), other.double()
        self._signal += float(exact.square().sum())
        self._noise += float((noisy - exact).square().sum())
        log_p, log_q = exact.log_softmax(1), noisy.log_softmax(1)
        self._kl += float((log_p.exp() * (log_p - log_q)).sum())
        right, right_too = exact.argmax(1) == labels, noisy.argmax(1) == labels
        self._lost += int((right & ~right_too).sum())
        self._gained += int((right_too & ~right).sum())
        self._images += len(labels)
        self._right += int(right.sum())

    def effect(self) -> Effect:
        """The effect over all batches; UserError if one of the networks gave NaN or infinity."""
        if not math.isfinite(self._kl):
            raise UserError("a quantized network gives NaN or infinite logits: its ranges do not fit its values")
        return Effect(
            decibels(self._signal, self._noise),
            max(0.0, self._kl / self._images),
            self._lost,
            self._gained,
            self._images,
            self._right,
        )


def decibels(signal: float, noise: float) -> float:
    """Ratio of two powers in dB; infinite without noise, minus infinity for noise without a signal."""
    if not noise:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


@torch.inference_mode()
def measure(
    model: SoftMasked, choices: Mapping[str, Collection[str]], batches: Iterable[tuple[Tensor, Tensor]]
) -> dict[str, Effect]:
    """The effect of each choice of quantized tensors, all others being left in floating point.

    The network is run once per batch without quantizers, and for each choice from the first block that it touches.
    Every quantizer is switched on again at the end.

    Args:
        model: calibrated by a scheme without block reconstruction, which would have changed the weights for good.
        choices: name -> tensors to quantize, as :func:`quant.quantizers.layers.quantizers` names them.
        batches: images (B, C, H, W) and labels (B,); gone through once.
    """
    acting = dict(quantizers(model))
    starts = {name: _first_block(model, tensors) for name, tensors in choices.items()}
    tallies = {name: Tally() for name in choices}
    try:
        for images, labels in batches:
            _enable(acting, ())
            reference, outputs = _run_noting_blocks(model, images)
            for name, tensors in choices.items():
                _enable(acting, tensors)
                with _resumed(model, outputs[: starts[name]]):
                    tallies[name].add(reference, model(images), labels)
    finally:
        _enable(acting, acting)
    return {name: tally.effect() for name, tally in tallies.items()}


@torch.inference_mode()
def compare_logits(reference: nn.Module, other: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Effect:
    """The effect of going from one network to another, over images (B, C, H, W) and labels (B,)."""
    tally = Tally()
    for images, labels in batches:
        tally.add(reference(images), other(images), labels)
    return tally.effect()


def _enable(acting: Mapping[str, Any], tensors: Collection[str]) -> None:
    for name, quantizer in acting.items():
        quantizer.enabled = name in tensors


def _first_block(model: nn.Module, tensors: Collection[str]) -> int:
    """How many blocks come before the first of ``tensors``."""
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


class _Given(nn.Module):
    """Stands in for a block and returns what the block gave before."""

    def __init__(self, output: Tensor | None) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        return x if self.output is None else self.output


@contextmanager
def _resumed(model: nn.Module, outputs: list[Tensor]) -> Iterator[None]:
    """The first ``len(outputs)`` blocks do nothing, and the last of them gives its output."""
    replaced = blocks(model)[: len(outputs)]
    try:
        for index, (name, _) in enumerate(replaced):
            model.set_submodule(name, _Given(outputs[-1] if index == len(outputs) - 1 else None))
        yield
    finally:
        for name, block in replaced:
            model.set_submodule(name, block)


@torch.inference_mode()
def tensor_sqnr(reference: SoftMasked, quantized: SoftMasked, images: Tensor) -> dict[str, float]:
    """How hard each tensor is to round: its power over that of its own rounding noise, in dB.

    No error is carried from one layer to the next: every quantizer gets the float network's values.

    Args:
        reference: the network in floating point, rescaled where the scheme smooths
            (:meth:`quant.inputs.Inputs.float_model`).
        images: (B, C, H, W).
    """
    acting = dict(quantizers(quantized))
    reference = copy.deepcopy(reference)
    reference.set_attention_form("plain")  # the fused form has no softmax output to look at
    powers: dict[str, tuple[float, float]] = {}

    def note(name: str, x: Tensor) -> None:
        noise = float((acting[name](x) - x).double().square().sum())
        before = powers.get(name, (0.0, 0.0))
        powers[name] = before[0] + float(x.double().square().sum()), before[1] + noise

    def hook(name: str) -> Any:
        return lambda _, inputs: note(name, inputs[0])

    with ExitStack() as hooks:
        for name, quantizer in acting.items():
            if isinstance(quantizer, WeightQuantizer):
                note(name, reference.get_parameter(name))
            else:
                module = reference.get_submodule(name.removesuffix(".input"))
                hooks.callback(module.register_forward_pre_hook(hook(name)).remove)
        reference(images)
    return {name: decibels(*powers[name]) for name in acting}


def block_number(layer: str) -> int | None:
    """The block that a layer stands in; None for those outside of all."""
    found = re.search(r"(?:^|\.)blocks\.(\d+)\.", layer)
    return int(found[1]) if found else None


def kind_of(layer: str) -> str:
    """What sort of layer it is, in a word: ``qkv``, ``qk``, ``pv``, ``proj``, ``fc1`` ..., ``patches`` or ``head``."""
    if "patch_embed" in layer:
        return "patches"
    return layer.rpartition(".")[2]
