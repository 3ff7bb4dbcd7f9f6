"""How well a model's own outputs tell images of another kind from those it was trained on:

python eval/out_of_distribution.py runs/ptq/fp32 runs/ptq/int8 --outside FOLDER

Three scores, each higher for images that the model finds familiar: the largest probability (Hendrycks and Gimpel,
arXiv 1610.02136), the largest logit (Hendrycks et al., arXiv 1911.11132) and the negative energy, the log of the sum
of the logits' exponentials (Liu et al., arXiv 2010.03759, with temperature 1).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import scipy.special
import scipy.stats
import tyro
from torch.utils.data import Dataset

from eval.benchmark.open_bundles import open_bundles, open_fitting_data, predict_checked
from eval.metrics.predictions import probabilities
from eval.report.store import write_results
from illama.cli import run_command
from illama.data.datasets import evenly_spaced, open_data
from illama.data.images import decode_image
from illama.data.webdataset import IMAGE_SUFFIXES, Sample
from illama.errors import UserError
from illama.markdown_table import markdown
from illama.options import Exif

RESULTS = "out-of-distribution"


@dataclass(frozen=True)
class OutsideOptions:
    """Compare how well bundles tell another data set's images from their own.

    Attributes:
        bundles: of python quant/ptq.py.
        outside: images of another kind: a folder of pictures at any depth, or anything that --data takes.
        data: what the bundles were trained on; its test split is inside.
        images: how many of each at most, evenly spaced; all if not given.
        out: folder for the results.
    """

    bundles: Annotated[tuple[Path, ...], tyro.conf.Positional]
    outside: str
    data: str = "fashion-mnist"
    images: int | None = None
    out: Path = Path("runs/out-of-distribution")


@dataclass(frozen=True)
class Separation:
    """How well a score separates two sets of images.

    Attributes:
        auroc: chance that an image from inside scores higher than one from outside, ties counting half; 0..1.
        fpr_at_95: share of the images from outside that score as high as the 95% of those inside that score highest.
    """

    auroc: float
    fpr_at_95: float


class Pictures(Dataset[Sample]):
    """Every picture under a folder, in the order of their paths, all labelled 0.

    Raises:
        UserError: there is none.
    """

    def __init__(self, folder: Path, exif: Exif = "apply") -> None:
        self.exif = exif
        self.paths = sorted(path for path in folder.rglob("*") if path.suffix[1:].lower() in IMAGE_SUFFIXES)
        if not self.paths:
            raise UserError(f"no pictures under {folder}: expected files ending in {', '.join(sorted(IMAGE_SUFFIXES))}")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        path = str(self.paths[index])
        return decode_image(path, lambda: path, self.exif), 0


def familiarity(logits: np.ndarray) -> dict[str, np.ndarray]:
    """The three scores (images,) of logits (images, classes), float64."""
    wide = logits.astype(np.float64)
    return {
        "max probability": probabilities(logits).max(1),
        "max logit": wide.max(1),
        "energy": scipy.special.logsumexp(wide, axis=1),
    }


def separation(inside: np.ndarray, outside: np.ndarray) -> Separation:
    """How well a score (images,), higher inside, separates two sets.

    Raises:
        ValueError: one is empty, or holds scores that are not finite.
    """
    if not len(inside) or not len(outside) or not (np.isfinite(inside).all() and np.isfinite(outside).all()):
        raise ValueError("separation takes two sets of finite scores, neither of them empty")
    # Mann and Whitney's U is the number of pairs that are in order.
    pairs = scipy.stats.mannwhitneyu(inside, outside, method="asymptotic").statistic
    threshold = np.sort(inside)[::-1][int(np.ceil(0.95 * len(inside))) - 1]
    return Separation(float(pairs / (len(inside) * len(outside))), float((outside >= threshold).mean()))


def measure(inside: np.ndarray, outside: np.ndarray) -> dict[str, Separation]:
    """Score -> how well it separates logits (images, classes) of two sets."""
    scores = familiarity(inside), familiarity(outside)
    return {name: separation(scores[0][name], scores[1][name]) for name in scores[0]}


def open_outside(spec: str, exif: Exif = "apply") -> Dataset[Sample]:
    """The test split of a data set, or the pictures of a folder that is none; UserError if there are none."""
    folder = Path(spec)
    if folder.is_dir() and not (folder / "val").is_dir():
        return Pictures(folder, exif)
    return open_data(spec, exif).test()


def table(results: Mapping[str, Mapping[str, Separation]]) -> str:
    """A line for each model, two columns for each score."""
    headings = [f"{name}: {figure}" for name in next(iter(results.values())) for figure in ("AUROC", "FPR at 95%")]
    rows = [
        (model, *(cell for each in separations.values() for cell in (f"{each.auroc:.4f}", f"{each.fpr_at_95:.1%}")))
        for model, separations in results.items()
    ]
    return markdown(("model", *headings), rows)


def main(options: OutsideOptions) -> None:
    bundles = open_bundles(options.bundles)
    inside_data = open_fitting_data(options.data, bundles.classes, bundles.preprocessing)
    sets = inside_data.test(), open_outside(options.outside, bundles.preprocessing.exif)
    chosen = [evenly_spaced(images, options.images and min(options.images, len(images))) for images in sets]  # type: ignore[arg-type]
    transform = bundles.preprocessing.transform()
    inside, outside = (predict_checked(bundles, images, transform)[0] for images in chosen)
    results = {model: measure(inside[model], outside[model]) for model in bundles.models}
    images: tuple[int, int] = (len(chosen[0]), len(chosen[1]))  # type: ignore[arg-type]
    facts = {
        "data": options.data,
        "outside": options.outside,
        "images": images,
        "models": {model: {name: asdict(each) for name, each in scores.items()} for model, scores in results.items()},
    }
    print(f"{images[0]} images of {options.data}, {images[1]} of {options.outside}\n")
    write_results(options.out, RESULTS, facts, table(results))


if __name__ == "__main__":
    run_command(OutsideOptions, main)
