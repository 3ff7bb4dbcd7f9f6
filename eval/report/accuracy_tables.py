"""How many images models get right, what changes from the first to the others, and how far to trust probabilities:

python eval/accuracy.py runs/ptq/fp32 runs/ptq/int8 runs/ptq/fp8
torchrun --nproc-per-node 2 eval/accuracy.py runs/ptq/fp32 runs/ptq/int8 --data parquet:imagenet

Bundles, or single files or engines of them. What is finished is kept in the output folder until all of it is, so that
an interrupted run goes on. Temperatures are fitted on calibration images, of the training split, and judged on the test
split.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import tyro

from deploy.runtimes.names import RuntimeName
from deploy.runtimes.temperature import read_temperature, store_temperatures
from eval.benchmark.evaluate_split import PATIENCE, Evaluated, evaluate
from eval.benchmark.machine import share_of_cores
from eval.benchmark.open_bundles import OpenBundles, open_bundles, open_fitting_data
from eval.metrics.accuracy_change import Change, compare_predictions, top_k_accuracy
from eval.metrics.calibration import Reliability, fit_temperatures, reliability
from eval.report.schema import Measured, plain
from eval.report.store import write_results
from illama.atomic_write import lock_folder, remove_folder
from illama.cli import run_command
from illama.data.datasets import evenly_spaced
from illama.errors import UserError
from illama.inference import chance_note
from illama.markdown_table import markdown
from illama.training.distributed import Processes, processes

RESULTS, UNFINISHED = "accuracy", "unfinished"
_SHOWN = 8  # flipped images that are named


@dataclass(frozen=True)
class AccuracyOptions:
    """Compare models image by image and class by class, and measure their calibration.

    Attributes:
        paths: bundles of python quant/ptq.py, or files or engines of them; the first is what the others are held
            against.
        data: what they were trained on; its test split is used.
        images: how many test images, evenly spaced; all if not given.
        calibration_images: of the training split, which temperatures are fitted on; 0 to take those that are stored.
        store: keep each temperature with its file, for deploy/predict.py.
        runtime: openvino, onnxruntime, tensorrt, torch, ...; the best for each if not given.
        threads: on a CPU; 0 for one a core, shared out among the processes of this machine.
        workers: processes that read images, for each that computes.
        batch: images a call.
        patience: seconds without a new chunk of the other processes after which one that is done gives up.
        out: where the results go, and where an interrupted run goes on; several machines share this folder.
    """

    paths: Annotated[tuple[Path, ...], tyro.conf.Positional]
    data: str = "fashion-mnist"
    images: int | None = None
    calibration_images: int = 512
    store: bool = False
    runtime: RuntimeName | None = None
    threads: int = 0
    workers: int = 0
    batch: int = 50
    patience: float = PATIENCE
    out: Path = Path("runs/accuracy")

    def __post_init__(self) -> None:
        if self.batch < 1 or self.patience <= 0 or min(self.calibration_images, self.workers, self.threads) < 0:
            raise UserError("--batch is 1 or more, --patience above 0, and no number of anything is negative")


def stored_temperatures(bundles: OpenBundles) -> tuple[dict[str, float], dict[str, str]]:
    """As :func:`eval.metrics.calibration.fit_temperatures`, those that are stored with the files."""
    stored = {name: read_temperature(path) for name, path in bundles.paths.items()}
    return (
        {name: value for name, value in stored.items() if value is not None},
        {name: "none is stored with it" for name, value in stored.items() if value is None},
    )


def measure(results: Mapping[str, Evaluated], temperatures: Mapping[str, float]) -> dict[str, Measured]:
    """Model -> what its predictions say; the first is the reference."""
    reference = next(iter(results.values())).plain
    return {
        name: Measured(
            images=len(each.plain),
            top1=top_k_accuracy(each.plain),
            top5=top_k_accuracy(each.plain, 5),
            change=None if each.plain is reference else compare_predictions(reference, each.plain),
            reliability=reliability(each.plain),
            temperature=temperatures.get(name),
            scaled=reliability(each.scaled) if each.scaled else None,
        )
        for name, each in results.items()
    }


def tables(measured: Mapping[str, Measured], failed: Mapping[str, str], bundles: OpenBundles) -> str:
    """Accuracy, changes and calibration, in Markdown."""
    accuracy = [(name, bundles.runtimes[name], str(each.top1), str(each.top5)) for name, each in measured.items()]
    parts = [markdown(("model", "run by", "top-1 % (95% interval)", "top-5 % (95% interval)"), accuracy)]
    changes = {name: each.change for name, each in measured.items() if each.change}
    if changes:
        parts += [_changes(changes), _details(changes, bundles.classes)]
    name, reference = next(iter(measured.items()))
    note = chance_note(name, reference.top1.percent, len(bundles.classes))
    return "\n\n".join([*parts, _calibration(measured, failed), *([note] if note else [])])


def _changes(changes: Mapping[str, Change]) -> str:
    heads = ("model", "same class %", "right to wrong", "wrong to right", "wrong to wrong", "McNemar's p", "confidence")
    return markdown(
        heads,
        [
            (
                name,
                f"{change.agreement:.2f}",
                str(change.test.lost),
                str(change.test.gained),
                str(len(change.flips.moved)),
                f"{change.test.p:.3f}",
                f"{change.confidence_shift:+.4f}",
            )
            for name, change in changes.items()
        ],
    )


def _details(changes: Mapping[str, Change], classes: tuple[str, ...]) -> str:
    lines = []
    for name, change in changes.items():
        significant = [
            f"{classes[each.label]} {each.reference:.1f} to {each.other:.1f}%"
            for each in change.classes
            if each.significant
        ]
        first = " ".join(map(str, change.flips.lost[:_SHOWN]))
        lines.append(
            f"- {name}: classes that changed significantly: {', '.join(significant) or 'none'}; "
            f"first images lost: {first or 'none'}"
        )
    return "\n".join(lines)


def _calibration(measured: Mapping[str, Measured], failed: Mapping[str, str]) -> str:
    heads = ("model", "temperature", "ECE %", "adaptive ECE %", "NLL", "Brier")
    rows = []
    for name, each in measured.items():
        rows.append((name, "none", *_reliability(each.reliability)))
        if each.scaled:
            rows.append((name, f"{each.temperature:.3f}", *_reliability(each.scaled)))
    missing = [f"- {name}: no temperature: {failed[name]}" for name, each in measured.items() if not each.scaled]
    return "\n\n".join([markdown(heads, rows), *(["\n".join(missing)] if missing else [])])


def _reliability(each: Reliability) -> tuple[str, ...]:
    return f"{each.ece * 100:.2f}", f"{each.adaptive_ece * 100:.2f}", f"{each.nll:.4f}", f"{each.brier:.4f}"


def run(options: AccuracyOptions, group: Processes) -> None:
    """Evaluate as one of the processes of ``group``; the main one prints and writes the results."""
    bundles = open_bundles(options.paths, options.runtime, options.threads or share_of_cores())
    data = open_fitting_data(options.data, bundles.classes, bundles.preprocessing)
    split = evenly_spaced(data.test(), options.images)
    transform, images = bundles.preprocessing.transform(), options.calibration_images
    temperatures, failed = (
        fit_temperatures(bundles.models, data, transform, images, group) if images else stored_temperatures(bundles)
    )
    facts = {"data": options.data, **bundles.facts, "runtimes": bundles.runtimes}
    work = options.out / UNFINISHED
    results = evaluate(
        bundles.models,
        split,
        transform,
        temperatures,
        work,
        options.workers,
        options.batch,
        facts=facts,
        processes=group,
        patience=options.patience,
    )
    group.barrier()  # all have read the chunks
    if group.main:
        write(options, bundles, measure(results, temperatures), failed)
        remove_folder(work)
        if options.store and images:
            fitted = [(bundles.paths[name], value, bundles.runtimes[name]) for name, value in temperatures.items()]
            for failure in store_temperatures(fitted, images, options.data):
                print(failure)


def write(
    options: AccuracyOptions, bundles: OpenBundles, measured: Mapping[str, Measured], failed: Mapping[str, str]
) -> None:
    """The results, on the terminal and in the output folder."""
    reference = next(iter(measured))
    images = measured[reference].images
    print(f"{images} images of {options.data}; held against {reference}\n")
    models = {
        name: {"runtime": bundles.runtimes[name], "sha256": bundles.files[name], **plain(asdict(each))}
        for name, each in measured.items()
    }
    content = {
        "data": options.data,
        "images": images,
        "reference": reference,
        "calibration_images": options.calibration_images,
        "models": models,
    }
    write_results(options.out, RESULTS, content, tables(measured, failed, bundles))


def main(options: AccuracyOptions) -> None:
    with (
        processes(apart=True, timeout=timedelta(seconds=options.patience)) as group,
        lock_folder(options.out, group.main),
    ):
        run(options, group)


if __name__ == "__main__":
    run_command(AccuracyOptions, main)
