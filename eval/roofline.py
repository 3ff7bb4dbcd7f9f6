"""Predicted lower bound of a file's latency on a device:

python eval/roofline.py runs/ptq/int8 --device orin-nano
python eval/roofline.py runs/ptq/fp32 runs/ptq/int8 --device cpu

A PREDICTION by the roofline model from published peak rates, as eval/cost_model/roofline_model.py describes. With
``--device cpu`` the peaks of this machine and the times of the layers are measured, and compared with the prediction.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro

from illama.cli import run_command
from illama.errors import UserError
from illama.options import BatchSize, Existing


@dataclass(frozen=True)
class RooflineOptions:
    """Predict a lower bound of the latency of bundles on devices; for one bundle on one device, layer by layer.

    Prints a table, and writes it to OUT as roofline.md, and with all figures as roofline.json.

    Attributes:
        bundles: bundles of python quant/ptq.py.
        device: names such as orin-nano, agx-orin, thor, rtx-4090, l4 or h100; cpu is this machine, measured.
        batch: number of images in a call.
        out: folder for the results.
    """

    bundles: Annotated[tuple[Existing, ...], tyro.conf.Positional]
    device: tuple[str, ...] = ("orin-nano",)
    batch: BatchSize = 1
    out: Path = Path("runs/roofline")

    def __post_init__(self) -> None:
        if not self.bundles or not self.device:
            raise UserError("no bundle or no device: give at least one bundle and one --device")
        if len({bundle.name for bundle in self.bundles}) < len(self.bundles):
            raise UserError("two bundles have the same name: give one of them at a time")


def main(options: RooflineOptions) -> None:
    # Imported here, so that --help does not wait for PyTorch.
    from eval.cost_model.cpu_peaks import measure_cpu
    from eval.cost_model.devices import CPU, LacksPrecisionError, find_device
    from eval.cost_model.roofline_model import find_file, predict, roofline_tables
    from eval.report.store import write_results

    for bundle in options.bundles:  # before anything is measured
        find_file(bundle, CPU in options.device)
    devices = [measure_cpu() if name == CPU else find_device(name) for name in dict.fromkeys(options.device)]
    predictions, error = [], None
    for device in devices:
        for bundle in options.bundles:
            try:
                predictions.append(predict(bundle, device, options.batch))
            except LacksPrecisionError as lacking:  # a dash in the table
                error = lacking
    if error and not predictions:
        raise error
    names = [bundle.name for bundle in options.bundles]
    facts = {
        "batch": options.batch,
        "devices": [asdict(each) for each in devices],
        "predictions": [each.to_json() for each in predictions],
    }
    write_results(options.out, "roofline", facts, roofline_tables(predictions, names, devices, options.batch))


if __name__ == "__main__":
    run_command(RooflineOptions, main)
