"""How well scores of the logits separate images of another data set from those a model was trained on.

Each of the three scores is higher for images that resemble the training data: the largest probability (Hendrycks and
Gimpel, arXiv 1610.02136), the largest logit (Hendrycks et al., arXiv 1911.11132) and the negative energy, the log of
the sum of the logits' exponentials (Liu et al., arXiv 2010.03759, with temperature 1).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.special
import scipy.stats
from torch.utils.data import Dataset

from eval.metrics.predictions import probabilities
from illama.data.datasets import evenly_spaced, open_data
from illama.data.image_folders import Pictures
from illama.data.webdataset import Sample
from illama.markdown_table import markdown
from illama.options import Exif


@dataclass(frozen=True)
class Separation:
    """How well a score separates two sets of images.

    Attributes:
        auroc: probability that an image from inside scores higher than one from outside, ties counting half; [0, 1].
        fpr_at_95: false positive rate at a true positive rate of 95%: share of the images from outside that score at
            least the threshold that 95% of the images from inside reach; [0, 1].
    """

    auroc: float
    fpr_at_95: float


def familiarity(logits: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the three scores (images,), float64, of logits (images, classes)."""
    wide = logits.astype(np.float64)
    return {
        "max probability": probabilities(logits).max(1),
        "max logit": wide.max(1),
        "energy": scipy.special.logsumexp(wide, axis=1),
    }


def separation(inside: np.ndarray, outside: np.ndarray) -> Separation:
    """Returns how well a score (images,), expected to be higher inside, separates two sets of images.

    Raises:
        ValueError: a set is empty, or has scores that are not finite.
    """
    if not len(inside) or not len(outside) or not (np.isfinite(inside).all() and np.isfinite(outside).all()):
        raise ValueError("separation takes two sets of finite scores, neither of them empty")
    # The Mann-Whitney U statistic is the number of pairs (inside, outside) in which inside is higher.
    pairs = scipy.stats.mannwhitneyu(inside, outside, method="asymptotic").statistic
    threshold = np.sort(inside)[::-1][int(np.ceil(0.95 * len(inside))) - 1]
    return Separation(float(pairs / (len(inside) * len(outside))), float((outside >= threshold).mean()))


def measure_separation(inside: np.ndarray, outside: np.ndarray) -> dict[str, Separation]:
    """Returns, by score, how well it separates two sets of images, given their logits (images, classes)."""
    scores = familiarity(inside), familiarity(outside)
    return {name: separation(scores[0][name], scores[1][name]) for name in scores[0]}


def open_outside(spec: str, exif: Exif = "apply") -> Dataset[Sample]:
    """Opens a folder of pictures, or the test split of a data set.

    Raises:
        UserError: there are no pictures.
    """
    folder = Path(spec)
    if folder.is_dir() and not (folder / "val").is_dir():
        return Pictures(folder, exif)
    return open_data(spec, exif).test()


def at_most(images: int | None, split: Dataset[Sample]) -> Dataset[Sample]:
    """Returns ``images`` images of a split, evenly spaced; the whole split if it has fewer or ``images`` is None."""
    return evenly_spaced(split, images and min(images, len(split)))  # type: ignore[arg-type]


def separation_table(results: Mapping[str, Mapping[str, Separation]]) -> str:
    """Returns a table with a row for each model and two columns for each score."""
    headings = [f"{name}: {figure}" for name in next(iter(results.values())) for figure in ("AUROC", "FPR at 95%")]
    rows = [
        (model, *(cell for each in separations.values() for cell in (f"{each.auroc:.4f}", f"{each.fpr_at_95:.1%}")))
        for model, separations in results.items()
    ]
    return markdown(("model", *headings), rows)
