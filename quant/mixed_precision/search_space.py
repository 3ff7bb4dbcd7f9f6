"""The choices that a precision search has for each layer, and what each costs and loses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader
from tqdm import tqdm

from illama.errors import UserError
from illama.graph.layer_times import GraphTimes, read_layer_times, time_graphs
from illama.models.attention import SoftMasked
from quant.export.onnx_export import export_onnx
from quant.inputs import Inputs, scheme_named
from quant.mixed_precision.costs import weight_bytes
from quant.mixed_precision.layer_effects import Effect, layers_of, measure
from quant.quantizers.calibrate import calibrate
from quant.schemes.formats import TensorSpec
from quant.schemes.scheme import FLOAT, Scheme, resolve, tensor_names

_ALL = "all layers"


@dataclass(frozen=True)
class Choice:
    """One way to keep a layer.

    Attributes:
        scheme: the scheme it is of, or ``float``.
        specs: the layer's quantized tensors; empty for float.
        smooth: SmoothQuant's strength at this layer; None for none.
        kl: what it alone does to the output distribution, in nats.
        bytes: of the layer's weight and scales, and of its quantizers' nodes in the graph.
        ms: of the layer's own nodes.
    """

    scheme: str
    specs: Mapping[str, TensorSpec]
    smooth: float | None
    kl: float
    bytes: int
    ms: float


@dataclass(frozen=True)
class Choices:
    """All choices, and what whole networks of one scheme do.

    Attributes:
        layers: layer -> its choices, float first; schemes that treat a layer alike share one.
        whole: scheme -> effect of quantizing all layers by it, and the sum of the KLs of its layers alone.
        fixed_bytes: of an exported file besides weights and scales: biases, norms, positions, the graph.
        fixed_ms: of a call besides the layers' nodes.
        fit_ms: scheme -> by how many ms a whole network's call differs from fixed_ms and its layers' times.
        rest_ms: scheme -> ms of the nodes that belong to no layer; what it is above float's is spread over the layers.
    """

    layers: Mapping[str, Sequence[Choice]]
    whole: Mapping[str, tuple[Effect, float]]
    fixed_bytes: int
    fixed_ms: float
    fit_ms: Mapping[str, float]
    rest_ms: Mapping[str, float]


def offered_schemes(names: Sequence[str]) -> list[Scheme]:
    """The schemes to choose from, without learned rounding; UserError for an unknown one, none, or two of one name."""
    schemes = [replace(scheme_named(name), learned=0) for name in dict.fromkeys(names) if name != FLOAT]
    if not schemes:
        raise UserError("give --formats at least one scheme: float is always among the choices")
    if len({scheme.name for scheme in schemes}) < len(schemes):
        raise UserError("two of --formats have the same name: change it in the scheme file")
    return schemes


class Study:
    """Calibrates, weighs, exports and times every scheme, and float.

    Args:
        images: what losses are measured over.
        threads: of ONNX Runtime, when it is timed; 0 for one a core.
    """

    def __init__(self, inputs: Inputs, schemes: Sequence[Scheme], images: DataLoader[Any], threads: int = 0) -> None:
        self.inputs, self.images, self.threads = inputs, images, threads
        self.schemes = {FLOAT: Scheme(FLOAT), **{scheme.name: scheme for scheme in schemes}}
        self.plans = {name: resolve(scheme, inputs.model) for name, scheme in self.schemes.items()}
        self.layers = layers_of(tensor_names(inputs.model))
        self.offers = {layer: self._offers(layer) for layer in self.layers}
        self.effects: dict[tuple[str, str], Effect] = {}
        self.whole: dict[str, Effect] = {}

    def run(self, folder: Path, profiles: Mapping[str, Path]) -> Choices:
        """Every choice with its figures.

        Args:
            folder: where the exported files may lie meanwhile.
            profiles: scheme -> TensorRT layer profile, float's among them; ONNX Runtime is timed if there are none.

        Raises:
            UserError: if some scheme has no profile, or a profile does not fit.
        """
        paths: dict[str, Path] = {}
        for name, scheme in self.schemes.items():
            quantized = calibrate(self.inputs.model, scheme, self.inputs.calibration)
            if name != FLOAT:
                self._weigh(name, quantized)
            if self._first_alike(name) == name:
                tqdm.write(f"export {name} ...")
                paths[name] = folder / f"{name}.onnx"
                export_onnx(quantized, paths[name], "plain")
        times = self._times(paths, profiles)
        first = {name: self._first_alike(name) for name in self.schemes}
        sizes = {name: paths[first[name]].stat().st_size for name in first}
        costs = _Costs(self.inputs.model, {name: times[first[name]] for name in first}, sizes, self.plans, self.layers)
        layers = {layer: [self._choice(layer, name, costs) for name in offers] for layer, offers in self.offers.items()}
        sums = {
            name: sum(self._kl(layer, self._same_offer(layer, name)) for layer in self.layers) for name in self.whole
        }
        return Choices(
            layers,
            {name: (effect, sums[name]) for name, effect in self.whole.items()},
            costs.fixed_bytes,
            costs.fixed_ms,
            costs.fit_ms,
            {name: each.rest for name, each in times.items()},
        )

    def _weigh(self, name: str, quantized: SoftMasked) -> None:
        own = {layer: tuple(self._specs(layer, name)) for layer, offers in self.offers.items() if name in offers}
        found = measure(quantized, {**own, _ALL: tuple(self.plans[name])}, tqdm(self.images, desc=f"weigh {name}"))
        self.whole[name] = found.pop(_ALL)
        self.effects.update({(layer, name): effect for layer, effect in found.items()})

    def _times(self, paths: Mapping[str, Path], profiles: Mapping[str, Path]) -> dict[str, GraphTimes]:
        if profiles:
            if missing := paths.keys() - profiles.keys():
                raise UserError(f"--layer-times has none for {min(missing)}: give one for each format and for float")
            return {name: read_layer_times(profiles[name], self.layers) for name in paths}
        return time_graphs(paths, one_image(self.inputs), self.layers, self.threads)

    def _choice(self, layer: str, name: str, costs: _Costs) -> Choice:
        figures = self._kl(layer, name), *costs.of(layer, name)
        return Choice(name, self._specs(layer, name), self._strength(layer, name), *figures)

    def _kl(self, layer: str, name: str) -> float:
        return 0.0 if name == FLOAT else self.effects[layer, name].kl

    def _specs(self, layer: str, name: str) -> dict[str, TensorSpec]:
        return {tensor: self.plans[name][tensor] for tensor in self.layers[layer] if tensor in self.plans[name]}

    def _strength(self, layer: str, name: str) -> float | None:
        smoothed = f"{layer}.weight" in self.layers[layer] and f"{layer}.input" in self.plans[name]
        return self.schemes[name].strength(layer) if smoothed else None

    def _offers(self, layer: str) -> list[str]:
        """The schemes that do something to this layer that none before them does; float is the first."""
        return [name for name in self.schemes if self._same_offer(layer, name) == name]

    def _same_offer(self, layer: str, name: str) -> str:
        wanted = self._specs(layer, name), self._strength(layer, name)
        return next(each for each in self.schemes if (self._specs(layer, each), self._strength(layer, each)) == wanted)

    def _first_alike(self, name: str) -> str:
        """The first scheme whose file has the same operators: ranges and their calibrators change no speed."""
        return next(each for each in self.schemes if self._structure(each) == self._structure(name))

    def _structure(self, name: str) -> dict[str, tuple[Any, ...]]:
        return {
            tensor: (spec.format, spec.granularity, spec.group_size, spec.symmetric)
            for tensor, spec in self.plans[name].items()
        }


def one_image(inputs: Inputs) -> np.ndarray:
    """The image that calls are timed with, (1, C, H, W) float32."""
    return np.ascontiguousarray(inputs.calibration[0][:1].numpy())


class _Costs:
    """Bytes and milliseconds of each choice.

    A scheme's file may spend more time in nodes of no layer than float's does: ONNX Runtime names some of the
    QuantizeLinears that it moves after values. That time is spread evenly over the layers that the scheme quantizes,
    and so are the bytes of its quantizers' nodes over its tensors.
    """

    def __init__(
        self,
        model: SoftMasked,
        times: Mapping[str, GraphTimes],
        sizes: Mapping[str, int],
        plans: Mapping[str, Mapping[str, TensorSpec]],
        layers: Mapping[str, Sequence[str]],
    ) -> None:
        self.model, self.times, self.plans, self.layers = model, times, plans, layers
        self._extra = {}
        for name, each in times.items():
            quantized = sum(any(tensor in plans[name] for tensor in tensors) for tensors in layers.values())
            self._extra[name] = (each.rest - times[FLOAT].rest) / quantized if quantized else 0.0
        sums = {name: sum(self._ms(layer, name) for layer in layers) for name in times}
        # A call takes longer than its nodes: what lies between them is taken as the same for all files.
        self.fixed_ms = float(np.mean([each.call - sums[name] for name, each in times.items()]))
        self.fit_ms = {name: each.call - sums[name] - self.fixed_ms for name, each in times.items()}
        weights = {name: sum(self._weight_bytes(layer, name) for layer in layers) for name in times}
        self.fixed_bytes = sizes[FLOAT] - weights[FLOAT]
        self._node_bytes = {
            name: (sizes[name] - self.fixed_bytes - weights[name]) // max(1, len(plans[name])) for name in times
        }

    def of(self, layer: str, name: str) -> tuple[int, float]:
        """(bytes, ms) of a layer under a scheme."""
        nodes = self._node_bytes[name] * sum(tensor in self.plans[name] for tensor in self.layers[layer])
        return self._weight_bytes(layer, name) + nodes, max(0.0, self._ms(layer, name))

    def _ms(self, layer: str, name: str) -> float:
        touched = any(tensor in self.plans[name] for tensor in self.layers[layer])
        return self.times[name].layers.get(layer, 0.0) + (self._extra[name] if touched else 0.0)

    def _weight_bytes(self, layer: str, name: str) -> int:
        if layer.endswith((".qk", ".pv")):
            return 0  # a product has no weight
        return weight_bytes(self.model.get_submodule(layer), self.plans[name].get(f"{layer}.weight"))


def scheme_of(choices: Choices, chosen: Mapping[str, int], learned: int, summary: str) -> Scheme:
    """The assignment as a scheme, every quantized tensor by its full name."""
    tensors: dict[str, TensorSpec | None] = {}
    smooth: dict[str, float] = {}
    for layer, index in chosen.items():
        choice = choices.layers[layer][index]
        tensors.update(choice.specs)
        smooth.update({layer: choice.smooth} if choice.smooth is not None else {})
    return Scheme("searched", tensors, smooth, learned, summary=summary)
