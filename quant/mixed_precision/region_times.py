"""Time that the Q/DQ of a region save, from the times of whole files: one with them, and one without.

A region is all layers of one kind, such as every ``qkv``; layers that read the same input, as fc1 and fc3 of a SwiGLU
do, are one region, because one pass quantizes the input for both. The time of a single node says little about its cost
to the whole: runtimes fuse it with its neighbors, and copy values between those that they cannot fuse.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from illama.graph.layer_times import PRODUCTS, GraphTimes
from illama.models.attention import MaskedNetwork
from illama.models.hooks import input_hooks
from illama.progress import say, track
from quant.export.onnx_export import export_onnx
from quant.mixed_precision.layer_effects import kind_of
from quant.quantizers.layers import copy_sharing_weights, quantizers
from quant.schemes.scheme import FLOAT

# Name -> file, to name -> milliseconds of a call. The files take turns, so that other load affects all of them.
FileTimer = Callable[[Mapping[str, Path]], Mapping[str, float]]
_NOISE = 0.01  # share of a call; a smaller difference between two files is taken for none
_PASSES = 3  # over all pairs of files; medians of them are not those of a moment with other load


def find_regions(model: MaskedNetwork, layers: Collection[str], images: Tensor) -> dict[str, tuple[str, ...]]:
    """Returns region -> its layers, such as ``fc1/fc3`` -> those two of every block.

    Args:
        layers: names as :func:`quant.mixed_precision.layer_effects.layers_of` gives them.
        images: (B, C, H, W), with which the network is run once.
    """
    readers: dict[int, list[str]] = defaultdict(list)
    seen: list[Tensor] = []  # keeps the inputs, so that no two of them have one id

    def note(layer: str, inputs: Any) -> None:
        seen.append(inputs[0])
        readers[id(inputs[0])].append(layer)

    modules = [layer for layer in layers if kind_of(layer) not in ("qk", "pv")]
    with torch.inference_mode(), input_hooks(model, modules, note):
        model(images)
    shared = {layer: "/".join(dict.fromkeys(map(kind_of, group))) for group in readers.values() for layer in group}
    regions: dict[str, tuple[str, ...]] = {}
    for layer in layers:
        name = shared.get(layer, kind_of(layer))
        regions[name] = (*regions.get(name, ()), layer)
    return regions


@dataclass
class RegionTimes:
    """Times the layers of every scheme by regions; float is timed first.

    Args:
        timer: times files.
        layers: layer -> its tensors.
        regions: region -> its layers.
        folder: for temporary exported files.

    Attributes:
        saved: scheme -> region -> milliseconds that its Q/DQ save, negative where they cost more; 0 within the noise.
    """

    timer: FileTimer
    layers: Mapping[str, Collection[str]]
    regions: Mapping[str, Collection[str]]
    folder: Path
    saved: dict[str, dict[str, float]] = field(default_factory=dict)
    _float: tuple[Path, float] | None = None

    def __call__(self, name: str, quantized: MaskedNetwork, path: Path) -> GraphTimes:
        """Returns the times of a scheme's layers, relative to those in float, which count as zero.

        Args:
            name: of the scheme.
            path: the scheme's exported file.
        """
        if self._float is None:
            assert name == FLOAT
            self._float = path, self.timer({FLOAT: path})[FLOAT]
            return GraphTimes(self._float[1])
        times = GraphTimes(self._float[1] * self.compare(path)[1])
        rounded = {layer: acting for layer, acting in self._acting(quantized).items() if acting}
        chosen = {region: [each for each in layers if each in rounded] for region, layers in self.regions.items()}
        files: dict[str, Path] = {}
        for region, layers in chosen.items():
            if layers:
                files[region] = self.folder / f"without-{len(files)}.onnx"
                tensors = [tensor for layer in layers for tensor in rounded[layer]]
                export_onnx(leave_float(quantized, tensors), files[region], "plain")
        self.saved[name] = {region: times.call * share for region, share in self._shares(path, files).items()}
        for region, saved in self.saved[name].items():
            for layer in chosen[region]:
                times.add(layer, -saved / len(chosen[region]))
        say("  " + ", ".join(f"{region} {-saved:+.3f} ms" for region, saved in self.saved[name].items()))
        return times

    def compare(self, path: Path) -> tuple[float, float]:
        """Returns the milliseconds of a file's call, and those divided by the float file's."""
        assert self._float is not None
        passes = [self.timer({FLOAT: self._float[0], "file": path}) for _ in range(_PASSES)]
        return median(each["file"] for each in passes), median(each["file"] / each[FLOAT] for each in passes)

    def _acting(self, quantized: MaskedNetwork) -> dict[str, list[str]]:
        acting = {tensor for tensor, _ in quantizers(quantized)}
        return {layer: [each for each in tensors if each in acting] for layer, tensors in self.layers.items()}

    def _shares(self, path: Path, files: Mapping[str, Path]) -> dict[str, float]:
        """Returns region -> what its Q/DQ save as a share of a call, given the files without them."""
        shares: dict[str, list[float]] = {region: [] for region in files}
        pairs = [pair for _ in range(_PASSES) for pair in files.items()]
        for region, without in track(pairs, "time regions", "pair"):
            found = self.timer({"with": path, "without": without})
            shares[region].append(found["without"] / found["with"] - 1)
        medians = {region: median(values) for region, values in shares.items()}
        return {region: share if abs(share) >= _NOISE else 0.0 for region, share in medians.items()}


def leave_float(model: MaskedNetwork, tensors: Collection[str]) -> MaskedNetwork:
    """Returns a copy of a quantized network in which some tensors stay in floating point; the weights are shared."""
    model = copy_sharing_weights(model)
    for tensor in tensors:
        name, _, part = tensor.rpartition(".")
        layer = model.get_submodule(name)
        if part in PRODUCTS:
            setattr(layer, part, nn.Identity())
        else:
            setattr(layer, {"weight": "weight_quantizer"}.get(part, part), None)
    return model
