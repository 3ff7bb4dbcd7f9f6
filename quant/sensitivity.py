"""Measure the effect of quantizing each layer alone, on real images:

python quant/sensitivity.py --scheme w4a8
python quant/sensitivity.py --scheme int8 --images 1000 --out runs/sensitivity

Prints a table, and writes sensitivity.md, .json, .csv and .png.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from illama.cli import run_command
from illama.bundle import command_line, package_versions
from illama.options import Count, Flat, SourceOptions
from quant.schemes.shipped import SchemeName


@dataclass(frozen=True)
class SensitivityOptions:
    """Measure the effect of quantizing each layer of a network alone, without block reconstruction.

    Prints a table, and writes it to OUT as sensitivity.md, a plot, and all figures as sensitivity.json.

    Attributes:
        source: the network and its images.
        scheme: name of a shipped scheme (python quant/list_schemes.py), or path to a YAML file.
        images: number of images, evenly spaced. Defaults to 1,000, or to half of what calibration leaves if that is
            less.
        split: train uses training images that calibration does not use, test uses test images.
        out: folder for the results; an earlier result is replaced.
    """

    source: Flat[SourceOptions] = field(default_factory=SourceOptions)
    scheme: SchemeName = "int8"
    images: Count | None = None
    split: Literal["train", "test"] = "train"
    out: Path = Path("runs/sensitivity")


def main(options: SensitivityOptions) -> None:
    # Imported here, so that --help does not wait for PyTorch.
    from illama.atomic_write import write_folder
    from quant.inputs import onnx_scheme, open_inputs
    from quant.mixed_precision.image_selection import image_count, split_images
    from quant.mixed_precision.sensitivity_study import RESULT, measure_sensitivity, write_sensitivity

    with write_folder(options.out, lambda folder: (folder / RESULT).exists()) as folder:
        inputs, scheme = open_inputs(options.source, calibration_share=2), onnx_scheme(options.scheme)
        count = image_count(inputs, options.images, options.split)
        images = split_images(inputs.data, options.split, inputs.calibration_images, count)
        result = {
            "command": command_line(),
            **{key: str(value) for key, value in asdict(inputs.source).items()},
            "checkpoint": os.path.relpath(options.source.checkpoint),
            "scheme": options.scheme,
            "images": str(count),
            "split": options.split,
            **measure_sensitivity(inputs, scheme, inputs.batches(images)),
            "versions": package_versions(),
        }
        table = write_sensitivity(result, folder)
    print(f"\n{table}")
    print(f"{count} images of the {options.split} split; written to {options.out}")


if __name__ == "__main__":
    run_command(SensitivityOptions, main)
