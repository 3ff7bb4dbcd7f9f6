"""Everything that is measured of the predictions of one model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from eval.metrics.calibration import Reliability, reliability
from eval.metrics.paired import Change, Share, compare_predictions, top_k_accuracy
from eval.metrics.predictions import Evaluated

NN_AGREEMENT = "1-NN agreement"  # the metric of features without labels


@dataclass(kw_only=True)
class Measured:
    """Measurements of the predictions of one model.

    Attributes:
        images: number of test images.
        top1: share of images whose label is the predicted class.
        top5: share of images whose label is among the five largest logits.
        labeled: whether the images have labels; if not, the classes that the reference predicts take their place.
        change: changes from the reference model's predictions; None for the reference itself.
        features: whether the output is features, which are classified by their nearest neighbors
            (:mod:`illama.nearest_neighbors`).
        sqnr: SQNR of the output against the reference's, in dB; None for the reference, and for equal outputs.
        cosine: mean cosine similarity with the reference's output; None without a reference.
        reliability: calibration of the probabilities as they are; None without labels, and for features.
        temperature: temperature fitted on calibration images; None if there is none.
        scaled: calibration with the logits divided by the temperature; None if there is none.
    """

    images: int
    top1: Share
    top5: Share
    labeled: bool = True
    change: Change | None = None
    features: bool = False
    sqnr: float | None = None
    cosine: float | None = None
    reliability: Reliability | None
    temperature: float | None = None
    scaled: Reliability | None = None

    @property
    def metric(self) -> str:
        """What ``top1`` is called.

        Without labels, it is the agreement with the reference; of features, that on the nearest calibration image.
        """
        if self.features:
            return "k-NN top-1" if self.labeled else NN_AGREEMENT
        return "top-1" if self.labeled else "agreement"


def measure(
    results: Mapping[str, Evaluated],
    temperatures: Mapping[str, float],
    reference_name: str | None = None,
    labeled: bool = True,
    features: bool = False,
) -> dict[str, Measured]:
    """Returns the measurements of each model's predictions.

    Args:
        reference_name: the model that the others are compared with; the first if not given.
        labeled, features: see :class:`Measured`.
    """
    reference = results[reference_name or next(iter(results))].plain
    return {
        name: Measured(
            images=len(each.plain),
            top1=top_k_accuracy(each.plain),
            top5=top_k_accuracy(each.plain, 5),
            labeled=labeled,
            change=None if each.plain is reference else compare_predictions(reference, each.plain),
            features=features,
            sqnr=each.sqnr,
            cosine=each.cosine,
            reliability=reliability(each.plain) if labeled and not features else None,
            temperature=temperatures.get(name),
            scaled=reliability(each.scaled) if each.scaled else None,
        )
        for name, each in results.items()
    }
