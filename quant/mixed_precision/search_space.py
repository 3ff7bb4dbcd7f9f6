"""The formats that a mixed-precision search can choose for each layer, with the cost and the effect of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from torch.utils.data import DataLoader

from illama.bundle import size_of
from illama.errors import UserError
from illama.graph.layer_times import GraphTimes
from illama.models.attention import MaskedNetwork
from illama.progress import say, track
from quant.export.onnx_export import export_onnx
from quant.inputs import Inputs, onnx_scheme
from quant.mixed_precision.layer_effects import Effect, layers_of, measure
from quant.quantizers.calibrate import calibrate
from quant.schemes.formats import TensorSpec
from quant.schemes.scheme import FLOAT, QuantizationPlan, Rotations, Scheme, resolve, tensor_names

# Name of a scheme, its quantized network and exported file, to the times of its layers; the first call is of float.
LayerTimer = Callable[[str, MaskedNetwork, Path], GraphTimes]
_ALL = "all layers"


@dataclass(frozen=True)
class FormatChoice:
    """One format for one layer.

    Attributes:
        scheme: name of the scheme that it belongs to, or ``float``.
        specs: the layer's quantized tensors; empty for float.
        smooth: SmoothQuant's migration strength for this layer; None for no smoothing.
        kl: KL divergence of the output distribution, in nats, if only this layer is quantized.
        bytes: size of the layer's weight, scales and quantizer nodes in the exported file.
        ms: milliseconds of the layer, of which only the differences from those of its other choices matter.
    """

    scheme: str
    specs: Mapping[str, TensorSpec]
    smooth: float | None
    kl: float
    bytes: int
    ms: float


@dataclass(frozen=True)
class SearchSpace:
    """All format choices, and the effects of whole networks of one scheme.

    Attributes:
        layers: layer -> its choices, float first; schemes that treat a layer alike share one choice.
        whole: scheme -> effect of quantizing all layers by it, and the sum of its layers' own KL divergences.
        fixed_bytes: size of an exported file besides the layers: biases, norms, positions, the graph.
        fixed_ms: milliseconds of a call besides the layers' nodes.
        fit_ms: scheme -> milliseconds of a whole network's call that fixed_ms and its layers' times do not explain.
        rest_ms: scheme -> milliseconds of nodes that belong to no layer; the excess over float's is spread over the
            layers.
        rotate: what all schemes rotate.
    """

    layers: Mapping[str, Sequence[FormatChoice]]
    whole: Mapping[str, tuple[Effect, float]]
    fixed_bytes: int
    fixed_ms: float
    fit_ms: Mapping[str, float]
    rest_ms: Mapping[str, float]
    rotate: Rotations = field(default_factory=Rotations)


def format_schemes(names: Sequence[str]) -> list[Scheme]:
    """Returns the schemes of ``--formats``, with rounding to nearest, and all rotated as the first one is.

    Rotations are not chosen layer by layer: that of the residual stream is one for the whole network.

    Raises:
        UserError: a scheme is unknown, there is none, or two have one name.
    """
    schemes = [onnx_scheme(name).rounding_to_nearest() for name in dict.fromkeys(names) if name != FLOAT]
    if not schemes:
        raise UserError("--formats names no scheme: give at least one besides float")
    if len({scheme.name for scheme in schemes}) < len(schemes):
        raise UserError("two of --formats have the same name: change it in the scheme file")
    return [replace(scheme, rotate=schemes[0].rotate) for scheme in schemes]


class SearchSpaceBuilder:
    """Calibrates, evaluates, exports and times every scheme, and float.

    Args:
        schemes: at least one, all with the same ``rotate``.
        images: batches for the effects.
    """

    def __init__(self, inputs: Inputs, schemes: Sequence[Scheme], images: DataLoader[Any]) -> None:
        self.inputs, self.images, self.rotate = inputs, images, schemes[0].rotate
        self.schemes = {FLOAT: Scheme(FLOAT), **{scheme.name: scheme for scheme in schemes}}
        self.plans = {name: resolve(scheme, inputs.model) for name, scheme in self.schemes.items()}
        self.layers = layers_of(tensor_names(inputs.model))
        self.distinct = {layer: self._distinct_schemes(layer) for layer in self.layers}
        self.effects: dict[tuple[str, str], Effect] = {}
        self.whole: dict[str, Effect] = {}

    def build(self, folder: Path, time_layers: LayerTimer) -> SearchSpace:
        """Returns every choice with its cost and effect.

        Args:
            folder: folder for the exported files, each with the name of its scheme.
        """
        paths, times = self._export_all(folder, time_layers)
        first = {name: self._first_with_same_operators(name) for name in self.schemes}
        sizes = {name: size_of(paths[first[name]]) for name in first}
        costs = _Costs(self.inputs.model, {name: times[first[name]] for name in first}, sizes, self.plans, self.layers)
        layers = {layer: [self._choice(layer, name, costs) for name in names] for layer, names in self.distinct.items()}
        sums = {name: sum(self._kl(layer, self._same_choice(layer, name)) for layer in layers) for name in self.whole}
        return SearchSpace(
            layers,
            {name: (effect, sums[name]) for name, effect in self.whole.items()},
            costs.fixed_bytes,
            costs.fixed_ms,
            costs.fit_ms,
            {name: each.rest for name, each in times.items()},
            self.rotate,
        )

    def _export_all(self, folder: Path, time_layers: LayerTimer) -> tuple[dict[str, Path], dict[str, GraphTimes]]:
        """Measures every scheme's effects, and exports and times one file for all schemes with the same operators."""
        paths, times = dict[str, Path](), dict[str, GraphTimes]()
        for name, plan in self.plans.items():
            quantized = calibrate(self.inputs.model, plan, self.inputs.calibration, self.inputs.device)
            if name != FLOAT:
                self._measure_effects(name, quantized)
            if self._first_with_same_operators(name) == name:
                say(f"export and time {name} ...")
                paths[name] = folder / f"{name}.onnx"
                export_onnx(quantized, paths[name], "plain")
                times[name] = time_layers(name, quantized, paths[name])
        return paths, times

    def _measure_effects(self, name: str, quantized: MaskedNetwork) -> None:
        own = {layer: tuple(self._specs(layer, name)) for layer, names in self.distinct.items() if name in names}
        subsets = {**own, _ALL: tuple(self.plans[name].tensors)}
        images = track(self.images, f"measure {name}", "batch")
        found = measure(quantized, subsets, images, self.inputs.neighbors)
        self.whole[name] = found.pop(_ALL)
        self.effects.update({(layer, name): effect for layer, effect in found.items()})

    def _choice(self, layer: str, name: str, costs: _Costs) -> FormatChoice:
        specs, strength = self._specs(layer, name), self._strength(layer, name)
        return FormatChoice(name, specs, strength, self._kl(layer, name), *costs.of(layer, name))

    def _kl(self, layer: str, name: str) -> float:
        return 0.0 if name == FLOAT else self.effects[layer, name].kl

    def _specs(self, layer: str, name: str) -> dict[str, TensorSpec]:
        specs = self.plans[name].tensors
        return {tensor: specs[tensor] for tensor in self.layers[layer] if tensor in specs}

    def _strength(self, layer: str, name: str) -> float | None:
        smoothed = f"{layer}.weight" in self.layers[layer] and f"{layer}.input" in self.plans[name].tensors
        return self.schemes[name].strength(layer) if smoothed else None

    def _distinct_schemes(self, layer: str) -> list[str]:
        """Returns the schemes that treat this layer as no scheme before them does, float first."""
        return [name for name in self.schemes if self._same_choice(layer, name) == name]

    def _same_choice(self, layer: str, name: str) -> str:
        """Returns the first scheme that treats this layer as scheme ``name`` does."""
        wanted = self._specs(layer, name), self._strength(layer, name)
        return next(each for each in self.schemes if (self._specs(layer, each), self._strength(layer, each)) == wanted)

    def _first_with_same_operators(self, name: str) -> str:
        """The first scheme whose file has the same operators: ranges and calibrators do not change the speed."""
        return next(each for each in self.schemes if self._operators(each) == self._operators(name))

    def _operators(self, name: str) -> dict[str, tuple[Any, ...]]:
        return {
            tensor: (spec.format, spec.granularity, spec.group_size, spec.symmetric)
            for tensor, spec in self.plans[name].tensors.items()
        }


