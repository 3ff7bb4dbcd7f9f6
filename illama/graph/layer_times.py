"""Time of each layer of an exported file, from ONNX Runtime's profiler or a TensorRT layer profile."""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from illama.errors import UserError
from illama.graph.reader import layer_of, load_graph
from illama.graph.session import cpu_session
from illama.progress import track
from illama.structured_files import read_json

PRODUCTS = {"q": "qk", "k": "qk", "p": "pv", "v": "pv"}  # input of attention -> the product that it belongs to


@dataclass
class GraphTimes:
    """Inference times of one exported file.

    Attributes:
        call: median time of a whole call in ms, without a profiler where possible.
        layers: layer -> time of its nodes in ms.
        rest: time of all other nodes in ms: norms, softmax, reshapes, and copies that ONNX Runtime added.
    """

    call: float
    layers: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    rest: float = 0.0

    def add(self, layer: str | None, milliseconds: float) -> None:
        if layer is None:
            self.rest += milliseconds
        else:
            self.layers[layer] += milliseconds


def layers_of_nodes(path: Path, layers: Mapping[str, Any]) -> dict[str, str | None]:
    """Returns the name of each node of an exported file -> the layer that it belongs to, or None."""
    return {str(node.name): layer_of_module(layer_of(node), layers) for node in load_graph(path).graph}


def layer_of_module(module: str, layers: Collection[str]) -> str | None:
    """Returns the layer that a module belongs to, such as a quantizer of its input; None if there is none."""
    parent, _, part = module.rpartition(".")
    if part in PRODUCTS and f"{parent}.{PRODUCTS[part]}" in layers:
        return f"{parent}.{PRODUCTS[part]}"
    module = module.removesuffix(".input")
    return module if module in layers else None


def time_graphs(
    paths: Mapping[str, Path],
    images: np.ndarray,
    layers: Mapping[str, Any],
    threads: int = 0,
    rounds: int = 10,
    calls: int = 10,
) -> dict[str, GraphTimes]:
    """Times files in ONNX Runtime on the CPU. Every round runs each file, so that drift affects all files alike.

    Whole calls are timed without a profiler, and nodes with one. Times are medians over calls.

    Args:
        images: input of a call, (B, C, H, W) float32.
        layers: layers to attribute nodes to.
        threads: number of threads; 0 for one per core.
    """
    plain, times = {name: cpu_session(path, threads) for name, path in paths.items()}, {name: [] for name in paths}  # type: ignore[var-annotated]
    with tempfile.TemporaryDirectory() as folder:
        profiled = {name: cpu_session(path, threads, Path(folder) / name) for name, path in paths.items()}
        for _ in track(range(rounds), "time layers", "round"):
            for name, session in plain.items():
                feed = {session.get_inputs()[0].name: images}
                for call in range(3 + calls):  # the first three are warm-up
                    start = time.perf_counter()
                    session.run(None, feed)
                    times[name] += [time.perf_counter() - start] if call >= 3 else []
                for _ in range(calls):
                    profiled[name].run(None, feed)
        events = {name: json.loads(Path(session.end_profiling()).read_text()) for name, session in profiled.items()}
    medians = {name: float(np.median(values) * 1e3) for name, values in times.items()}
    return {name: _attribute(events[name], medians[name], layers_of_nodes(paths[name], layers)) for name in paths}


def _attribute(events: list[dict[str, Any]], call: float, nodes: Mapping[str, str | None]) -> GraphTimes:
    """Sums the times of nodes by layer. ONNX Runtime keeps the name of a node that it fuses, and appends to it."""
    durations: dict[str, list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            durations[event["name"].removesuffix("_kernel_time")].append(event["dur"] / 1e3)
    times = GraphTimes(call)
    for event_name, values in durations.items():
        names = [each for each in nodes if event_name.startswith(each) and not event_name[len(each) :][:1].isalnum()]
        times.add(nodes[max(names, key=len)] if names else None, float(np.median(values)))
    return times


def read_layer_times(path: Path, layers: Mapping[str, Any]) -> GraphTimes:
    """Reads a TensorRT engine's layer times: a file of ``trtexec --exportProfile=FILE`` or of the profiler, in JSON.

    A profile has only names, in which TensorRT joins those of the file's nodes, and the exporter begins these with the
    layer. The time of an engine's layer is divided equally among the layers that its name contains; that of a fused
    attention kernel belongs to both of its products. If the name contains no layer, the time is part of ``rest``.

    Raises:
        UserError: the file is not a profile, or contains no layer of this network.
    """
    try:
        rows = [row for row in read_json(path, list[dict[str, Any]]) if "name" in row]
        named = [
            (str(row["name"]), float(row.get("medianMs", row.get("averageMs", row.get("timeMs")))))  # type: ignore[arg-type]
            for row in rows
        ]
    except (UserError, ValueError, TypeError) as error:
        raise UserError(f"{path} is not a TensorRT layer profile: write one with trtexec --exportProfile") from error
    times = GraphTimes(sum(milliseconds for _, milliseconds in named))
    for name, milliseconds in named:
        mentioned: list[str | None] = [layer for layer in layers if _mentions(name, layer)]
        for layer in mentioned or [None]:
            times.add(layer, milliseconds / max(1, len(mentioned)))
    if not times.layers:
        raise UserError(f"{path} contains no layer of this network: build the engine from a file of this project")
    return times


def _mentions(name: str, layer: str) -> bool:
    parent, _, part = layer.rpartition(".")
    wanted = re.escape(parent if part in ("qk", "pv") else layer)
    # The layer must not be part of a longer name. TensorRT writes a range of fused nodes as "first...last".
    return bool(re.search(rf"(?:^|[^\w.]|\.\.\.){wanted}(?!\w)", name))
