"""Charts of the effect of quantization, layer by layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from quant.mixed_precision.layer_effects import block_number, kind_of, layer_of

_COLOURS = {
    "patches": "#7f7f7f",
    "qkv": "#1f77b4",
    "qk": "#17becf",
    "pv": "#9467bd",
    "proj": "#8c564b",
    "fc1": "#ff7f0e",
    "fc3": "#f2c14e",
    "fc2": "#d62728",
    "head": "#333333",
}
_OTHER = "#bbbbbb"
_TITLES = {"qk": "q k product", "pv": "p v product"}
_MARKS = {"weight": "o", "input": "v", "q": "v", "k": "^", "p": "v", "v": "^"}


def draw_sensitivity(result: dict[str, Any], path: Path) -> None:
    """Draws the KL divergence of each layer as bars, colored by kind and ordered by block, above each tensor's SQNR.

    Args:
        result: the contents of sensitivity.json.
    """
    layers = [row["layer"] for row in result["layers"]]
    figure = Figure(figsize=(max(8.0, 2.5 + 0.13 * len(layers)), 5.6), layout="constrained")
    bars, dots = figure.subplots(2, 1, sharex=True)
    values = [row["kl"] for row in result["layers"]]
    bottom = min((value for value in values if value > 0), default=1e-9) / 2
    bars.bar(
        range(len(layers)), [max(value, bottom) for value in values], 0.85, color=[_colour(layer) for layer in layers]
    )
    bars.set(
        yscale="log", ylabel="KL of the output (nats)", ylim=(bottom, 4 * max(*values, result["all"]["kl"], bottom))
    )
    bars.axhline(result["all"]["kl"], color="black", linewidth=1, linestyle="--")
    bars.annotate("all together", (len(layers) - 0.5, result["all"]["kl"]), ha="right", va="bottom", fontsize=8)
    bars.set_title(
        f"{result['scheme']}: each layer quantized alone ({result['images']} images, {result['split']} split)"
    )
    for name, value in result["tensor_sqnr_db"].items():
        part = name.rpartition(".")[2]
        if value is not None:
            dots.plot(
                layers.index(layer_of(name)),
                value,
                _MARKS.get(part, "s"),
                color=_colour(layer_of(name)),
                markersize=4,
                fillstyle="none" if part == "weight" else "full",
            )
    dots.set_ylabel("SQNR of each tensor (dB)")
    _mark_blocks(bars, layers)
    _mark_blocks(dots, layers)
    _legend(figure, dots, layers)
    figure.savefig(path, dpi=110)


def _colour(layer: str) -> str:
    return _COLOURS.get(kind_of(layer), _OTHER)


def _mark_blocks(axes: Axes, layers: list[str]) -> None:
    """Shades every other block, and shows the blocks' numbers."""
    places: dict[int, list[int]] = {}
    for index, layer in enumerate(layers):
        if (block := block_number(layer)) is not None:
            places.setdefault(block, []).append(index)
    for block, indices in places.items():
        if block % 2 == 0:
            axes.axvspan(indices[0] - 0.5, indices[-1] + 0.5, color="#eeeeee", zorder=0, linewidth=0)
    axes.set_xticks(
        [sum(indices) / len(indices) for indices in places.values()], [f"block {b}" for b in places], fontsize=8
    )
    axes.tick_params(axis="x", length=0)
    axes.set_xlim(-0.7, len(layers) - 0.3)


def _legend(figure: Figure, axes: Axes, layers: list[str]) -> None:
    kinds = list(dict.fromkeys(kind_of(layer) for layer in layers))
    handles = [
        axes.plot([], [], "s", color=_COLOURS.get(kind, _OTHER), label=_TITLES.get(kind, kind))[0] for kind in kinds
    ]
    marks = (("o", "none", "weight"), ("v", "full", "input, q or p"), ("^", "full", "k or v"))
    for mark, fill, label in marks:
        handles += axes.plot([], [], mark, color="black", fillstyle=fill, label=label)  # type: ignore[arg-type]
    figure.legend(handles=handles, loc="outside right upper", fontsize=8, frameon=False)