def weight_bytes(layer: nn.Module, spec: TensorSpec | None) -> int:
    """Returns the bytes of a layer's weight and scales in the exported file; the bias is the same in every format."""
    weight: Any = layer.weight
    if spec is None:
        return 4 * weight.numel()
    packed = spec.dtype.bits == 4 and not spec.dtype.block  # CPUs read NVFP4 as 8-bit integers
    stored = (weight.numel() + 1) // 2 if packed else weight.numel()
    groups = weight.numel() // spec.scale_group if spec.scale_group else len(weight)
    return stored + 4 * groups


class _Costs:
    """Bytes and milliseconds of each choice.

    A profile has times of nodes of no layer, such as copies that the runtime adds. A scheme's excess over float's is
    spread evenly over the layers that the scheme quantizes. The bytes of its quantizer nodes are spread evenly over its
    tensors.
    """

    def __init__(
        self,
        model: MaskedNetwork,
        times: Mapping[str, GraphTimes],
        sizes: Mapping[str, int],
        plans: Mapping[str, QuantizationPlan],
        layers: Mapping[str, Sequence[str]],
    ) -> None:
        self.model, self.times, self.plans, self.layers = model, times, plans, layers
        self._extra = {}
        for name, each in times.items():
            quantized = sum(any(tensor in plans[name].tensors for tensor in tensors) for tensors in layers.values())
            self._extra[name] = (each.rest - times[FLOAT].rest) / quantized if quantized else 0.0
        # The knapsack problem has no negative costs.
        self._least = {layer: min(self._own_ms(layer, name) for name in times) for layer in layers}
        sums = {name: sum(self._ms(layer, name) for layer in layers) for name in times}
        # A call takes longer than its nodes. The difference is assumed to be the same for all files.
        self.fixed_ms = float(np.mean([each.call - sums[name] for name, each in times.items()]))
        self.fit_ms = {name: each.call - sums[name] - self.fixed_ms for name, each in times.items()}
        weights = {name: sum(self._weight_bytes(layer, name) for layer in layers) for name in times}
        self.fixed_bytes = sizes[FLOAT] - weights[FLOAT]
        self._node_bytes = {
            name: (sizes[name] - self.fixed_bytes - weights[name]) // max(1, len(plans[name].tensors)) for name in times
        }

    def of(self, layer: str, name: str) -> tuple[int, float]:
        """Returns (bytes, ms) of a layer under a scheme."""
        nodes = self._node_bytes[name] * sum(tensor in self.plans[name].tensors for tensor in self.layers[layer])
        return self._weight_bytes(layer, name) + nodes, self._ms(layer, name)

    def _ms(self, layer: str, name: str) -> float:
        return self._own_ms(layer, name) - min(0.0, self._least[layer])

    def _own_ms(self, layer: str, name: str) -> float:
        quantized = any(tensor in self.plans[name].tensors for tensor in self.layers[layer])
        return self.times[name].layers.get(layer, 0.0) + (self._extra[name] if quantized else 0.0)

    def _weight_bytes(self, layer: str, name: str) -> int:
        if layer.endswith((".qk", ".pv")):
            return 0  # a product has no weight
        return weight_bytes(self.model.get_submodule(layer), self.plans[name].tensors.get(f"{layer}.weight"))


def assignment_scheme(space: SearchSpace, chosen: Mapping[str, int], iterations: int, summary: str) -> Scheme:
    """Returns an assignment, layer -> index of its choice, as a scheme with every quantized tensor by its full name.

    Its weights are rounded by GPTQ, which the effects of single layers do not include.
    """
    tensors: dict[str, TensorSpec | None] = {}
    smooth: dict[str, float] = {}
    for layer, index in chosen.items():
        choice = space.layers[layer][index]
        tensors.update(choice.specs)
        smooth.update({layer: choice.smooth} if choice.smooth is not None else {})
    return Scheme(
        "searched", tensors, smooth, space.rotate, gptq=True, reconstruction_iterations=iterations, summary=summary
    )
