"""What lies behind a top-1: what changes from the reference, and how far the probabilities can be trusted:

python eval/trust.py runs/ptq/fp32 runs/ptq/int8 runs/ptq/fp8

The first bundle is the reference. The temperature is fitted on every second image and judged on the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from eval.accuracy_change import Change, Share, compare_predictions, top_k_accuracy
from eval.bundles import open_bundles, open_fitting_data, predict_checked
from eval.calibration_error import reliability, scale_temperature
from illama.data import evenly_spaced
from illama.errors import UserError, run_command

_SHOWN = 8  # flipped images that are named


@dataclass(frozen=True)
class TrustOptions:
    """Compare bundles image by image and class by class, and measure their calibration.

    Attributes:
        bundles: of python quant/ptq.py; the first is what the others are held against.
        data: what they were trained on; its test split is used.
        images: how many test images, evenly spaced; all if not given.
    """

    bundles: Annotated[tuple[Path, ...], tyro.conf.Positional]
    data: str = "fashion-mnist"
    images: int | None = None


def print_accuracy(logits: Mapping[str, np.ndarray], labels: np.ndarray) -> None:
    """Top-1 and top-5 of each model."""
    print("\n| model | top-1 % (95% interval) | top-5 % (95% interval) |\n|---|---|---|")
    for model, values in logits.items():
        print(f"| {model} | {_share(top_k_accuracy(values, labels))} | {_share(top_k_accuracy(values, labels, 5))} |")


def print_changes(changes: Mapping[str, Change], classes: tuple[str, ...]) -> None:
    """What changes from the reference to each other model."""
    print("\n| model | same class % | right to wrong | wrong to right | wrong to wrong | McNemar's p | confidence |")
    print("|---|---|---|---|---|---|---|")
    for model, change in changes.items():
        print(f"| {model} | {change.agreement:.2f} | {change.test.lost} | {change.test.gained} | "
              f"{len(change.flips.moved)} | {change.test.p:.3f} | {change.confidence_shift:+.4f} |")  # fmt: skip
    print()
    for model, change in changes.items():
        significant = [f"{classes[each.label]} {each.reference:.1f} to {each.other:.1f}%"
                       for each in change.classes if each.significant]  # fmt: skip
        first = " ".join(map(str, change.flips.lost[:_SHOWN]))
        print(f"{model}: classes that changed significantly: {', '.join(significant) or 'none'}; "
              f"first images lost: {first or 'none'}")  # fmt: skip


def print_calibration(logits: Mapping[str, np.ndarray], labels: np.ndarray) -> None:
    """Calibration of each model over all images, and over every second one before and after temperature scaling."""
    print("\n| model | ECE % | adaptive ECE % | NLL | Brier | temperature | ECE %, judged half | NLL, judged half |\n"
          + "|---" * 8 + "|")  # fmt: skip
    for model, values in logits.items():
        measured = reliability(values, labels)
        try:
            scaled = scale_temperature((values[::2], labels[::2]), values[1::2], labels[1::2])
            before, after = scaled.before, scaled.after
            cells = (f"{scaled.temperature:.3f} | {before.ece * 100:.2f} -> {after.ece * 100:.2f} | "
                     f"{before.nll:.4f} -> {after.nll:.4f}")  # fmt: skip
        except ValueError as error:
            cells = f"- | {error} | -"
        print(f"| {model} | {measured.ece * 100:.2f} | {measured.adaptive_ece * 100:.2f} | {measured.nll:.4f} | "
              f"{measured.brier:.4f} | {cells} |")  # fmt: skip


def _share(share: Share) -> str:
    return f"{share.percent:.2f} ({share.low:.2f} to {share.high:.2f})"


def main(options: TrustOptions) -> None:
    bundles = open_bundles(options.bundles)
    images = evenly_spaced(open_fitting_data(options.data, bundles).test(), options.images)
    logits, labels = predict_checked(bundles, images, bundles.preprocessing.transform())
    reference, *others = logits
    try:
        changes = {model: compare_predictions(logits[reference], logits[model], labels) for model in others}
        print(f"{len(labels)} images of {options.data}; held against {reference}")
        print_accuracy(logits, labels)
        if changes:
            print_changes(changes, bundles.classes)
        print_calibration(logits, labels)
    except ValueError as error:
        raise UserError(f"the logits cannot be compared: {error}") from error


if __name__ == "__main__":
    run_command(TrustOptions, main)
