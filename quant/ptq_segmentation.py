"""Post-training quantization of a UperNet:

python quant/ptq_segmentation.py runs/segmentation/bundle --data FOLDER
python quant/ptq_segmentation.py runs/segmentation/bundle --data FOLDER --schemes int8 --out runs/int8

Writes a bundle for each scheme and for the float references, as ``python quant/ptq.py`` does for classifiers.
``python eval/segmentation.py`` compares them, and ``python deploy/build.py`` builds their engines.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from illama.cli import run_command
from illama.bundle import GoldenImages, as_run
from illama.options import Count, Device
from quant.schemes.shipped import SchemeName


@dataclass(frozen=True)
class PtqSegmentationOptions:
    """Calibrate and export a segmentation network; batch norms are folded into the convolutions.

    Writes a bundle for each scheme to OUT/SCHEME/.

    Attributes:
        bundle: bundle written by python illama/train_segmentation.py.
        data: folder in ADE20K's layout; its training images are used for calibration.
        schemes: names of shipped schemes for ONNX (python quant/list_schemes.py), or paths to YAML files.
        calibration_images: number of training images for calibration, evenly spaced.
        out: folder for the bundles, each named after its scheme; earlier ones of these names are replaced.
        golden: images of the golden answers in the bundles: calibration (8 of them, at most 32x32 pixels), noise, or
            none.
        device: where PyTorch calibrates and reconstructs: cpu, cuda, or auto for the GPU if there is one.
    """

    bundle: Annotated[Path, tyro.conf.Positional]
    data: Path
    schemes: tuple[SchemeName, ...] = ("int8", "fp8")
    calibration_images: Count = 64
    out: Path = Path("runs/ptq-segmentation")
    golden: GoldenImages = "calibration"
    device: Device = "auto"


def main(options: PtqSegmentationOptions) -> None:
    # Imported here, so that --help does not wait for PyTorch.
    from illama.atomic_write import make_out
    from illama.hardware import torch_device
    from quant.export.segmentation_bundles import open_segmentation_job, write_segmentation_bundles

    images, golden, device = options.calibration_images, options.golden, torch_device(options.device)
    job = open_segmentation_job(options.bundle, options.data, options.schemes, images, golden)
    make_out(options.out)
    write_segmentation_bundles(job, options.out, device)
    print(as_run(f"bundles in {options.out}; compare them with python eval/segmentation.py {options.out}/*"))


if __name__ == "__main__":
    run_command(PtqSegmentationOptions, main)
