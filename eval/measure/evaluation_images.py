"""The images that benchmark targets are evaluated on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from torch.utils.data import Dataset, Subset

from eval.measure.open_bundles import open_fitting_data
from illama.data.datasets import ImageData, Sample, calibration_count, evenly_spaced
from illama.data.preprocessing import Preprocessing
from illama.manifest import Manifest
from illama.nearest_neighbors import Classifier, as_it_is


@dataclass(frozen=True)
class EvaluationImages:
    """A test split, or a part of it.

    Attributes:
        name: the data set, as the user named it.
        split: the images; a part of ``data``'s test split.
        preprocessing: preprocessing that all targets share.
        calibration: number of images of the training split that temperatures are fitted on, or, of networks without a
            classifier, whose features others are compared with; 0 for none, as for a classifier without labels.
        indices: index of each image of ``split`` in the whole test split; None if ``split`` is the whole of it.
        features: whether the networks have no classifier.
        classifier: see :class:`eval.measure.evaluate_split.Evaluation`.
    """

    name: str
    data: ImageData
    split: Dataset[Sample]
    preprocessing: Preprocessing
    calibration: int = 512
    indices: Sequence[int] | None = None
    features: bool = False
    classifier: Classifier = as_it_is

    @classmethod
    def open(cls, name: str, manifest: Manifest, images: int | None, calibration: int | None) -> EvaluationImages:
        """Returns the test split of the data set ``name``, read as a bundle's manifest says.

        Args:
            images: number of images, evenly spaced over the split; None for all.

        Raises:
            UserError: the data set does not exist, has other classes or too few images.
        """
        source = manifest.provenance.source
        if calibration is None and manifest.features and source and source.data == name:
            calibration = source.calibration_images  # so that another report has the same neighbors
        data = open_fitting_data(name, manifest.classes, manifest.preprocessing, needs_labels=False)
        return cls.of(name, data, manifest.preprocessing, images, calibration, bool(manifest.features))

    @classmethod
    def of(
        cls,
        name: str,
        data: ImageData,
        preprocessing: Preprocessing,
        images: int | None,
        calibration: int | None,
        features: bool = False,
    ) -> EvaluationImages:
        """Returns the test split of a data set that is open; see :meth:`open`.

        Args:
            features: whether the networks have no classifier. Without labels, each calibration image is then a class.
        """
        split = evenly_spaced(data.test(), images)
        indices = cast(Subset[Sample], split).indices if images is not None else None
        fitted_on = calibration_count(data, calibration) if data.labeled or features else 0
        if features and not data.labeled:
            data.classes = tuple(f"calibration image {number}" for number in range(1, fitted_on + 1))
        return cls(name, data, split, preprocessing, fitted_on, indices, features)

    def index_in_test_split(self, index: int) -> int:
        """Returns the index in the whole test split of an image of ``split``."""
        return index if self.indices is None else self.indices[index]
