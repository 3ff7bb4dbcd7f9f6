"""Export of graphs for TensorRT in half precision, with a check that every value fits into its range.

Float16 ends at 65504, and its smallest normal number is 6e-5. A network that exceeds this on calibration images is
exported with the smallest change that keeps it accurate: modules in float32, modules in bfloat16, or all of it in
bfloat16. The candidates are measured, with half precision emulated.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from illama.bundle import FUSED_ONNX, INPUT
from illama.graph.numeric_range import measure_ranges
from illama.graph.session import emulated_session
from illama.graph.writer import copy_graph
from illama.inference import torch_infer
from illama.manifest import HalfDtype, LayerRange, NumericRange, WideDtype
from illama.memory import release_memory
from illama.models.attention import MaskedNetwork
from illama.progress import say, track
from quant.export.onnx_export import export_onnx
from quant.mixed_precision.layer_effects import decibels

HEADROOM = 2.0  # at least, on calibration images: others may have larger values
_WITHIN = 3.0  # dB of the most accurate candidate
_FLOAT16 = torch.finfo(torch.float16)
_BLOCK = re.compile(r"(?:.*\.)?blocks\.\d+")
_UNIT = re.compile(_BLOCK.pattern + r"\.(?:mlp|attn)(?=\.|$)")


@dataclass(frozen=True)
class Candidate:
    """A way to export a network in half precision; ``wide``: module -> the dtype in which it is computed instead."""

    dtype: HalfDtype = "float16"
    wide: Mapping[str, WideDtype] = field(default_factory=dict)


def export_half(model: MaskedNetwork, path: Path, batches: Sequence[Tensor]) -> NumericRange:
    """Exports the graph for TensorRT; returns the range of its layers on calibration images.

    Args:
        batches: calibration images (B, C, H, W), float32.
    """
    images = [batch.numpy() for batch in batches]
    export_onnx(model, path, "fused", torch.float16)
    release_memory()
    ranges = measure_ranges(path, images)
    release_memory()
    misfits = [each.layer for each in ranges if not fits(each)]
    best = Candidate()
    if misfits:
        best = _choose(model, path, candidates(misfits, [name for name, _ in model.named_modules()]), images)
        ranges = measure_ranges(path, images)
    found = NumericRange(sum(map(len, images)), ranges, tuple(misfits), best.dtype, best.wide)
    if misfits:
        say(f"  {found}")
    return found


def fits(layer: LayerRange) -> bool:
    """Whether the values of a layer fit into its dtype: its results with some headroom, its weights with all bits."""
    if layer.dtype == "bfloat16":
        return True
    normal = not layer.weight or _FLOAT16.smallest_normal <= layer.weight <= _FLOAT16.max
    return layer.headroom >= HEADROOM and normal


def candidates(misfits: Sequence[str], modules: Collection[str]) -> list[Candidate]:
    """Returns the ways to export a network whose layers ``misfits`` do not fit into float16, the smallest change first.

    An MLP, or an attention, is one unit, because values pass between its layers. Attention is never computed in
    float32, for which TensorRT has no fused kernel. The residual stream, and what no module computes, is changed with
    the whole network.
    """
    units = list(dict.fromkeys(unit.group() if (unit := _UNIT.match(layer)) else layer for layer in misfits))
    found: list[Candidate] = []
    if not any(_BLOCK.fullmatch(unit) or unit not in modules for unit in units):
        if not any(unit.endswith(".attn") for unit in units):
            found.append(Candidate(wide=dict.fromkeys(units, "float32")))
        found.append(Candidate(wide=dict.fromkeys(units, "bfloat16")))
    return [*found, Candidate("bfloat16")]


def _choose(model: MaskedNetwork, path: Path, ways: Sequence[Candidate], images: Sequence[np.ndarray]) -> Candidate:
    """Writes the graph of the first candidate that is about as accurate as the best, and returns the candidate.

    If none has finite logits, the graph in float16 stays, and fails in the report.
    """
    infer = torch_infer(model)
    exact = np.concatenate([infer(each) for each in track(images, "float logits", "batch")]).astype(np.float64)
    with tempfile.TemporaryDirectory() as folder:
        paths, accuracies = {}, {}
        for number, way in enumerate(track(ways, "compare wider dtypes", "graph")):
            place = Path(folder) / str(number)
            place.mkdir()
            wide = {module: getattr(torch, dtype) for module, dtype in way.wide.items()}
            export_onnx(model, place / FUSED_ONNX, "fused", getattr(torch, way.dtype), wide=wide)
            session = emulated_session(place / FUSED_ONNX)
            logits = np.concatenate([session.run(None, {INPUT: each})[0] for each in track(images, "run", "batch")])
            if np.isfinite(logits).all():
                paths[number], accuracies[number] = place, decibels((exact**2).sum(), ((logits - exact) ** 2).sum())
        if not paths:
            return Candidate()
        chosen = min(number for number, found in accuracies.items() if found >= max(accuracies.values()) - _WITHIN)
        copy_graph(paths[chosen] / FUSED_ONNX, path.parent)
    return ways[chosen]
