"""What quantizing each layer alone costs, on real images:

python quant/sensitivity.py --scheme w4a8

A table on the terminal, and sensitivity.md, .json, .csv and .png in the output folder.
"""

from __future__ import annotations

import csv
import json
import math
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.data import Subset
from tqdm import tqdm

from illama.atomic_write import write_folder
from illama.bundle import command_line, package_versions
from illama.cli import run_command
from illama.errors import UserError
from illama.inference import chance_note
from illama.markdown_table import markdown
from quant.input_options import InputOptions
from quant.inputs import Inputs, open_inputs, scheme_named
from quant.mixed_precision.layer_effects import (
    Effect,
    block_number,
    kind_of,
    layers_of,
    measure,
    selection_images,
    tensor_sqnr,
)
from quant.quantizers.calibrate import calibrate
from quant.quantizers.layers import quantizers

RESULT = "sensitivity.json"
_ALL = "all layers"
_TENSOR_IMAGES = 64  # a tensor's noise needs no more: each image has thousands of its values


@dataclass(frozen=True)
class SensitivityOptions(InputOptions):
    """Measure what each layer of a network loses when it alone is quantized.

    Learned rounding is left out, since it adapts a whole block to one scheme.

    Attributes:
        scheme: a shipped scheme's name, or a YAML file.
        images: how many images the losses are taken over.
        split: train: of the training split, none that calibration sees; test: of the test split; evenly spaced.
        out: a folder for the results; an earlier result there is replaced.
    """

    scheme: str = "int8"
    images: int = 1000
    split: Literal["train", "test"] = "train"
    out: Path = Path("runs/sensitivity")


def study(options: SensitivityOptions, inputs: Inputs) -> dict[str, Any]:
    """The contents of sensitivity.json: one entry a layer, one for all of them together, and every tensor's SQNR."""
    scheme = replace(scheme_named(options.scheme), learned=0)
    quantized = calibrate(inputs.model, scheme, inputs.calibration)
    layers = layers_of(name for name, _ in quantizers(quantized))
    if not layers:
        raise UserError(f"scheme {scheme.name} quantizes nothing: there is nothing to measure")
    everything = [tensor for tensors in layers.values() for tensor in tensors]
    batches = inputs.batches(chosen_images(options, inputs))
    effects = measure(quantized, {**layers, _ALL: everything}, tqdm(batches, desc="quantize one layer at a time"))
    tensors = tensor_sqnr(inputs.float_model(scheme), quantized, torch.cat(inputs.calibration)[:_TENSOR_IMAGES])
    return {
        "command": command_line(),
        **{key: str(value) for key, value in asdict(options).items() if key != "out"},
        "checkpoint": os.path.relpath(options.checkpoint),
        "classes": len(inputs.data.classes),
        "all": _record(effects.pop(_ALL)),
        "layers": [
            {"layer": layer, "block": block_number(layer), "kind": kind_of(layer), **_record(effect)}
            for layer, effect in effects.items()
        ],
        "tensor_sqnr_db": {name: _finite(value) for name, value in tensors.items()},
        "versions": package_versions(),
    }


def chosen_images(options: SensitivityOptions, inputs: Inputs) -> Any:
    """The images that losses are measured on; UserError if there are fewer than asked for."""
    if options.split == "train":
        return selection_images(inputs.data, options.calibration_images, options.images)
    test: Any = inputs.data.test()
    if not 1 <= options.images <= len(test):
        raise UserError(f"{options.images} test images asked for, 1 to {len(test)} can be had: change --images")
    return Subset(test, [index * len(test) // options.images for index in range(options.images)])


def _record(effect: Effect) -> dict[str, Any]:
    values = {**asdict(effect), "drop": effect.drop, "drop_error": effect.drop_error}
    return {**values, "sqnr_db": _finite(effect.sqnr_db)}


def _finite(decibels: float) -> float | None:
    """JSON knows no infinity: null stands for no noise at all."""
    return round(decibels, 2) if math.isfinite(decibels) else None


def table(result: dict[str, Any]) -> str:
    """The layers, most divergent first, and the tensors that are hardest to round."""
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
    headings = ("quantized alone", f"logits SQNR dB, {result['scheme']}", "KL nats", "top-1 lost", "of them")
    hardest = sorted((value, name) for name, value in result["tensor_sqnr_db"].items() if value is not None)[:8]
    tensors = ", ".join(f"{name} {value:.1f} dB" for value, name in hardest)
    note = chance_note("the float network", result["all"]["right"] / result["all"]["images"] * 100, result["classes"])
    return f"{markdown(headings, rows)}\n\nThe hardest tensors to round: {tensors}.\n{note}"


def main(options: SensitivityOptions) -> None:
    from quant.mixed_precision.layer_plots import (
        draw_sensitivity,  # only here, since importing matplotlib takes a while
    )

    with write_folder(options.out, lambda folder: (folder / RESULT).exists()) as folder:
        inputs = open_inputs(options)
        result = study(options, inputs)
        (folder / RESULT).write_text(json.dumps(result, indent=1) + "\n")
        with (folder / "sensitivity.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, result["layers"][0])
            writer.writeheader()
            writer.writerows(result["layers"])
        (folder / "sensitivity.md").write_text(table(result))
        draw_sensitivity(result, folder / "sensitivity.png")
    print(f"\n{table(result)}")
    print(f"{options.images} images of the {options.split} split; written to {options.out}")


if __name__ == "__main__":
    run_command(SensitivityOptions, main)
