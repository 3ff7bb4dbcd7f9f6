"""Out-of-distribution detection by a model's own outputs:

python eval/out_of_distribution.py BUNDLE ... --outside DIR
python eval/out_of_distribution.py runs/ptq/fp32 runs/ptq/int8 --outside cifar10:data

Measures how well three scores of the logits separate images of another data set from test images of the data that the
bundles were trained on. eval/metrics/separation.py defines the scores.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro

from illama.cli import run_command
from illama.options import BundleData, Count, Existing


@dataclass(frozen=True)
class OutsideOptions:
    """Compare how well bundles separate another data set's images from their own.

    Prints a table, and writes it to OUT as out-of-distribution.md, and with all figures as .json.

    Attributes:
        bundles: bundles of python quant/ptq.py.
        outside: another data set: a folder of pictures at any depth, or a value that --data takes.
        data: data set that the bundles were trained on; its test split is used.
        images: number of images of each data set, evenly spaced; all if not given.
        out: folder for the results.
    """

    bundles: Annotated[tuple[Existing, ...], tyro.conf.Positional]
    outside: str
    data: BundleData = None
    images: Count | None = None
    out: Path = Path("runs/out-of-distribution")


def main(options: OutsideOptions) -> None:
    # Imported here, so that --help does not wait for PyTorch.
    from eval.measure.open_bundles import open_bundles, open_fitting_data, predict_checked
    from eval.metrics.separation import at_most, measure_separation, open_outside, separation_table
    from eval.report.store import write_results

    bundles = open_bundles(options.bundles)
    name = options.data or bundles.data
    data = open_fitting_data(name, bundles.classes, bundles.preprocessing)
    splits = data.test(), open_outside(options.outside, bundles.preprocessing.exif)
    inside, outside = (at_most(options.images, split) for split in splits)
    transform = bundles.preprocessing.transform()
    logits, outside_logits = (predict_checked(bundles, images, transform)[0] for images in (inside, outside))
    results = {model: measure_separation(logits[model], outside_logits[model]) for model in bundles.models}
    images: tuple[int, int] = (len(inside), len(outside))  # type: ignore[arg-type]
    facts = {
        "data": name,
        "outside": options.outside,
        "images": images,
        "models": {model: {name: asdict(each) for name, each in scores.items()} for model, scores in results.items()},
    }
    print(f"{images[0]} images of {name}, {images[1]} of {options.outside}\n")
    write_results(options.out, "out-of-distribution", facts, separation_table(results))


if __name__ == "__main__":
    run_command(OutsideOptions, main)
