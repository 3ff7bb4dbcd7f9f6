"""Top-1 on corrupted images, as in ImageNet-C:

python eval/robustness.py runs/ptq/fp32 runs/ptq/int8 runs/ptq/fp8
python eval/robustness.py runs/ptq/fp32 runs/ptq/int8 --corruptions fog jpeg_compression --severities 3

The first bundle is the reference. The results of every corruption and severity are stored in the output folder as they
are measured: an interrupted run continues from there, and further ones can be added later.
eval/metrics/corruptions.py describes how images are corrupted.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from illama.cli import run_command
from eval.metrics.corruption_names import CORRUPTIONS, SEVERITIES
from illama.errors import UserError
from illama.options import BundleData, Count, Existing, Seed, Workers


@dataclass(frozen=True)
class RobustnessOptions:
    """Compare the accuracy of bundles on corrupted images.

    Prints a table, and writes it to OUT as robustness.md, and with all figures as robustness.json.

    Attributes:
        bundles: bundles of python quant/ptq.py; the first is the reference.
        data: data set that they were trained on; its test split is corrupted.
        corruptions: names of corruptions of ImageNet-C; defaults to all 15.
        severities: severities from 1 to 5; defaults to all.
        images: number of test images, evenly spaced.
        seed: random seed of the corruptions and of the intervals.
        workers: number of processes that corrupt images.
        out: folder for the results, from which an interrupted run continues.
    """

    bundles: Annotated[tuple[Existing, ...], tyro.conf.Positional]
    data: BundleData = None
    corruptions: tuple[str, ...] = CORRUPTIONS
    severities: tuple[int, ...] = SEVERITIES
    images: Count = 1000
    seed: Seed = 0
    workers: Workers = 0
    out: Path = Path("runs/robustness")

    def __post_init__(self) -> None:
        if not self.corruptions or not self.severities:
            raise UserError("--corruptions and --severities each take at least one value")


def main(options: RobustnessOptions) -> None:
    # Imported here, so that --help does not wait for PyTorch.
    from eval.measure.open_bundles import open_bundles, open_fitting_data
    from eval.metrics.corrupted_accuracy import measure_cells, robustness_json, robustness_tables, summarize
    from eval.metrics.corruptions import check_corruption
    from eval.report.store import write_results
    from illama.atomic_write import lock_folder
    from illama.data.datasets import evenly_spaced
    from illama.inference import chance_note
    from illama.partial_work import claim

    cells = [(corruption, severity) for corruption in options.corruptions for severity in options.severities]
    for cell in cells:
        check_corruption(*cell)
    with lock_folder(options.out):
        bundles = open_bundles(options.bundles)
        name = options.data or bundles.data
        data = open_fitting_data(name, bundles.classes, bundles.preprocessing)
        images = evenly_spaced(data.test(), options.images)
        settings = {"data": name, "images": options.images, "seed": options.seed}
        claim(options.out, {**settings, **bundles.facts})
        measured = measure_cells(bundles, images, cells, options.out, options.seed, options.workers)
        results = summarize(measured, options.seed)
        reference = next(iter(results))
        note = chance_note(reference, results[reference].clean, len(bundles.classes))
        print(f"{options.images} images of {name}; severities {' '.join(map(str, options.severities))}\n")
        facts = {**settings, **robustness_json(measured, results)}
        write_results(options.out, "robustness", facts, f"{robustness_tables(results)}\n{note}")
    print(f"written to {options.out}")


if __name__ == "__main__":
    run_command(RobustnessOptions, main)
