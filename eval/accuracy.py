"""Compare accuracy, predictions and calibration of models on the same images:

python eval/accuracy.py runs/ptq/fp32 runs/ptq/int8 runs/ptq/fp8
torchrun --nproc-per-node 2 eval/accuracy.py runs/ptq/fp32 runs/ptq/int8 --data parquet:imagenet

Takes bundles, or single files or engines of them; the first is the reference. Finished chunks are stored in the output
folder until the evaluation ends, and an interrupted run continues from there. Temperatures are fitted on images of the
training split and evaluated on the test split.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import tyro

from illama.cli import run_command
from deploy.runtimes.names import RuntimeName
from illama.options import BatchSize, BundleData, Count, CountOrZero, Existing, Positive, ThreadsOrAll, Workers


@dataclass(frozen=True)
class AccuracyOptions:
    """Compare the predictions of models image by image and class by class, and measure their calibration.

    Prints a table, and writes it to OUT as accuracy.md, and with all figures as accuracy.json.

    Attributes:
        paths: bundles of python quant/ptq.py, or files or engines of them; the first is the reference.
        data: data set that they were trained on; its test split is used.
        images: number of test images, evenly spaced; all if not given.
        calibration_images: number of training images that temperatures are fitted on; 0 to use stored temperatures.
            Defaults to 512, or to all if there are fewer.
        store: store each temperature with its file, for python deploy/predict.py.
        runtime: openvino, onnxruntime, tensorrt, torch, ... Defaults to the preferred runtime for each file.
        threads: number of CPU threads of each process; 0 divides the cores of the machine among its processes.
        workers: number of processes that read images, for each process that runs the models.
        batch: number of images in a call.
        patience: seconds that a finished process waits for the next chunk of another one before it gives up.
        out: folder for the results, from which an interrupted run continues; several machines must share it.
    """

    paths: Annotated[tuple[Existing, ...], tyro.conf.Positional]
    data: BundleData = None
    images: Count | None = None
    calibration_images: CountOrZero | None = None
    store: bool = False
    runtime: RuntimeName | None = None
    threads: ThreadsOrAll = 0
    workers: Workers = 0
    batch: BatchSize = 50
    patience: Positive = 1800.0
    out: Path = Path("runs/accuracy")


def main(options: AccuracyOptions) -> None:
    # Imported here, so that --help does not wait for PyTorch.
    from deploy.runtimes.temperature import store_temperatures
    from eval.measure.evaluate_split import UNFINISHED, Evaluation, evaluate
    from eval.measure.machine import share_of_cores
    from eval.measure.open_bundles import open_bundles, open_fitting_data
    from eval.metrics.calibration import fit_temperatures, stored_temperatures
    from eval.metrics.measured import measure
    from eval.metrics.predictions import refuse_not_finite
    from eval.report.accuracy_tables import write_accuracy
    from illama.atomic_write import lock_folder, remove_folder
    from illama.data.datasets import Transformed, calibration_count, evenly_spaced
    from illama.training.distributed import processes

    work = options.out / UNFINISHED
    with (
        processes(apart=True, timeout=timedelta(seconds=options.patience)) as group,
        lock_folder(options.out, group.main),
    ):
        bundles = open_bundles(options.paths, options.runtime, options.threads or share_of_cores())
        name = options.data or bundles.data
        data = open_fitting_data(name, bundles.classes, bundles.preprocessing)
        images = calibration_count(data, options.calibration_images)
        split, transform = evenly_spaced(data.test(), options.images), bundles.preprocessing.transform()
        if images:
            temperatures, failed = fit_temperatures(bundles.models, data, transform, images, group)
        else:
            temperatures, failed = stored_temperatures(bundles.paths)
        facts = {"data": name, **bundles.facts, "runtimes": bundles.runtimes}
        how = Evaluation(work, options.workers, options.batch, facts, group, patience=options.patience)
        results = evaluate(bundles.models, Transformed(split, transform), temperatures, how)
        group.barrier()  # all processes have read the chunks
        if group.main:
            settings = {"data": name, "calibration_images": images}
            write_accuracy(options.out, settings, bundles, measure(refuse_not_finite(results), temperatures), failed)
            remove_folder(work)
            if options.store and images:
                fitted = [(bundles.paths[name], value, bundles.runtimes[name]) for name, value in temperatures.items()]
                for failure in store_temperatures(fitted, images, name):
                    print(failure)


if __name__ == "__main__":
    run_command(AccuracyOptions, main)
