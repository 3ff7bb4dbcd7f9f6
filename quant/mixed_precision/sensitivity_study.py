"""The effect of quantizing each layer alone: measured, and written as a table, JSON, CSV and a chart."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from illama.errors import UserError
from illama.inference import chance_note
from illama.markdown_table import markdown
from illama.progress import Activity, track
from quant.inputs import Inputs
from quant.mixed_precision.layer_effects import Effect, block_number, kind_of, layers_of, measure, tensor_sqnr
from quant.mixed_precision.layer_plots import draw_sensitivity
from quant.quantizers.calibrate import calibrate
from quant.quantizers.layers import quantizers
from quant.schemes.scheme import Scheme, resolve

RESULT = "sensitivity.json"
_ALL = "all layers"
_TENSOR_IMAGES = 64  # enough for a tensor's SQNR: each image has thousands of its values


def measure_sensitivity(inputs: Inputs, scheme: Scheme, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """Returns the measured part of sensitivity.json: each layer, all layers together, each tensor's SQNR.

    Weights are rounded to nearest: GPTQ and block reconstruction adapt them to one scheme.

    Raises:
        UserError: the scheme quantizes no tensor of the network, or does not fit it.
    """
    scheme = scheme.rounding_to_nearest()
    quantized = calibrate(inputs.model, resolve(scheme, inputs.model), inputs.calibration, inputs.device)
    layers = layers_of(name for name, _ in quantizers(quantized))
    if not layers:
        raise UserError(f"scheme {scheme.name} quantizes no tensor: there is nothing to measure")
    everything = [tensor for tensors in layers.values() for tensor in tensors]
    shown = track(batches, "quantize one layer at a time", "batch")
    effects = measure(quantized, {**layers, _ALL: everything}, shown, inputs.neighbors)
    with Activity("round one tensor at a time"):
        tensors = tensor_sqnr(inputs.float_model(scheme), quantized, torch.cat(inputs.calibration)[:_TENSOR_IMAGES])
    return {
        "classes": len(inputs.data.classes),
        "metric": inputs.metric,
        "all": _record(effects.pop(_ALL)),
        "layers": [
            {"layer": layer, "block": block_number(layer), "kind": kind_of(layer), **_record(effect)}
            for layer, effect in effects.items()
        ],
        "tensor_sqnr_db": {name: _finite(value) for name, value in tensors.items()},
    }


def _record(effect: Effect) -> dict[str, Any]:
    values = {**asdict(effect), "drop": effect.drop, "drop_error": effect.drop_error}
    return {**values, "sqnr_db": _finite(effect.sqnr_db)}


def _finite(decibels: float) -> float | None:
    """Returns None instead of infinity, which JSON does not have; it means no noise."""
    return round(decibels, 2) if math.isfinite(decibels) else None


def write_sensitivity(result: dict[str, Any], folder: Path) -> str:
    """Writes sensitivity.json, .csv, .md and .png, and returns the table."""
    (folder / RESULT).write_text(json.dumps(result, indent=1) + "\n")
    with (folder / "sensitivity.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, result["layers"][0])
        writer.writeheader()
        writer.writerows(result["layers"])
    draw_sensitivity(result, folder / "sensitivity.png")
    table = sensitivity_table(result)
    (folder / "sensitivity.md").write_text(table)
    return table


def sensitivity_table(result: dict[str, Any]) -> str:
    """Returns a Markdown table of the layers, by descending KL divergence, and the tensors of the lowest SQNR."""
    rows = [
        (
            row["layer"],
            "-" if row["sqnr_db"] is None else f"{row['sqnr_db']:.1f}",
            f"{row['kl']:.2e}",
            f"{row['drop']:+.2f}",
            f"-{row['lost']} +{row['gained']}",
        )
        for row in [*sorted(result["layers"], key=lambda row: -row["kl"]), {"layer": _ALL, **result["all"]}]
    ]
    metric, scheme = result["metric"], result["scheme"]
    output = "logits" if metric == "top-1" else "features"
    headings = ("quantized alone", f"{output} SQNR dB, {scheme}", "KL nats", f"{metric} lost", "of them")
    hardest = sorted((value, name) for name, value in result["tensor_sqnr_db"].items() if value is not None)[:8]
    tensors = ", ".join(f"{name} {value:.1f} dB" for value, name in hardest)
    right = result["all"]["right"] / result["all"]["images"] * 100
    note = chance_note("the float network", right, result["classes"]) if metric == "top-1" else ""
    return f"{markdown(headings, rows)}\n\nThe hardest tensors to round: {tensors}.\n{note}"
